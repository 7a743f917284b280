"""Which engine trains: what a configuration asks for, whether this machine has it, and its start."""

import os
import shlex
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from netslim.base import plainly

_JOINING_SECONDS = 600  # until every rank has started: imports from a shared disk take their time
_HOOKS = {"float32": DDPCommunicationHookType.NO, "bf16": DDPCommunicationHookType.BF16}

Precision = Literal["no", "bf16", "fp16"]


def _launchers_precision() -> Precision:
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in get_args(Precision):
        raise ValueError(f"the launcher asks for mixed precision {asked}; netslim has {', '.join(get_args(Precision))}")
    return cast(Precision, asked)


@plainly
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


def start_engine(config: EngineConfig) -> tuple[Accelerator, DeepSpeedPlugin | None, str]:
    """Join the group of processes: the `Accelerator`, DeepSpeed's plugin where that trains, and the engine's name.

    Raises ValueError where the launcher's choice cannot work here.
    """
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # which Accelerate would take before what we say
    zero = _zero_plugin(config)
    if _uses_cpu() and zero is None:
        # Without it Accelerate finds no GPU and, in silence, makes each process a job of its own.
        os.environ["ACCELERATE_USE_CPU"] = "1"
    accelerator = Accelerator(
        deepspeed_plugin=zero,
        # with DeepSpeed Accelerate would turn the weights themselves to bf16, those of BatchNorm too
        mixed_precision="no" if zero is not None else config.precision,
        gradient_accumulation_steps=config.accumulation,
        kwargs_handlers=[
            # Statistics are reconciled when they are used; copying rank 0's at each step only costs time.
            DistributedDataParallelKwargs(
                broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=_HOOKS[config.all_reduce]
            ),
            InitProcessGroupKwargs(
                backend="gloo" if _needs_gloo(config, zero) else "nccl",
                timeout=timedelta(seconds=max(_JOINING_SECONDS, config.timeout_seconds)),
            ),
        ],
    )
    engines = {
        DistributedType.NO: "single",
        DistributedType.MULTI_CPU: "ddp",
        DistributedType.MULTI_GPU: "ddp",
        DistributedType.DEEPSPEED: f"zero{zero.zero_stage}" if zero is not None else "",
    }
    kind = accelerator.distributed_type
    if kind not in engines:
        raise ValueError(
            f"the launcher chose the engine {kind.value}; netslim drives DDP and DeepSpeed: "
            "launch with --multi_gpu or --use_deepspeed"
        )
    return accelerator, zero, engines[kind]


def _needs_gloo(config: EngineConfig, zero: DeepSpeedPlugin | None) -> bool:
    """Whether Accelerate must be told; DDP's processes on the CPU it gives gloo in any case."""
    if _uses_cpu():
        return zero is not None
    return config.backend == "gloo" and os.environ.get("WORLD_SIZE", "1") != "1"


def _uses_deepspeed(config: EngineConfig) -> bool:
    """Whether the configuration or the launcher asks for DeepSpeed."""
    return bool(config.zero) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _zero_plugin(config: EngineConfig) -> DeepSpeedPlugin | None:
    """DeepSpeed, where the configuration or the launcher asks for it; raises ValueError where it cannot run."""
    if not _uses_deepspeed(config):
        return None
    if config.precision == "fp16":
        raise ValueError("engine.precision fp16 needs the loss scaler of DDP; under DeepSpeed use bf16 or no")
    if config.all_reduce == "bf16":
        raise ValueError("engine.all_reduce bf16 is a hook of DDP; under DeepSpeed use float32")
    if _uses_cpu():
        if torch.cuda.is_available():
            raise ValueError(
                "DeepSpeed takes the GPU where there is one; hide it with CUDA_VISIBLE_DEVICES= to use the CPU"
            )
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.pop("ACCELERATE_USE_CPU", None)  # Accelerate would take it for DDP
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["PATH"] = _path()  # before DeepSpeed is imported, which looks for ninja there
    try:
        plugin = DeepSpeedPlugin(zero_stage=config.zero or None)
    except ImportError as error:
        raise ValueError(f"engine.zero needs DeepSpeed ({error}); pip install 'netslim[deepspeed]'") from None
    plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
    return plugin


def check_devices(config: EngineConfig, num_local: int) -> None:
    """Raise ValueError where this machine cannot run ``num_local`` processes of the engine and precision asked for."""
    if _uses_cpu():
        if config.precision == "fp16":
            raise ValueError("engine.precision fp16 needs a GPU; on CPU use bf16 or no")
        if config.backend == "nccl":
            raise ValueError("engine.backend nccl needs GPUs; on CPU use auto or gloo")
        if config.batch_norm == "sync":
            raise ValueError(
                "engine.batch_norm sync needs GPUs: torch's SyncBatchNorm cannot run on the CPU; use local"
            )
        if _uses_deepspeed(config):
            _check_build_tools()
    elif num_local > num_gpus():
        raise ValueError(
            f"{num_local} processes need as many GPUs and this machine has {num_gpus()}; "
            f"use --num-processes {num_gpus()}, or --cpu for CPU processes"
        )


def _check_build_tools() -> None:
    """Raise ValueError where DeepSpeed could not compile its communication between CPU processes, at its first use."""
    if shutil.which("ninja", path=_path()) is None:
        raise ValueError(
            "engine.zero on the CPU needs ninja, to compile DeepSpeed's communication; "
            "pip install 'netslim[deepspeed]', which brings it"
        )
    compiler = (shlex.split(os.environ.get("CXX", "")) or ["c++"])[0]  # as torch.utils.cpp_extension finds it
    if shutil.which(compiler, path=_path()) is None:
        raise ValueError(
            f"engine.zero on the CPU needs a C++ compiler, to compile DeepSpeed's communication, and {compiler} is not "
            "to be found; install g++, or name another in CXX"
        )


def _path() -> str:
    """PATH with this environment's own programs at its end: pip puts ninja there, whether or not it is activated."""
    own = str(Path(sys.executable).parent)
    parts = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(parts if own in parts else [*parts, own])


def num_gpus() -> int:
    """GPUs that processes on this machine compute on; 0 where they compute on the CPU."""
    return 0 if _uses_cpu() else torch.cuda.device_count()


def asks_for_cpu() -> bool:
    """Whether ACCELERATE_USE_CPU asks for the CPU, also where there are GPUs; in the words that Accelerate takes."""
    return os.environ.get("ACCELERATE_USE_CPU", "0").lower() in {"1", "true", "t", "yes", "y", "on"}


def _uses_cpu() -> bool:
    """Whether processes compute on the CPU: no GPU is there, or they are asked to."""
    return asks_for_cpu() or not torch.cuda.is_available()
