"""A network that runs, and an example, in; its channel map out.

The map says which channels are one channel, what holds the others, and why. How labels flow through a network to find
that out, and what torch's functions do to them, is nobody else's business.
"""

from netslim.prune.map.channels import ChannelMap, map_channels
from netslim.prune.map.classes import CONSTANT, Ints
from netslim.prune.map.layers import Coupling, Ends, Layer, Loose, aligned, few

__all__ = ["CONSTANT", "ChannelMap", "Coupling", "Ends", "Ints", "Layer", "Loose", "aligned", "few", "map_channels"]
