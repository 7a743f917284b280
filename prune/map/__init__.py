"""A network that runs, and an example, in; its channel map and its graphs out.

The map says which channels are one channel, what holds the others, and why. How labels flow through a network to find
that out, and what torch's operations do to them, is nobody else's business. Copies for work on a network come from here
too, and the types of its layers.
"""

from netslim.prune.map.channels import ChannelMap, map_channels
from netslim.prune.map.classes import CONSTANT, Ints
from netslim.prune.map.copies import on_a_copy, replica
from netslim.prune.map.layers import Coupling, Ends, Layer
from netslim.prune.map.moves import leaves
from netslim.prune.map.operations import CONVOLVING, NORMALISING, WEIGHTED, widths
from netslim.prune.map.tracing import called_once, norms_after, readers_of_norms, rectified, trace, traces

__all__ = [
    "CONSTANT",
    "CONVOLVING",
    "NORMALISING",
    "WEIGHTED",
    "ChannelMap",
    "Coupling",
    "Ends",
    "Ints",
    "Layer",
    "called_once",
    "leaves",
    "map_channels",
    "norms_after",
    "on_a_copy",
    "readers_of_norms",
    "rectified",
    "replica",
    "trace",
    "traces",
    "widths",
]
