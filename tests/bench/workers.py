"""Processes pinned to a core each, which do what they are told: every one for itself, or as the ranks of one group."""

import os
import socket
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch
from torch import multiprocessing

from netslim.launch.run.processes import keep_freed_memory
from netslim.train import EngineConfig, Runtime


class Workers:
    """Process r on the r-th core, with one thread; ``grouped`` processes are the ranks of one gloo group, by DDP.

    Each calls ``make(run)`` once, with its own `Runtime`, and keeps what that gives. They start when the ``with`` does
    and wait, without computing, between orders. With ``cpu=False`` they compute on the GPU. Raises ValueError where
    there are fewer cores than processes.
    """

    def __init__(self, make: Callable[[Runtime], Any], count: int, *, grouped: bool = False, cpu: bool = True) -> None:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < count:
            raise ValueError(f"{count} processes need a core each and there are {len(cores)}; use a bigger machine")
        os.environ["OMP_NUM_THREADS"] = "1"  # read when a process starts
        ranks = _ranks(count) if grouped else [{} for _ in range(count)]
        if cpu:
            ranks = [{**rank, "ACCELERATE_USE_CPU": "1"} for rank in ranks]
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for core, rank in zip(cores, ranks, strict=False):
            ours, theirs = context.Pipe()
            # not a daemon, since a loader may have processes of its own; it ends when the pipe does
            self._processes.append(context.Process(target=_serve, args=(theirs, make, core, rank)))
            self._processes[-1].start()
            theirs.close()
            self._pipes.append(ours)

    def do(self, function: Callable[..., Any], *arguments: Any, count: int | None = None) -> list[Any]:
        """Have all processes, or the first ``count``, do ``function(made, *arguments)`` at once; what each returned."""
        pipes = self._pipes[:count]
        for pipe in pipes:
            pipe.send((function, arguments))
        return [pipe.recv() for pipe in pipes]

    def __enter__(self) -> Self:
        self.do(_wake)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=10 if kind is None else 0)
            process.kill()


def _ranks(count: int) -> Sequence[dict[str, str]]:
    """What a launcher tells the processes of one group on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _serve(pipe: Connection, make: Callable[[Runtime], Any], core: int, environment: dict[str, str]) -> None:
    os.sched_setaffinity(0, {core})
    os.environ |= environment
    torch.set_num_threads(1)
    keep_freed_memory()
    run = Runtime(EngineConfig(), seed=0)
    made = make(run)
    try:
        while True:
            function, arguments = pipe.recv()
            pipe.send(function(made, *arguments))
    except EOFError:
        run.close()


def _wake(_: Any) -> None:
    """Nothing: who has done it has started."""
