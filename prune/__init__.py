"""Slimming a network: which channels can go, which do, the cut itself, its cost, and the files it leaves."""

from netslim.prune.absorb import absorb
from netslim.prune.artefact import load, load_plan, save
from netslim.prune.calibration import Calibration, Chunk, chunk_size
from netslim.prune.carry import carry
from netslim.prune.channels import ChannelMap, Coupling, map_channels
from netslim.prune.choose import choose_zeros, make_plan
from netslim.prune.cost import Cost, cost
from netslim.prune.export import Format, export
from netslim.prune.fold import folded
from netslim.prune.latency import latency
from netslim.prune.origin import Origin
from netslim.prune.plan import Plan
from netslim.prune.repair import Repair, RepairConfig, repair
from netslim.prune.rules import Rules
from netslim.prune.scores import score_channels
from netslim.prune.slimming import open_gammas, plan_network, slim
from netslim.prune.surgery import cut, embed, largest_difference, masked, norm_of, prove

__all__ = [
    "Calibration",
    "ChannelMap",
    "Chunk",
    "Cost",
    "Coupling",
    "Format",
    "Origin",
    "Plan",
    "Repair",
    "RepairConfig",
    "Rules",
    "absorb",
    "carry",
    "choose_zeros",
    "chunk_size",
    "cost",
    "cut",
    "embed",
    "export",
    "folded",
    "largest_difference",
    "latency",
    "load",
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
    "score_channels",
    "slim",
]
