"""The one door to the processes of a run: nothing else imports Accelerate or torch.distributed."""

import copy
import hashlib
import itertools
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DeepSpeedPlugin,
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
from torch.distributed import distributed_c10d

from netslim.train.finite import ByEngine, OnDevice, Refusals
from netslim.train.masters import Fragment, Masters, whole, zero_fragment
from netslim.train.statistics import reconcile
from netslim.train.watch import Watch

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

_JOINING_SECONDS = 600  # until every rank has started: imports from a shared disk take their time
_ENDING_SECONDS = 4  # to find out who is missing, and to end: so much sooner a rank stops waiting
_groups = itertools.count()  # only tests join more than one in a process


_HOOKS = {"float32": DDPCommunicationHookType.NO, "bf16": DDPCommunicationHookType.BF16}

Precision = Literal["no", "bf16", "fp16"]


def _launchers_precision() -> Precision:
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in get_args(Precision):
        raise ValueError(f"the launcher asks for mixed precision {asked}; netslim has {', '.join(get_args(Precision))}")
    return cast(Precision, asked)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class EngineConfig:
    precision: Precision = Field(default_factory=_launchers_precision)
    """Mixed precision of the forward and backward pass, by default that of the launcher; the weights stay float32."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Parts that each batch is split into, to need less memory; the optimizer steps once per batch."""
    batch_norm: Literal["local", "sync", "frozen"] = "local"
    """local: each rank normalises by its own share of the batch; sync: by the whole, on GPUs (SyncBatchNorm); frozen:
    by the running statistics."""
    zero: Literal[0, 1, 2, 3] = 0
    """Stage of DeepSpeed's ZeRO, which divides optimizer state, gradients and weights among the ranks; 0 is DDP."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """How ranks send tensors to each other: auto is nccl between GPUs and gloo between CPU processes."""
    all_reduce: Literal["float32", "bf16"] = "float32"
    """What gradients are sent as where DDP adds them over ranks: bf16 halves the bytes, and rounds them."""
    compile: bool = False
    """Run the training step through torch.compile."""
    timeout_seconds: Annotated[int, Field(ge=10)] = 600
    """How long a rank waits for the others before the job ends."""


class LostRankError(RuntimeError):
    """Another rank died, or did not answer within ``engine.timeout_seconds``."""


class Runtime:
    """This process's place among the ranks, and what the ranks do together.

    One per process (Accelerate shares its state between instances). Attributes: ``rank``, ``world_size``,
    ``is_main`` (rank 0), ``device``, ``engine`` ("single" or "ddp"). Raises ValueError where the launcher's choice
    cannot work here: more processes than GPUs, fp16 without a GPU, an engine that netslim does not drive.
    """

    def __init__(self, config: EngineConfig, seed: int) -> None:
        check_devices(config, num_local=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.config = config
        self._zero = _zero_plugin(config)
        if uses_cpu() and self._zero is None:
            # Without it Accelerate finds no GPU and, in silence, makes each process a job of its own.
            os.environ["ACCELERATE_USE_CPU"] = "1"
        self._accelerator = Accelerator(
            deepspeed_plugin=self._zero,
            # with DeepSpeed Accelerate would turn the weights themselves to bf16, those of BatchNorm too
            mixed_precision="no" if self._zero is not None else config.precision,
            gradient_accumulation_steps=config.accumulation,
            kwargs_handlers=[
                # Statistics are reconciled when they are used; copying rank 0's at each step only costs time.
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=_HOOKS[config.all_reduce]
                ),
                InitProcessGroupKwargs(
                    backend="gloo" if self._needs_gloo() else "nccl",
                    timeout=timedelta(seconds=max(_JOINING_SECONDS, config.timeout_seconds)),
                ),
            ],
        )
        engines = {
            DistributedType.NO: "single",
            DistributedType.MULTI_CPU: "ddp",
            DistributedType.MULTI_GPU: "ddp",
            DistributedType.DEEPSPEED: f"zero{self._zero.zero_stage}" if self._zero is not None else "",
        }
        kind = self._accelerator.distributed_type
        if kind not in engines:
            raise ValueError(
                f"the launcher chose the engine {kind.value}; netslim drives DDP and DeepSpeed: "
                "launch with --multi_gpu or --use_deepspeed"
            )
        self.engine = engines[kind]
        self.place = "the start"
        """What the ranks are doing now, for messages."""
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.world_size:
            raise RuntimeError(f"the launcher started {started} processes, but {self.world_size} joined the group")
        self.is_main: bool = self._accelerator.is_main_process
        self.device: torch.device = self._accelerator.device
        self._stop = threading.Event()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, lambda *_: self._stop.set())
        self._seed = seed
        self.reseed()
        self._arrivals = 0
        self._watch = self._start_watch() if self.world_size > 1 else None

    def _needs_gloo(self) -> bool:
        """Whether Accelerate must be told; DDP's processes on the CPU it gives gloo in any case."""
        if uses_cpu():
            return self._zero is not None
        return self.config.backend == "gloo" and os.environ.get("WORLD_SIZE", "1") != "1"

    def _start_watch(self) -> Watch:
        patience = self.config.timeout_seconds - _ENDING_SECONDS
        # torch before 2.14 has it under another name
        set_timeout = getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
        set_timeout(timedelta(seconds=patience))
        store = distributed_c10d._get_default_store().clone()  # another connection: the first one may be waiting
        return Watch(
            distributed_c10d.PrefixStore(f"netslim-watch-{next(_groups)}", store),
            self.rank,
            gather=lambda own: gather_object([own]),
            timeout=patience,
            state=lambda: (self._arrivals, self.place),
        )

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Say what the ranks do inside; after an error it stays, so that a message can name it."""
        outer, self.place = self.place, f"{self.place}, {place}"
        yield
        self.place = outer

    def reseed(self) -> None:
        """Set what dropout and stochastic depth draw from: it must differ between ranks, and repeat between runs."""
        set_seed(self._seed, device_specific=True)

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout in which convolutions are fast; ZeRO flattens weights, and takes only those in row-major order."""
        return torch.channels_last if self._zero is None else torch.contiguous_format

    def trainee(self, model: nn.Module) -> nn.Module:
        """What the engine may take over of a model: itself, or, for ZeRO, which takes parameters apart, a copy."""
        return model if self._zero is None else copy.deepcopy(model)

    def prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None = None
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap for training; the module given must be a throwaway, since Accelerate changes its ``forward``.

        ``clip`` is the largest norm of the loss's gradient; see ``clip_gradients``.
        """
        if self._zero is not None:
            # Batch sizes are DeepSpeed's book-keeping; what scales the loss is the accumulation alone.
            self._zero.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": 1,
                "train_batch_size": self.config.accumulation * self.world_size,
                "gradient_accumulation_steps": self.config.accumulation,
                "gradient_clipping": clip or 0.0,
            }
        # the count of micro-batches starts anew: a stage before this one may have stopped anywhere
        self._accelerator.step = 0
        with warnings.catch_warnings():
            # torch 2.14 has another name for it, which torch 2.10 and Accelerate do not know
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            wrapped, stepper = self._accelerator.prepare(module, optimizer)
        if self._zero is not None:
            wrapped.optimizer.check_grad_overflow = True  # stages 1 and 2 would look at fp16 gradients only
        return wrapped, stepper

    def release(self) -> None:
        """Forget everything prepared, so that no wrapped module outlives a change of shape."""
        self._accelerator.free_memory()
        self._accelerator.deepspeed_engine_wrapped = None  # else the next engine would not be the one that steps

    def masters(self, trained: nn.Module, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> Masters:
        """The float32 weights and momenta behind a prepared module's trainable parameters."""
        parameters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
        if self._zero is None:
            fragments: dict[str, Fragment | None] = {name: whole(p) for name, p in parameters.items()}
            return Masters({name: p.shape for name, p in parameters.items()}, fragments, optimizer, self.device, None)
        zero_optimizer = wrapped.optimizer
        fragments = {name: zero_fragment(p, zero_optimizer, self.rank) for name, p in parameters.items()}
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
        return Masters(shapes, fragments, optimizer, self.device, self.sum_over_ranks)

    @contextmanager
    def accumulate(self, wrapped: nn.Module) -> Iterator[bool]:
        """One micro-batch; yields whether the optimizer steps after it (and the ranks add their gradients in it)."""
        with self._accelerator.accumulate(wrapped):
            yield self._accelerator.sync_gradients

    def backward(self, loss: Tensor) -> None:
        self._arrivals += 1
        self._accelerator.backward(loss)

    def clip_gradients(self, wrapped: nn.Module, max_norm: float) -> None:
        """Unscale and clip; call where ``accumulate`` yielded True. DeepSpeed does so in its step, by ``prepare``."""
        if self._zero is None:
            self._accelerator.clip_grad_norm_(wrapped.parameters(), max_norm)

    def refusals(self, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> Refusals:
        """What keeps the optimizer of a prepared module from steps that are not finite, on every rank alike."""
        if self._zero is not None:
            return ByEngine(lambda: bool(cast(Any, wrapped).optimizer.overflow))
        if self._accelerator.scaler is not None:
            return ByEngine(lambda: False)
        return OnDevice(optimizer, list(wrapped.parameters()), self.device)

    def may_wait(self, step: int) -> bool:
        """Whether the device may be asked something after this step.

        On GPUs only after every tenth: an answer waits for all work queued before it. DeepSpeed waits in any case.
        """
        return self.device.type != "cuda" or self._zero is not None or step % 10 == 0

    def first_rank_with(self, flag: Tensor) -> int | None:
        """The first rank whose flag is set, the same on every rank; None where none is."""
        found = self._gather_rows(flag.to(self.device)).nonzero()
        return int(found[0]) if len(found) else None

    def agree(self, step: int, *, stop: bool, due: bool) -> tuple[bool, bool]:
        """Whether any rank asks to stop, and whether rank 0 finds a checkpoint due; the same on every rank.

        Asked only at steps after which it may wait.
        """
        if not self.may_wait(step):
            return False, False
        asked = torch.tensor([stop, due and self.is_main], dtype=torch.int32, device=self.device)
        stops, dues = self.sum_over_ranks(asked).tolist()
        return bool(stops), bool(dues)

    def gather(self, own: T) -> list[T] | None:
        """What every rank gave, in their order, on rank 0; None on the others."""
        everyone = self._gather_objects(own)
        return everyone if self.is_main else None

    def _gather_rows(self, own: Tensor) -> Tensor:
        """What every rank gave, (ranks, ...), on every rank."""
        self._arrivals += 1
        return cast(Tensor, self._accelerator.gather(own.unsqueeze(0)))

    def _gather_objects(self, own: T) -> list[T]:
        self._arrivals += 1
        return cast(list[T], gather_object([own]))

    def scaler_state(self) -> dict[str, Any]:
        """State of the fp16 loss scaler, as JSON; empty without one."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if state and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state)

    @torch.no_grad()
    def load_live_weights(self, trained: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Give the weights that the forward pass reads; the optimizer's own are those of ``masters``."""
        parameters = dict(trained.named_parameters())
        with self._gathered(list(parameters.values())):
            for name, weight in weights.items():
                parameters[name].copy_(weight)

    def _gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        """Whole parameters inside, also with ZeRO's stage 3, which then takes over what rank 0 made of them."""
        if self.engine != "zero3":
            return nullcontext()
        import deepspeed  # seconds to import, and not there everywhere

        return cast(AbstractContextManager[None], deepspeed.zero.GatheredParameters(parameters, modifier_rank=0))

    def autocast(self) -> AbstractContextManager[None]:
        """Compute in the precision that the configuration says, inside."""
        if self._zero is None:
            return cast(AbstractContextManager[None], self._accelerator.autocast())
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The elementwise sum over all ranks, the same on each; ``values`` is on ``device``."""
        self._arrivals += 1
        return cast(Tensor, self._accelerator.reduce(values, reduction="sum"))

    @property
    def stop_requested(self) -> bool:
        """Whether this process was told to stop: by SIGTERM or SIGUSR1, or rank 0 by the file NETSLIM_STOP_FILE.

        By the file a batch script reaches the ranks alone, and not all the processes that they have started.
        """
        file = os.environ.get("NETSLIM_STOP_FILE") if self.is_main else None
        return self._stop.is_set() or (file is not None and os.path.exists(file))

    def on_main(self, function: Callable[[], T]) -> T:
        """Run on rank 0 alone; every rank returns what it returned, or raises what it raised."""
        self._arrivals += 1
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
            raise self.together(failure)
        return cast(T, result)

    def together(self, error: E) -> E:
        """The error, marked as one that every rank raises, so that rank 0 alone reports it."""
        error.is_echo = not self.is_main  # type: ignore[attr-defined]
        return error

    def on_all(self, function: Callable[[], T]) -> T:
        """Run on every rank; where it fails on any, every rank raises what the first of them raised."""
        error: Exception | None = None
        try:
            result = function()
        except Exception as caught:
            error = caught
        errors = self._gather_objects(error)
        for rank, first in enumerate(errors):
            if first is not None:
                own = first if error is None or rank != self.rank else error
                own.is_echo = rank != self.rank  # type: ignore[attr-defined]
                raise own
        return result

    def check_equal(self, model: nn.Module, what: str) -> str:
        """Raise RuntimeError unless parameters and buffers are bitwise equal on all ranks; returns their digest."""
        return self.check_same(weights_digest(model), f"{what}: the weights")

    def check_same(self, digest: str, what: str) -> str:
        """Raise RuntimeError that begins with ``what`` unless all ranks give the same digest, in hex; returns it."""
        codes = torch.tensor(list(bytes.fromhex(digest)), device=self.device, dtype=torch.int64)
        digests = [bytes(row).hex() for row in self._gather_rows(codes).tolist()]
        odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if odd:
            raise RuntimeError(f"{what} of rank {odd[0]} differ from those of rank 0")
        return digest

    def reconcile_statistics(self, model: nn.Module) -> None:
        """Give every rank the BatchNorm statistics of all ranks' images together."""
        if self.world_size > 1:
            reconcile(model, lambda moments: self.sum_over_ranks(moments) / self.world_size)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn the loss of another rank, which ends all they do together, into an error that says where it happened."""
        try:
            yield
        except RuntimeError as error:
            if not _is_of_the_group(error):
                raise
            timed_out = re.search("timed? ?out", str(error), re.IGNORECASE) is not None
            what = self._watch.blame(timed_out=timed_out) if self._watch is not None else ""
            if not what:
                reason = str(error).partition("\n")[0].rpartition("] ")[2]
                what = f"rank {self.rank} lost contact with the others ({reason:.100})"
            raise LostRankError(f"{self.place}: {what}") from error

    def close(self) -> None:
        """Leave the process group; call last, also after an error that every rank raised."""
        if self._watch is not None:
            self._watch.leave()
        self._accelerator.end_training()


def _is_of_the_group(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def _zero_plugin(config: EngineConfig) -> DeepSpeedPlugin | None:
    """DeepSpeed, where the configuration or the launcher asks for it; raises ValueError where it cannot run."""
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if not (asked or config.zero):
        return None
    if config.precision == "fp16":
        raise ValueError("engine.precision fp16 needs the loss scaler of DDP; under DeepSpeed use bf16 or no")
    if config.all_reduce == "bf16":
        raise ValueError("engine.all_reduce bf16 is a hook of DDP; under DeepSpeed use float32")
    if uses_cpu():
        if torch.cuda.is_available():
            raise ValueError(
                "DeepSpeed takes the GPU where there is one; hide it with CUDA_VISIBLE_DEVICES= to use the CPU"
            )
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.pop("ACCELERATE_USE_CPU", None)  # Accelerate would take it for DDP
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        plugin = DeepSpeedPlugin(zero_stage=config.zero or None)
    except ImportError as error:
        raise ValueError(f"engine.zero needs DeepSpeed ({error}); pip install 'netslim[deepspeed]'") from None
    plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
    return plugin


def check_devices(config: EngineConfig, num_local: int) -> None:
    """Raise ValueError where this machine cannot run ``num_local`` processes in the precision asked for."""
    if uses_cpu():
        if config.precision == "fp16":
            raise ValueError("engine.precision fp16 needs a GPU; on CPU use bf16 or no")
        if config.backend == "nccl":
            raise ValueError("engine.backend nccl needs GPUs; on CPU use auto or gloo")
        if config.batch_norm == "sync":
            raise ValueError(
                "engine.batch_norm sync needs GPUs: torch's SyncBatchNorm cannot run on the CPU; use local"
            )
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
