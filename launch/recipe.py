"""The stages of network slimming, and what each process of a run does.

accelerate launch -m netslim.launch.recipe PRESET [--prune.ratio 0.7 ...]
"""

import inspect
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from netslim.data import DataInfo, Loaders, Shard, check_batch_size, open_loaders, prepare
from netslim.launch.artefacts import (
    PREEMPTED_MARK,
    STAGES,
    STARTS,
    Pass,
    claim,
    occupied,
    passes_to,
    write_json,
)
from netslim.launch.cluster import end_with_launcher, keep_freed_memory
from netslim.launch.config import RunConfig, Start, fixed_fields, parse, run_directory, to_dict
from netslim.launch.inflight import InFlight
from netslim.launch.inspection import INSPECTION, describe_gammas, try_ratio
from netslim.launch.job import (
    Job,
    blank_image,
    calibrate,
    conclude,
    finish,
    open_record,
    origin,
    read_plan,
    read_slim,
    read_sparse,
    slim_directory,
)
from netslim.launch.mistakes import guarded
from netslim.launch.presets import find_preset, list_presets
from netslim.launch.summary import (
    channel_rows,
    picture_cut,
)
from netslim.prune import (
    Plan,
    cost,
    cut,
    map_channels,
    open_gammas,
    plan_network,
    prove,
    repair,
    score_channels,
)
from netslim.train import (
    FitConfig,
    Preempted,
    Runtime,
    Saver,
    Store,
    describe_pull,
    evaluate,
    fit,
    num_gpus,
    travel,
)
from netslim.train.models import initialise


def stages_of(command: str, config: RunConfig) -> tuple[str, ...]:
    """The stages that a command is about; raises ValueError where the configuration does not go with it."""
    if command == "repair" and not config.repair.steps:
        raise ValueError(
            "repair.steps is empty, so there is nothing to repair by; name absorb, reconstruct or recalibrate"
        )
    if config.prune.passes > 1 and command != "run":
        raise ValueError(
            f"prune.passes is {config.prune.passes}, in which the stages take turns; use netslim run, or one pass"
        )
    every = tuple(stage for stage in STAGES if stage != "repair" or config.repair.steps)
    return every if command == "run" else (command,)


def run_recipe(job: Job, stages: Sequence[str] = STAGES) -> None:
    """Sparsify once; then for each ratio cut the same sparse model, repair and fine-tune what is left.

    In several passes what is left is sparsified and cut again before it is fine-tuned.
    """
    if "inspect" in stages:
        inspect_sparse(job)
        return
    rehearse(job)
    for ratio in job.config.prune.ratio:
        for turn in passes_to(ratio, job.config.prune.passes):
            if "sparsify" in stages:
                sparsify(job, turn)
            if "prune" in stages:
                prune(job, turn)
            if "repair" in stages and job.config.repair.steps:
                restore(job, turn)
        if "finetune" in stages:
            for start in job.config.finetune.start:
                finetune(job, ratio, start)


def rehearse(job: Job) -> None:
    """Plan every cut on the untrained network: a ratio that the floors do not allow fails before any training."""

    def plan_all() -> None:
        model = job.build()
        channels = map_channels(model, blank_image(job), job.config.prune.coupling)
        for ratio in job.config.prune.ratio:
            plan_network(model, channels, blank_image(job), ratio, replace(job.config.prune.rules, score="gamma"))

    job.run.on_main(plan_all)


def sparsify(job: Job, turn: Pass) -> None:
    """Train with the L1 penalty on the scales of the channels that can be removed; of what the pass before left."""
    directory = job.path("sparsify", turn)
    if job.is_done(directory):
        return
    dense, rules = job.build(), job.config.prune.rules
    channels = map_channels(dense, blank_image(job), rules.coupling)
    model, plan = (dense, None) if turn.number == 1 else read_slim(job, turn.before)
    gammas, says = open_gammas(dense, channels, rules, model), channels.summary(rules.coupling)
    row = {"stage": "sparse", "ratio": turn.before.share}
    source = None if plan is None else slim_directory(job, turn.before)

    def two_images() -> Tensor:
        images, _ = next(iter(job.loaders.test))
        return images[:2].cpu()

    slimming = None
    if job.config.sparsity.interval(job.run.engine):
        example = job.run.on_main(two_images).to(job.run.device)
        turns = [turn] if turn.number > 1 else [Pass(ratio, 1, turn.count) for ratio in job.config.prune.ratio]
        # what a ratio would leave must not go before; a ratio of parameters or MACs says nothing of channels
        most = min(each.share for each in turns) if rules.target == "channels" else 1.0
        slimming = InFlight(dense, model, plan, channels, rules, job.config.sparsity, job.run, example, most)
    train(
        job,
        model,
        job.config.sparsify,
        directory,
        row,
        plan=plan,
        source=source,
        gammas=gammas,
        says=says,
        slimming=slimming,
    )


def prune(job: Job, turn: Pass) -> None:
    """Rank 0 ranks all scales against one threshold and makes the plan; every rank cuts the same channels."""
    directory, run, ratio = job.path("prune", turn), job.run, turn.share
    if job.is_done(directory):
        return
    started = time.perf_counter()
    sparse = read_sparse(job, turn)
    channels = map_channels(sparse, blank_image(job), job.config.prune.coupling)
    scores = job.scores(turn, sparse, channels)

    def decide() -> tuple[str, float]:
        images, _ = next(iter(job.loaders.test))
        plan = plan_network(sparse, channels, images[:1], ratio, job.config.prune.rules, scores)
        plan = replace(plan, origin=origin(job.config.model, len(job.loaders.info.classes)))
        return plan.to_json(), prove(sparse, cut(sparse, plan), plan, images[:16])

    text, difference = run.on_main(decide)
    plan = Plan.from_json(text)
    small = cut(sparse, plan)
    run.check_same(plan.digest, f"at ratio {ratio}: the kept channels")
    run.check_equal(small, f"after the cut at ratio {ratio}")
    evaluation = evaluate(small, job.loaders.test, run)
    metrics = {
        "stage": "cut",
        "ratio": ratio,
        "accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "threshold": plan.threshold,
        "num_channels": plan.num_channels,
        "num_removed": plan.num_removed,
        "rules": str(plan.rules),
        "spared_by_floors": dict(plan.spared),
        "restored_by_rounding": sum(layer.restored for layer in plan.layers),
        "difference_from_masked": difference,
        "plan_digest": plan.digest,
    }
    with open_record(job, directory, metrics) as record:
        record.say(
            f"{plan.num_removed} of {plan.num_channels} channels removed ({plan.rules or 'no rules'}), "
            f"accuracy {evaluation.accuracy:.4f}, cut and masked network differ by {difference:.1e}"
        )
        complete = finish(job, small, plan, directory, metrics, started)
        rows, gammas = channel_rows(plan), channels.named_gammas(sparse, job.config.prune.coupling)
        pictures = picture_cut(rows, list(gammas.values()), plan)
        conclude(job, record, directory, complete, [job.path("sparsify", turn)], {"channels": rows}, pictures)


def restore(job: Job, turn: Pass) -> None:
    """Repair the cut network by the training images, which all ranks share, without a training step."""
    directory, source, run, ratio = job.path("repair", turn), job.path("prune", turn), job.run, turn.share
    if job.is_done(directory):
        return
    started = time.perf_counter()
    sparse, small, plan = read_sparse(job, turn), job.read(source, "prune"), read_plan(source)
    repaired, outcome = repair(sparse, small, plan, job.calibration, job.config.repair)
    run.check_equal(repaired, f"after the repair at ratio {ratio}")
    seconds = time.perf_counter() - started
    evaluation = evaluate(repaired, job.loaders.test, run)
    metrics = {
        "stage": "repaired",
        "ratio": ratio,
        "accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "loss_cut": outcome.loss_cut,
        "loss_repaired": outcome.loss,
        "steps": list(outcome.kept),
        "num_images": job.calibration.num_images,
        "repair_seconds": seconds,
        "plan_digest": plan.digest,
    }
    with open_record(job, directory, metrics) as record:
        record.say(f"{outcome}, in {seconds:.1f} s, accuracy {evaluation.accuracy:.4f}")
        complete = finish(job, repaired, plan, directory, metrics, started)
        conclude(job, record, directory, complete, [job.path("sparsify", turn), source])


def inspect_sparse(job: Job) -> None:
    """Cut and repair the sparse model at many ratios, each in one of the processes; rank 0 writes what they found."""
    config, run = job.config, job.run
    sparse = job.read(job.path("sparsify"), "sparsify")
    channels = map_channels(sparse, blank_image(job), config.prune.coupling)

    def try_own() -> list[dict[str, Any]]:
        alone = Shard(0, 1)
        calibration = calibrate(job, alone)
        test = open_loaders(config.data, job.loaders.info, alone, seed=config.seed, device=run.device).test
        scores = score_channels(sparse, channels, config.prune.rules, calibration)
        own = config.inspect.ratios[run.rank :: run.world_size]
        return [
            try_ratio(
                sparse,
                channels,
                scores,
                ratio,
                config.prune.rules,
                config.repair,
                calibration,
                lambda network: evaluate(network, test, run, alone=True).accuracy,
            )
            for ratio in own
        ]

    own = run.on_all(try_own)
    accuracy = evaluate(sparse, job.loaders.test, run).accuracy
    everyone = run.gather(own)

    def write() -> None:
        ratio = max(config.prune.ratio)
        price = cost(sparse, blank_image(job))
        first = open_gammas(job.build(), channels, config.prune.rules)
        pull, _ = describe_pull(
            first, config.sparsity.weight, travel(config.sparsify, job.loaders.train.steps_per_epoch)
        )
        layers, threshold = describe_gammas(sparse, channels, ratio, config.prune.coupling)
        found = {
            "accuracy": accuracy,
            "params": price.params,
            "macs": price.macs,
            "pull": pull,
            "ratio": ratio,
            "layers": layers,
            "threshold": threshold,
            "ratios": sorted((row for rows in everyone or [] for row in rows), key=lambda row: float(row["ratio"])),
        }
        write_json(job.directory / INSPECTION, found)

    run.on_main(write)


def finetune(job: Job, ratio: float, start: Start) -> None:
    """Train the small network without the penalty, from one of the starts."""
    directory, cut_directory = job.path(STARTS[start], Pass(ratio)), job.path("prune", Pass(ratio))
    if job.is_done(directory):
        return
    if start == "slim":
        source, (small, plan) = slim_directory(job, Pass(ratio)), read_slim(job, Pass(ratio))
    else:
        source, small, plan = cut_directory, job.read(cut_directory, "prune"), read_plan(cut_directory)
    if start == "scratch":
        initialise(small, job.config.model, job.config.seed)
    row = {"stage": {"slim": "finetuned", "cut": "finetuned_cut", "scratch": "scratch"}[start], "ratio": ratio}
    train(job, small, job.config.finetune, directory, row, plan=plan, source=source)


def train(
    job: Job,
    model: nn.Module,
    config: FitConfig,
    directory: Path,
    row: dict[str, Any],
    *,
    plan: Plan | None,
    source: Path | None = None,
    gammas: Sequence[nn.Parameter] = (),
    says: str = "",
    slimming: InFlight | None = None,
) -> None:
    """Fit the model that came from a stage's directory, if any, and leave the artefact; first, the record ``says``.

    With ``gammas`` it is sparsity training.
    """
    started = time.perf_counter()
    store = Store(directory / "checkpoints", job.config.checkpoint.keep)
    about = {**row, "preset": job.preset, "plan": None if plan is None else plan.digest}
    unread = ("repair", "finetune") if directory == job.path("sparsify") else ()
    identity = {**about, **fixed_fields(to_dict(job.config), unread)}
    saver = Saver(store, job.run, job.config.checkpoint, identity)
    with open_record(job, directory, row) as record:
        if says:
            record.say(says)
        fitted = fit(
            model,
            job.loaders.train,
            job.loaders.test,
            config,
            run=job.run,
            record=record,
            gammas=gammas,
            sparsity=job.config.sparsity if gammas else None,
            saver=saver,
            slimming=slimming,
        )
        if slimming is not None:
            model, spent = slimming.result(), fitted["macs_spent"]
            record.say(f"{slimming.num_gone} channels went in flight; training took {spent:.0%} of the whole's MACs")
        complete = finish(job, model, plan, directory, {**row, **fitted}, started)
        conclude(job, record, directory, complete, [] if source is None else [source])


def start(preset: str, config: RunConfig, stages: Sequence[str] = STAGES) -> None:
    """Join the process group, open the images and run the stages; every rank of a run calls this."""
    start_each(preset, [(config, stages)])


def start_each(preset: str, runs: Sequence[tuple[RunConfig, Sequence[str]]]) -> None:
    """Several runs one after the other, each with its stages, in one process group and on images opened once.

    They differ in what is trained and cut alone: images, engine and seed are the first one's.
    """
    first, _ = runs[0]
    if first.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "1"
    if not num_gpus():
        keep_freed_memory()
    info = prepare_once_per_node(first)
    run = Runtime(first.engine, first.seed)
    loaders: Loaders | None = None
    try:
        with run.watching():
            for number, (config, stages) in enumerate(runs, 1):
                if run.is_main and len(runs) > 1:
                    print(f"{run_directory(preset, config).name}, {number} of {len(runs)}", flush=True)
                loaders = run_one(preset, config, stages, info, run, loaders)
    finally:
        run.close()


def run_one(
    preset: str, config: RunConfig, stages: Sequence[str], info: DataInfo, run: Runtime, loaders: Loaders | None
) -> Loaders:
    """Run the stages in a directory that no other run is using; returns the loaders, for the next."""
    try:
        with ExitStack() as held:
            job = open_job(preset, config, info, run, loaders)
            run.on_main(lambda: held.enter_context(occupied(job.directory)))
            run_recipe(job, stages)
    except Preempted:
        if run.is_main:
            (run_directory(preset, config) / PREEMPTED_MARK).touch()
        raise
    return job.loaders


def open_job(preset: str, config: RunConfig, info: DataInfo, run: Runtime, loaders: Loaders | None = None) -> Job:
    """Claim the run's directory and open this rank's share of the images, where no run before has opened it."""
    check_batch_size(config.data.batch_size, run.world_size, config.engine.accumulation)  # before anything is written
    directory = run_directory(preset, config)
    run.on_main(lambda: claim(directory, preset, config))
    loaders = loaders or open_loaders(
        config.data,
        info,
        Shard(run.rank, run.world_size),
        seed=config.seed,
        accumulation=config.engine.accumulation,
        device=run.device,
    )
    return Job(preset, config, run, loaders, directory)


def prepare_once_per_node(config: RunConfig) -> DataInfo:
    """Write and verify the images in one process of each node, while the others wait for it.

    Before the process group is joined: writing a large data set takes longer than ranks wait for each other.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return prepare(config.data, quiet=not is_first, check=is_first)
    except (ValueError, OSError) as error:
        error.is_echo = not is_first  # type: ignore[union-attr]  # the first process of the node reports it
        raise


def main() -> int:
    """The entry of ``python -m netslim.launch.recipe PRESET [flags]``, under any launcher or none.

    ``netslim prune`` and the like say in NETSLIM_STAGES which stages they mean.
    """

    def body() -> None:
        preset, *flags = sys.argv[1:] or ["--help"]
        if preset in ("-h", "--help"):
            print(f"{__doc__}\n{list_presets()}")
            return
        make = find_preset(preset)
        config = parse(f"netslim.launch.recipe {preset}", inspect.getdoc(make) or "", make(), flags)
        end_with_launcher()
        start(preset, config, os.environ.get("NETSLIM_STAGES", " ".join(STAGES)).split())

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
