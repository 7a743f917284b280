"""A channel map, scores and rules in; a `Plan` out, which says what stays of every layer, a value that is JSON.

Choosing is pure: it sees no model, device, file or rank. What goes or stays as a whole, and the room that each layer
leaves, is decided here alone. A plan may carry an `Origin`: a value too, until somebody asks it to build a network.
"""

from netslim.prune.choose.choice import ShareGone, choose, choose_zeros, make_plan
from netslim.prune.choose.origin import Origin
from netslim.prune.choose.plan import Kept, Plan, Selection, Slice, Trim
from netslim.prune.choose.rules import Rules, check_ratio
from netslim.prune.choose.slices import realise, restricted
from netslim.prune.choose.units import Units, by_layer, magnitudes_of, units_of

__all__ = [
    "Kept",
    "Origin",
    "Plan",
    "Rules",
    "Selection",
    "ShareGone",
    "Slice",
    "Trim",
    "Units",
    "by_layer",
    "check_ratio",
    "choose",
    "choose_zeros",
    "magnitudes_of",
    "make_plan",
    "realise",
    "restricted",
    "units_of",
]
