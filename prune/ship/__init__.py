"""A network, with its plan, in; files out that run elsewhere, the network back from them, and what it costs to run.

Files are whole or absent, and read without pickle. Their names and form are known here alone.
"""

from netslim.prune.ship.artefact import load, load_origin, load_plan, save
from netslim.prune.ship.costs import Cost, cost
from netslim.prune.ship.fold import folded
from netslim.prune.ship.formats import Format, export
from netslim.prune.ship.normalise import Normalise
from netslim.prune.ship.timing import latency

__all__ = [
    "Cost",
    "Format",
    "Normalise",
    "cost",
    "export",
    "folded",
    "latency",
    "load",
    "load_origin",
    "load_plan",
    "save",
]
