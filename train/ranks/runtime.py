"""The engine that trains, among the other processes of a run."""

import copy
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from netslim.train.ranks.engine import EngineConfig, check_devices, start_engine
from netslim.train.ranks.finite import ByEngine, OnDevice, Refusals
from netslim.train.ranks.group import Group
from netslim.train.ranks.masters import Fragment, Masters, whole, zero_fragment


class Runtime(Group):
    """This process's place among the ranks, what the ranks do together, and the engine that they train by.

    One per process (Accelerate shares its state between instances). Attributes: those of `Group`, ``config``, and
    ``engine`` ("single", "ddp", or "zero" and its stage). Raises ValueError where the launcher's choice cannot work
    here: more processes than GPUs, fp16 without a GPU, an engine that netslim does not drive.
    """

    def __init__(self, config: EngineConfig, seed: int) -> None:
        check_devices(config, num_local=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.config = config
        accelerator, self._zero, self.engine = start_engine(config)
        super().__init__(accelerator)
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.world_size:
            raise RuntimeError(f"the launcher started {started} processes, but {self.world_size} joined the group")
        self._stop = threading.Event()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, lambda *_: self._stop.set())
        self._seed = seed
        self.reseed()
        self.start_watch(config.timeout_seconds)

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
        masters = Masters(shapes, fragments, optimizer, self.device, self.sum_over_ranks)
        masters.keep_frozen()
        return masters

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

    @property
    def stop_requested(self) -> bool:
        """Whether this process was told to stop: by SIGTERM or SIGUSR1, or rank 0 by the file NETSLIM_STOP_FILE.

        By the file a batch script reaches the ranks alone, and not all the processes that they have started.
        """
        file = os.environ.get("NETSLIM_STOP_FILE") if self.is_main else None
        return self._stop.is_set() or (file is not None and os.path.exists(file))

    def agree(self, step: int, *, stop: bool, due: bool) -> tuple[bool, bool]:
        """Whether any rank asks to stop, and whether rank 0 finds a checkpoint due; the same on every rank.

        Asked only at steps after which it may wait.
        """
        if not self.may_wait(step):
            return False, False
        asked = torch.tensor([stop, due and self.is_main], dtype=torch.int32, device=self.device)
        stops, dues = self.sum_over_ranks(asked).tolist()
        return bool(stops), bool(dues)

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
