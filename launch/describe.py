"""What can be slimmed in a network, before any training: the channel map of a preset, or of a run."""

from pathlib import Path

import torch

from netslim.launch.artefacts import read_config, read_json
from netslim.launch.config import RunConfig
from netslim.prune import map_channels
from netslim.train import build_model


def config_of_run(directory: Path) -> RunConfig:
    """Read the configuration of a run, or of one of its stages; ValueError or OSError naming the file at fault."""
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no run: it has no config.json")
    return read_config(path)


def preset_of_run(directory: Path) -> str:
    """The preset that a run was made by; raises as `config_of_run` does, and ValueError where the file names none."""
    config_of_run(directory)
    preset = read_json(directory / "config.json").get("preset")
    if not isinstance(preset, str):
        raise ValueError(f"{directory / 'config.json'} names no preset; name a run directory, not one of its stages")
    return preset


def describe(config: RunConfig) -> str:
    """Describe the channels of the configuration's network: who shares them, which can go, and why others stay.

    It needs neither images nor a process group. The network is built for 10 classes: the outputs of the last layer
    stay in any case, so their number changes nothing in the map.
    """
    size, coupling = config.data.size, config.prune.coupling
    model = build_model(config.model, num_classes=10, seed=config.seed)
    channels = map_channels(model, torch.zeros(1, 3, size, size), coupling)
    lines = [f"{config.model.name} on images of {size}x{size}", channels.table()]
    return "\n".join(lines if coupling == "group" else [*lines, channels.count(coupling)])
