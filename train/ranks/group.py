"""What the processes of a run decide, add up and check together, and how one learns that another is lost."""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from netslim.train.ranks.statistics import reconcile
from netslim.train.ranks.watch import Watch

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

_ENDING_SECONDS = 4  # to find out who is missing, and to end: so much sooner a rank stops waiting
_groups = itertools.count()  # only tests join more than one in a process


class LostRankError(RuntimeError):
    """Another rank died, or did not answer within ``engine.timeout_seconds``."""


class Group:
    """This process's place among the ranks, and what they do together; every rank calls every method.

    Attributes: ``rank``, ``world_size``, ``is_main`` (rank 0), ``device``.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.place = "the start"
        """What the ranks are doing now, for messages."""
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.device: torch.device = accelerator.device
        self._arrivals = 0
        """Operations of the whole group that this rank has come to."""
        self._watch: Watch | None = None

    def start_watch(self, timeout_seconds: int) -> None:
        """Notice ranks that keep the others waiting for so long; where there are none, nothing does."""
        if self.world_size == 1:
            return
        patience = timeout_seconds - _ENDING_SECONDS
        # torch before 2.14 has it under another name
        set_timeout = getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
        set_timeout(timedelta(seconds=patience))
        store = distributed_c10d._get_default_store().clone()  # another connection: the first one may be waiting
        self._watch = Watch(
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

    def gather(self, own: T) -> list[T] | None:
        """What every rank gave, in their order, on rank 0; None on the others."""
        everyone = self._gather_objects(own)
        return everyone if self.is_main else None

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The elementwise sum over all ranks, the same on each; ``values`` is on ``device``."""
        self._arrivals += 1
        return cast(Tensor, self._accelerator.reduce(values, reduction="sum"))

    def first_rank_with(self, flag: Tensor) -> int | None:
        """The first rank whose flag is set, the same on every rank; None where none is."""
        found = self._gather_rows(flag.to(self.device)).nonzero()
        return int(found[0]) if len(found) else None

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

    def _gather_rows(self, own: Tensor) -> Tensor:
        """What every rank gave, (ranks, ...), on every rank."""
        self._arrivals += 1
        return cast(Tensor, self._accelerator.gather(own.unsqueeze(0)))

    def _gather_objects(self, own: T) -> list[T]:
        self._arrivals += 1
        return cast(list[T], gather_object([own]))


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, types and bytes of all parameters and buffers, as hex."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_of_the_group(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
