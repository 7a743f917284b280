"""Slimming a network: which channels can go, which do, the cut itself, its cost, and the files it leaves."""

from netslim.prune.choose import Origin, Plan, Rules, choose_zeros, make_plan
from netslim.prune.cut import carry, cut, embed, largest_difference, masked, norm_of, prove, scales_of
from netslim.prune.gammas import Gammas, gammas
from netslim.prune.map import ChannelMap, Coupling, map_channels
from netslim.prune.repair import (
    Calibration,
    Chunk,
    Repair,
    RepairConfig,
    absorb,
    chunk_size,
    foreseen,
    repair,
    too_few,
)
from netslim.prune.scores import score_channels
from netslim.prune.ship import (
    Cost,
    Format,
    Normalise,
    cost,
    export,
    folded,
    latency,
    load,
    load_origin,
    load_plan,
    save,
)
from netslim.prune.slimming import cautions, cut_proved, open_gammas, plan_network, slim

__all__ = [
    "Calibration",
    "ChannelMap",
    "Chunk",
    "Cost",
    "Coupling",
    "Format",
    "Gammas",
    "Normalise",
    "Origin",
    "Plan",
    "Repair",
    "RepairConfig",
    "Rules",
    "absorb",
    "carry",
    "cautions",
    "choose_zeros",
    "chunk_size",
    "cost",
    "cut",
    "cut_proved",
    "embed",
    "export",
    "folded",
    "foreseen",
    "gammas",
    "largest_difference",
    "latency",
    "load",
    "load_origin",
    "load_plan",
    "make_plan",
    "map_channels",
    "masked",
    "norm_of",
    "open_gammas",
    "plan_network",
    "prove",
    "repair",
    "save",
    "scales_of",
    "score_channels",
    "slim",
    "too_few",
]
