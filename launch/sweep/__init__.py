"""A grid of lambdas, ratios and seeds, of which each sparse model is trained once.

A preset and the values to vary come in; a directory with an index, sweep.json, and a run for each member comes out.
Which members are done, wait or have failed is read from their directories, here alone.
"""

from netslim.launch.sweep.command import sweep_runs
from netslim.launch.sweep.grid import INDEX, Sweep

__all__ = [
    "INDEX",
    "Sweep",
    "sweep_runs",
]
