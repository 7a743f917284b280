"""Runs a function in real processes that form one gloo group, as a launcher would start them."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

TEMPLATE = multiprocessing.get_context("forkserver")
"""A process that has everything imported, of which others are copies: they start in no time."""
TEMPLATE.set_forkserver_preload(["netslim.launch.recipe", "accelerate", "sklearn.datasets"])

DEVICE = os.environ.get("NETSLIM_TEST_DEVICE", "cpu")
"""cuda: `make gpu` runs the tests of training there, with all ranks on one GPU."""


def run_ranks(function: Callable[..., Any], world_size: int, directory: Path, *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returned on each rank; raises AssertionError with a failed rank's traceback.

    ``function`` is defined at the top of a test module, and what it returns can be saved by torch.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = (world_size, port, dict(os.environ), str(directory))
    processes = [
        TEMPLATE.Process(target=_run, args=(function, rank, *place, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
    failures = [path.read_text() for path in sorted(directory.glob("failure-*"))]
    assert not failures, failures[0]
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
    paths = [directory / f"result-{rank}.pt" for rank in range(world_size)]
    return [torch.load(path, weights_only=False, map_location="cpu") for path in paths]


def _run(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    environment: dict[str, str],
    directory: str,
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()  # what it has is from when the template was started
    os.environ |= environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if DEVICE == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"
    else:  # each rank as on a node of its own, with this GPU
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    compute_exactly()
    torch.set_num_threads(1)
    try:
        torch.save(function(*arguments), Path(directory) / f"result-{rank}.pt")
    except BaseException:
        (Path(directory) / f"failure-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise


def compute_exactly() -> None:
    """On a GPU: the same bits every time, and products as precise as on a CPU."""
    if DEVICE == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
