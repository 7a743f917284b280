"""What every stage does alike: is it done, how long it takes, training or evaluation, the record, the artefact."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from netslim.launch.config import fixed_fields, to_dict
from netslim.launch.run.directory import is_complete, write_stage
from netslim.launch.run.inflight import InFlight
from netslim.launch.run.job import Job
from netslim.launch.run.results import read_rows, write_results
from netslim.launch.run.stage import SPARSE, Stage
from netslim.launch.run.summary import accuracies, dataset, done_line, flat, latencies, stage_artefact
from netslim.prune import Plan, cost
from netslim.train import FitConfig, Record, Saver, Store, evaluate, fit
from netslim.train.record import Lineage, Picture


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a stage's network is trained; with gammas it is sparsity training."""

    config: FitConfig
    gammas: Sequence[nn.Parameter] = ()
    slimming: InFlight | None = None
    says: Sequence[str] = ()
    """Lines to be said before it begins."""
    warns: Sequence[str] = ()
    """Warnings to be said then."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a stage's own function gives: a network in the shapes that it keeps, and what is particular to it."""

    model: nn.Module
    plan: Plan | None
    """By which it was cut."""
    training: Training | None = None
    """How it is trained yet; None: it is evaluated as it is."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    says: Callable[[float], str] | None = None
    """A line of what was done, given the accuracy."""
    tables: Mapping[str, Sequence[dict[str, Any]]] | None = None
    pictures: Mapping[str, Picture] | None = None


Make = Callable[[Job, Stage], Made]


def run_stage(job: Job, stage: Stage, make: Make) -> None:
    """Make a stage that is not done: its artefact, its row in results.json, and its record.

    Nothing is written before ``make`` has returned: a stage that refuses leaves no directory.
    """
    run, directory = job.run, job.path(stage)
    run.place = directory.name
    # rank 0 looks, so that all ranks agree also where storage lags
    if run.on_main(lambda: is_complete(directory)):
        return
    started = time.perf_counter()
    made = make(job, stage)
    row = {"stage": stage.name, "ratio": stage.ratio}
    evaluation = None if made.training else evaluate(made.model, job.loaders.test, run)
    with _open_record(job, stage) as record:
        if made.training is not None:
            model, figures = _train(job, stage, made, made.training, record)
        else:
            assert evaluation is not None, "of what is not trained"
            model, figures = made.model, {"accuracy": evaluation.accuracy, "test_loss": evaluation.loss}
        if made.says is not None:
            record.say(made.says(figures["accuracy"]))
        metrics = _write(job, stage, model, made.plan, {**row, **figures, **made.metrics}, started)
        _conclude(job, stage, record, metrics, made)


def _train(job: Job, stage: Stage, made: Made, training: Training, record: Record) -> tuple[nn.Module, dict[str, Any]]:
    """Fit the network, from its newest checkpoint where there is one; gives it in its final shapes, and its metrics."""
    config, plan = job.config, made.plan
    # what no stage has read yet may differ in a run that goes on: see `claim`
    unread = ("repair", "finetune") if stage.directory_name == SPARSE.directory_name else ()
    about = {"stage": stage.name, "ratio": stage.ratio, "preset": job.preset, "plan": plan.digest if plan else None}
    identity = {**about, **fixed_fields(to_dict(config), unread)}
    store = Store(job.path(stage) / "checkpoints", config.checkpoint.keep)
    saver = Saver(store, job.run, config.checkpoint, identity)
    saver.check_room(made.model)
    for line in training.says:
        record.say(line)
    for line in training.warns:
        record.say(line, warning=True)
    metrics = fit(
        made.model,
        job.loaders.train,
        job.loaders.test,
        training.config,
        run=job.run,
        record=record,
        gammas=training.gammas,
        sparsity=config.sparsity if training.gammas else None,
        saver=saver,
        slimming=training.slimming,
    )
    slimming = training.slimming
    if slimming is None:
        return made.model, metrics
    spent = metrics["macs_spent"]
    record.say(f"{slimming.num_gone} channels went in flight; training took {spent:.0%} of the whole's MACs")
    return slimming.result(), metrics


def _open_record(job: Job, stage: Stage) -> Record:
    """The record of a stage; what trackers call its config has the same names in every stage and every run."""
    about = {
        "preset": job.preset,
        "world_size": job.run.world_size,
        "stage": stage.name,
        "ratio": stage.ratio,
        "lambda": job.config.sparsity.weight,
    }
    directory = job.path(stage)
    return Record(
        directory.name,
        directory,
        is_main=job.run.is_main,
        config=job.config.record,
        run_name=job.directory.name,
        settings=flat({**to_dict(job.config), **about}),
        is_last=stage.is_last(job.config),
    )


def _write(
    job: Job, stage: Stage, model: nn.Module, plan: Plan | None, metrics: Mapping[str, Any], started: float
) -> dict[str, Any]:
    """Rank 0 writes the artefact and results.json; returns the metrics with costs added."""

    def write() -> dict[str, Any]:
        price = cost(model, job.blank_image)
        spent = {"seconds": time.perf_counter() - started, **latencies(model, job.blank_image)}
        costs = {"params": price.params, "macs": price.macs, **spent}
        about = (job.origin, job.loaders.info, job.config)
        complete = write_stage(job.path(stage), model, plan, *about, {**metrics, **costs})
        write_results(
            job.directory,
            preset=job.preset,
            world_size=job.run.world_size,
            loader=job.loaders.info.loader,
            device=job.run.device.type,
            engine=job.run.engine,
        )
        return complete

    return job.run.on_main(write)


def _conclude(job: Job, stage: Stage, record: Record, metrics: Mapping[str, Any], made: Made) -> None:
    """Say how a stage ended; to trackers also what the stages before it came to, and in W&B what it was made from."""
    record.say(done_line(metrics))
    if not record.has_summary:
        return
    known = accuracies(read_rows(job.directory), metrics["ratio"])
    about = {"lambda": job.config.sparsity.weight, "world_size": job.run.world_size}
    lineage = None
    if job.config.record.artifacts:
        name, images = job.directory.name, dataset(job.config.data, job.loaders.info)
        sources = (stage_artefact(job.path(source), name) for source in stage.sources(job.config))
        lineage = Lineage(made=stage_artefact(job.path(stage), name), used=(images, *sources))
    record.finish({**metrics, **known, **about}, tables=made.tables, pictures=made.pictures, lineage=lineage)
