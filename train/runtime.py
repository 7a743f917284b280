"""The one door to the processes of a run: nothing else imports Accelerate or torch.distributed."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Annotated, Literal, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class EngineConfig:
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the forward and backward pass; the weights stay float32."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Parts that each batch is split into, to need less memory; the optimizer steps once per batch."""
    batch_norm: Literal["local", "frozen"] = "local"
    """local: each rank normalises by its own share of the batch; frozen: by the running statistics."""
    compile: bool = False
    """Run the training step through torch.compile."""
    timeout_seconds: Annotated[int, Field(ge=10)] = 600
    """How long a rank waits for the others before the job ends."""


class Runtime:
    """This process's place among the ranks, and what the ranks do together.

    One per process (Accelerate shares its state between instances). Attributes: ``rank``, ``world_size``,
    ``is_main`` (rank 0), ``device``, ``engine`` ("single" or "ddp"). Raises ValueError where the launcher's choice
    cannot work here: more processes than GPUs, fp16 without a GPU, an engine that netslim does not drive.
    """

    def __init__(self, config: EngineConfig, seed: int) -> None:
        check_devices(config, num_local=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.config = config
        if uses_cpu():
            # Without it Accelerate finds no GPU and, in silence, makes each process a job of its own.
            os.environ["ACCELERATE_USE_CPU"] = "1"
        self._accelerator = Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulation,
            kwargs_handlers=[
                # Statistics are reconciled when they are used; copying rank 0's at each step only costs time.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_seconds)),
            ],
        )
        engines = {DistributedType.NO: "single", DistributedType.MULTI_CPU: "ddp", DistributedType.MULTI_GPU: "ddp"}
        kind = self._accelerator.distributed_type
        if kind not in engines:
            raise ValueError(f"the launcher chose the engine {kind.value}; netslim drives DDP: launch with --multi_gpu")
        self.engine = engines[kind]
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.world_size:
            raise RuntimeError(f"the launcher started {started} processes, but {self.world_size} joined the group")
        self.is_main: bool = self._accelerator.is_main_process
        self.device: torch.device = self._accelerator.device
        # Dropout and stochastic depth draw from these; they must differ between ranks and repeat between runs.
        set_seed(seed, device_specific=True)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap for training; the module given must be a throwaway, since Accelerate changes its ``forward``."""
        # the count of micro-batches starts anew: a stage before this one may have stopped anywhere
        self._accelerator.step = 0
        with warnings.catch_warnings():
            # torch 2.14 has another name for it, which torch 2.10 and Accelerate do not know
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return cast(tuple[nn.Module, torch.optim.Optimizer], self._accelerator.prepare(module, optimizer))

    def release(self) -> None:
        """Forget everything prepared, so that no wrapped module outlives a change of shape."""
        self._accelerator.free_memory()

    @contextmanager
    def accumulate(self, wrapped: nn.Module) -> Iterator[bool]:
        """One micro-batch; yields whether the optimizer steps after it (and the ranks add their gradients in it)."""
        with self._accelerator.accumulate(wrapped):
            yield self._accelerator.sync_gradients

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip_gradients(self, wrapped: nn.Module, max_norm: float) -> None:
        """Unscale and clip; call where ``accumulate`` yielded True."""
        self._accelerator.clip_grad_norm_(wrapped.parameters(), max_norm)

    def autocast(self) -> AbstractContextManager[None]:
        return cast(AbstractContextManager[None], self._accelerator.autocast())

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The elementwise sum over all ranks, the same on each; ``values`` is on ``device``."""
        return cast(Tensor, self._accelerator.reduce(values, reduction="sum"))

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()

    def on_main(self, function: Callable[[], T]) -> T:
        """Run on rank 0 alone; every rank returns what it returned, or raises what it raised."""
        outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.is_main:
            try:
                outcome = [(function(), None)]
            except Exception as error:
                if self.world_size == 1:
                    raise
                outcome = [(None, error)]
        broadcast_object_list(outcome)
        result, failure = outcome[0]
        if failure is not None:
            failure.is_echo = not self.is_main  # type: ignore[attr-defined]  # rank 0 reports it
            raise failure
        return cast(T, result)

    def on_all(self, function: Callable[[], T]) -> T:
        """Run on every rank; where it fails on any, every rank raises what the first of them raised."""
        error: Exception | None = None
        try:
            result = function()
        except Exception as caught:
            error = caught
        errors: list[Exception | None] = gather_object([error])
        for rank, first in enumerate(errors):
            if first is not None:
                own = first if error is None or rank != self.rank else error
                own.is_echo = rank != self.rank  # type: ignore[attr-defined]
                raise own
        return result

    def check_equal(self, model: nn.Module, what: str) -> str:
        """Raise RuntimeError unless parameters and buffers are bitwise equal on all ranks; returns their digest."""
        digest = weights_digest(model)
        digests: list[str] = [digest]
        if self.world_size > 1:
            codes = torch.tensor(list(bytes.fromhex(digest)), device=self.device, dtype=torch.int64)
            gathered = self._accelerator.gather(codes.unsqueeze(0))
            digests = [bytes(row).hex() for row in gathered.tolist()]
        odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if odd:
            raise RuntimeError(f"{what}: the weights of rank {odd[0]} differ from those of rank 0")
        return digest

    @torch.no_grad()
    def reconcile_statistics(self, model: nn.Module) -> None:
        """Give every rank the BatchNorm statistics of all ranks' images together.

        Ranks see equal numbers of images, so the mean is the mean of means, and the variance the mean of variances
        plus the variance of means. The sum is taken in float64, in one all-reduce.
        """
        layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if self.world_size == 1 or not layers:
            return
        means = torch.cat([cast(Tensor, layer.running_mean).double() for layer in layers])
        variances = torch.cat([cast(Tensor, layer.running_var).double() for layer in layers])
        sums = self.sum_over_ranks(torch.stack([means, variances + means**2])) / self.world_size
        mean, variance = sums[0], sums[1] - sums[0] ** 2
        sizes = [layer.num_features for layer in layers]
        for layer, m, v in zip(layers, torch.split(mean, sizes), torch.split(variance, sizes), strict=True):
            cast(Tensor, layer.running_mean).copy_(m)
            cast(Tensor, layer.running_var).copy_(v)

    def close(self) -> None:
        """Leave the process group; call last, also after an error that every rank raised."""
        self._accelerator.end_training()


def check_devices(config: EngineConfig, num_local: int) -> None:
    """Raise ValueError where this machine cannot run ``num_local`` processes in the precision asked for."""
    if uses_cpu():
        if config.precision == "fp16":
            raise ValueError("engine.precision fp16 needs a GPU; on CPU use bf16 or no")
    elif num_local > num_gpus():
        raise ValueError(
            f"{num_local} processes need as many GPUs and this machine has {num_gpus()}; "
            f"use --num-processes {num_gpus()}, or --cpu for CPU processes"
        )


def num_gpus() -> int:
    """GPUs that processes on this machine compute on; 0 where they compute on the CPU."""
    return 0 if uses_cpu() else torch.cuda.device_count()


def uses_cpu() -> bool:
    """Whether processes compute on the CPU: no GPU is there, or ACCELERATE_USE_CPU asks for it."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "0").lower() in {"1", "true", "yes", "on"}
    return asked or not torch.cuda.is_available()


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, types and bytes of all parameters and buffers, as hex."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
