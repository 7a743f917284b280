"""What a run will take: memory of each process while it trains, and room on the disk."""

import copy
import resource
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from netslim.data import DataConfig, Source, stored
from netslim.launch.config import RunConfig
from netslim.launch.run import Kind, Stage
from netslim.train import EngineConfig

_TRAINED = (Kind.SPARSE, Kind.FINETUNED, Kind.FINETUNED_CUT, Kind.SCRATCH)


def own_memory() -> int:
    """The most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Demand:
    """What training takes of a process, in bytes."""

    states: int
    """Weights, gradients and momenta, buffers."""
    kept: int
    """What the forward pass keeps of a step's images for the backward pass."""
    copies: int
    """Where weights lie in the process's own memory: those of a checkpoint that is written, and of the cut's proof."""

    @property
    def total(self) -> int:
        return self.states + self.kept + self.copies


def kept_for_backward(model: nn.Module, images: Tensor, engine: EngineConfig) -> int:
    """Measure the bytes that a forward pass in training mode keeps of the images; the model is unchanged.

    Args: images (n, 3, height, width), n at least 2, on the model's device.
    """
    model = copy.deepcopy(model).train()
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(engine.precision)
    narrow = nullcontext() if half is None else torch.autocast(images.device.type, half)
    with torch.random.fork_rng(devices=[]), narrow, torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        outputs = model(images)  # kept until all are counted: what is freed may give its place to others
    total = sum(found.values())
    del outputs
    return total


def training_demand(model: nn.Module, config: RunConfig, num_processes: int, *, on_gpu: bool) -> Demand:
    """What sparsity training takes of each process; raises what the network's own forward does."""
    size, zero = config.data.size, config.engine.zero
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    parameters = sum(each.nbytes for each in model.parameters())
    buffers = sum(each.nbytes for each in model.buffers())
    # DeepSpeed's ZeRO divides the momenta from stage 1 on, gradients from 2, weights from 3: arXiv 1910.02054
    shares = [1 / num_processes if zero >= stage else 1.0 for stage in (1, 2, 3)]
    part = config.data.batch_size / num_processes / config.engine.accumulation
    return Demand(
        states=round(parameters * sum(shares)) + buffers,
        kept=round(kept_for_backward(model, images, config.engine) / len(images) * part),
        # weights and momenta twice, as tensors and as a file; the network and the masked one twice in float64
        copies=0 if on_gpu else 8 * parameters,
    )


def memory_line(demand: Demand, config: RunConfig, num_processes: int, program: int, *, on_gpu: bool) -> str:
    """Say what training takes of each process, besides the bytes that the program itself takes."""
    per = config.data.batch_size // num_processes // config.engine.accumulation
    where = "GPU" if on_gpu else f"process, besides {_mega(program)} of the program itself"
    copies = f", {_mega(demand.copies)} of copies, for checkpoints and for the proof of the cut" * (not on_gpu)
    return (
        f"memory of training: about {_mega(demand.total)} of each {where}: {_mega(demand.states)} of weights, "
        f"gradients and momenta, {_mega(demand.kept)} of what {per} images leave for the backward pass"
        f"{copies}"
    )


def disk_lines(
    model: nn.Module, config: RunConfig, stages: Sequence[Stage], directory: Path, source: Source | None
) -> list[str]:
    """Say what the stages that are not done leave on the disk, and where there is not so much room."""
    weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    momenta = sum(each.nbytes for each in model.parameters())
    trained = sum(stage.kind in _TRAINED for stage in stages)
    checkpoints = trained * (config.checkpoint.keep + 1) * (weights + momenta)
    need = len(stages) * weights + checkpoints
    lines = [
        f"disk: at most {_mega(need)} in {directory}: {len(stages)} networks of at most {_mega(weights)}, "
        f"{_mega(checkpoints)} of checkpoints{_room(directory, need)}"
    ]
    if source is not None:
        lines += _stored_lines(config.data, source)
    return lines


def _stored_lines(config: DataConfig, source: Source) -> list[str]:
    place, need = stored(config, source)
    if place.is_dir():
        return [f"images: written already, in {place}"]
    if not need:
        return ["images: nothing to write, they are read where they are"]
    return [f"images: about {_mega(need)} of .beton files in {place}{_room(place, need)}"]


def _room(path: Path, need: int) -> str:
    """How much room there is, at the nearest folder that is there."""
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(there).free
    return f"; {_mega(free)} are free" + ", which is too little" * (free < need)


def _mega(size: int) -> str:
    if size >= 1e10:
        return f"{size / 1e9:,.0f} GB"
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"
