"""How a run starts: here or in several processes, which join one group, open the images once and do its work."""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from netslim.data import DataConfig, DataInfo, Loaders, Shard, check_batch_size, open_loaders, open_source, prepare
from netslim.launch.config import RunConfig, run_directory
from netslim.launch.mistakes import is_rank_0
from netslim.launch.presets import PRESETS, find_preset, list_presets, read_preset
from netslim.launch.reading import parse, warn_of_unread
from netslim.launch.run.directory import PREEMPTED_MARK, check_same, claim, occupied, preset_of_run
from netslim.launch.run.job import Job
from netslim.launch.run.processes import (
    count_processes,
    end_with_launcher,
    is_of_netslim,
    keep_freed_memory,
    launch,
    of_launcher,
    warn_of_cpu,
    warn_of_missing_processes,
    warn_of_overruled,
)
from netslim.train import Preempted, Runtime, asks_for_cpu, build_model, check_model, check_values, num_gpus

Work = Callable[[Job], None]
"""What all ranks of a run do together."""


def start(
    module: str,
    preset: str,
    flags: Sequence[str],
    config: RunConfig,
    work: Work,
    at_work: Callable[[], str],
    environment: Mapping[str, str] | None = None,
    *,
    reads_only: bool = False,
) -> int:
    """Do the work in this process, or in as many as the configuration says; returns the exit code.

    Each of several runs ``python -m module preset flags``, whose entry is `enter`, in this ``environment``, and has to
    come to the same work. ``at_work`` says for a message what they are at. Work that ``reads_only`` leaves the run's
    directory as it is, which may be somebody else's; `enter` has to be told the same.
    """
    num_processes = count_processes(config)
    if num_processes == 1 and not (config.engine.zero or config.max_restarts):
        work_each(preset, [(config, work)], reads_only=reads_only)
        return 0
    os.environ |= environment or {}
    return launch(
        module,
        [preset, *flags],
        num_processes=num_processes,
        zero=config.engine.zero,
        precision=config.engine.precision,
        max_restarts=config.max_restarts,
        stage=at_work,
        was_preempted=(run_directory(preset, config) / PREEMPTED_MARK).is_file,
    )


def read_target(command: str, target: str, flags: Sequence[str]) -> tuple[str, RunConfig, list[str]]:
    """The preset, the configuration and the flags of a preset, or of a run as its config.json has them.

    Raises ValueError or OSError as `read_preset` does, and for a directory that is no run.
    """
    if target in PRESETS or not Path(target).is_dir():
        return target, read_preset(command, target, flags, is_run=False), list(flags)
    preset = preset_of_run(Path(target))
    every = ["--config", f"{target}/config.json", "--run-dir", target, *flags]
    about = f"A run of the preset {preset}, with its own values."
    return preset, parse(f"{command} {target}", about, find_preset(preset)(), every), every


def check_network(config: RunConfig) -> None:
    """Raise ValueError for a network that cannot be built, or weights of another one, before anything is written."""
    check_model(config.model, _num_classes(config.data) if config.model.weights else None)


def check_batch(config: RunConfig, num_processes: int) -> None:
    """Raise ValueError for a batch that cannot be shared by so many processes, or that leaves a BatchNorm too little.

    Call `check_network` before.
    """
    batch_size, engine = config.data.batch_size, config.engine
    check_batch_size(batch_size, num_processes, engine.accumulation)
    if batch_size == num_processes * engine.accumulation:  # else no process has a single image at a time
        model = build_model(config.model.anew, num_classes=10, seed=config.seed)
        check_values(model, torch.zeros(1, 3, config.data.size, config.data.size), batch_size, num_processes, engine)


def _num_classes(config: DataConfig) -> int | None:
    try:
        return len(open_source(dataclasses.replace(config, download=False)).classes)
    except (ValueError, OSError):  # not there yet; what is wrong with them is said when they are prepared
        return None


def enter(module: str, about: str, work: Work, *, reads_only: bool = False) -> None:
    """What a process that runs ``python -m module PRESET [flags]`` does, under any launcher or none."""
    preset, *flags = sys.argv[1:] or ["--help"]
    if preset in ("-h", "--help"):
        print(f"{about}\n{list_presets()}")
        return
    config = read_preset(module, preset, flags)
    if not reads_only:
        config.record.check_installed()
    end_with_launcher()
    warn_of_missing_processes()
    if not is_of_netslim():
        warn_of_unread(find_preset(preset)(), config, of_launcher(config))
        warn_of_overruled(config)
        if is_rank_0() and not (config.cpu or asks_for_cpu() or num_gpus()):
            warn_of_cpu()
    work_each(preset, [(config, work)], reads_only=reads_only)


def work_each(preset: str, runs: Sequence[tuple[RunConfig, Work]], *, reads_only: bool = False) -> None:
    """Several runs one after the other, each with its work, in one process group and on images opened once.

    They differ in what is trained and cut alone: images, engine and seed are the first one's. Every rank calls this.
    """
    first, _ = runs[0]
    if first.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "1"
    if not num_gpus():
        keep_freed_memory()
    info = _prepare_once_per_node(first)
    run = Runtime(first.engine, first.seed)
    loaders: Loaders | None = None
    try:
        with run.watching():
            for number, (config, work) in enumerate(runs, 1):
                if run.is_main and len(runs) > 1:
                    print(f"{run_directory(preset, config).name}, {number} of {len(runs)}", flush=True)
                loaders = _work_one(preset, config, work, info, run, loaders, reads_only)
    finally:
        run.close()


def _work_one(
    preset: str,
    config: RunConfig,
    work: Work,
    info: DataInfo,
    run: Runtime,
    loaders: Loaders | None,
    reads_only: bool,
) -> Loaders:
    """Work in a directory that no other run is using, or that is only read; returns the loaders, for the next."""
    try:
        with ExitStack() as held:
            job = open_job(preset, config, info, run, loaders, reads_only=reads_only)
            if not reads_only:
                run.on_main(lambda: held.enter_context(occupied(job.directory)))
            work(job)
    except Preempted:
        if run.is_main:
            (run_directory(preset, config) / PREEMPTED_MARK).touch()
        raise
    return job.loaders


def open_job(
    preset: str,
    config: RunConfig,
    info: DataInfo,
    run: Runtime,
    loaders: Loaders | None = None,
    *,
    reads_only: bool = False,
) -> Job:
    """Claim the run's directory and open this rank's share of the images, where no run before has opened it."""
    run.on_main(lambda: check_batch(config, run.world_size))  # before anything is written
    directory = run_directory(preset, config)
    run.on_main(lambda: check_same(directory, config) if reads_only else claim(directory, preset, config))
    loaders = loaders or open_loaders(
        config.data,
        info,
        Shard(run.rank, run.world_size),
        seed=config.seed,
        accumulation=config.engine.accumulation,
        device=run.device,
    )
    return Job(preset, config, run, loaders, directory)


def _prepare_once_per_node(config: RunConfig) -> DataInfo:
    """Write and verify the images in one process of each node, while the others wait for it.

    Before the process group is joined: writing a large data set takes longer than ranks wait for each other.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return prepare(config.data, quiet=not is_first, check=is_first)
    except (ValueError, OSError) as error:
        error.is_echo = not is_first  # type: ignore[union-attr]  # the first process of the node reports it
        raise
