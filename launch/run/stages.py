"""The stages, each only in what is its own: what earlier ones left in, a network with its plan and figures out."""

import time
from dataclasses import replace

from torch import nn

from netslim.launch.config import PruneConfig
from netslim.launch.run.inflight import InFlight
from netslim.launch.run.job import Job
from netslim.launch.run.runner import Made, Training
from netslim.launch.run.stage import Kind, Pass, Stage
from netslim.launch.run.summary import channel_rows, picture_cut
from netslim.prune import (
    Plan,
    cautions,
    cut,
    cut_proved,
    foreseen,
    map_channels,
    open_gammas,
    repair,
    too_few,
)
from netslim.train import few_images
from netslim.train.models import initialise


def sparsify(job: Job, stage: Stage) -> Made:
    """Train with the L1 penalty on the scales of the channels that can be removed; of what the pass before left."""
    config, rules = job.config, job.config.prune.rules
    start: list[str] = []
    dense = job.run.on_all(lambda: job.build(start.append))
    channels = map_channels(dense, job.blank_image, rules.coupling)
    model, plan = dense, None
    for source in stage.sources(config):
        model, plan = job.read(source), job.read_plan(source)
    gammas = open_gammas(dense, channels, rules, model)
    slimming = None
    if config.sparsity.interval(job.run.engine):
        example = job.run.on_main(lambda: job.test_images(2).cpu()).to(job.run.device)
        most = _most_in_flight(config.prune, stage.turn)
        slimming = InFlight(dense, model, plan, channels, rules, config.sparsity, job.run, example, most)
    has_weights = config.model.weights is not None  # of which it is said what was taken; else what is overwritten
    says = ["; ".join([*(start if has_weights else []), channels.summary(rules.coupling)])]
    warns = [*([] if has_weights else start), *cautions(dense, channels, rules.coupling)]
    if stage.turn.number == 1:
        says += _left_out(config.data.batch_size, job.loaders.info.num_train)
        warns = [*job.loaders.info.notes, *warns, *_foreseen(job, dense)]
    training = Training(config=config.sparsify, gammas=gammas, slimming=slimming, says=says, warns=warns)
    return Made(model=model, plan=plan, training=training)


def _left_out(batch_size: int, num_images: int) -> list[str]:
    """Say how many images an epoch leaves out, since no batch would be full of them; no line where it takes all."""
    steps, left = divmod(num_images, batch_size)
    which = f"{left} of the {num_images:,}, others each time"
    return [f"an epoch is {steps:,} steps of {batch_size} images, and leaves out {which}"] if left else []


def _foreseen(job: Job, dense: nn.Module) -> list[str]:
    """What shapes and counts alone tell of the stages to come, before hours of training."""
    config = job.config
    images = few_images(config.data.batch_size, job.run.world_size, config.engine)
    repairs = foreseen(dense, job.blank_image, job.num_calibration) if config.repair.steps else []
    return [*([images] if images else []), *repairs]


def _most_in_flight(config: PruneConfig, turn: Pass) -> float:
    """The share of the channels that may go during sparsity training: what a ratio would leave must not go before."""
    if config.target != "channels":
        return 1.0  # a ratio of parameters or MACs says nothing of channels
    every = [turn] if turn.number > 1 else [Pass(ratio, 1, turn.count) for ratio in config.ratio]
    return min(each.share for each in every)


def prune(job: Job, stage: Stage) -> Made:
    """Rank 0 ranks all scales against one threshold and makes the plan; every rank cuts the same channels."""
    config, run, ratio = job.config, job.run, stage.ratio
    (source,) = stage.sources(config)
    sparse = job.read_sparse(source)
    channels = map_channels(sparse, job.blank_image, config.prune.coupling)
    scores = job.scores(source, sparse, channels)

    def decide() -> tuple[str, float, bool, tuple[str, ...]]:
        images = job.test_images(16)
        made = cut_proved(sparse, channels, images, ratio, config.prune.rules, scores)
        plan = replace(made.plan, origin=job.origin)
        return plan.to_json(), made.difference, made.is_double, made.notes

    text, difference, is_double, notes = run.on_main(decide)
    plan = Plan.from_json(text)
    small = cut(sparse, plan)
    run.check_same(plan.digest, f"at ratio {ratio}: the kept channels")
    run.check_equal(small, f"after the cut at ratio {ratio}")
    rows, gammas = channel_rows(plan), channels.named_gammas(sparse, config.prune.coupling)
    return Made(
        model=small,
        plan=plan,
        metrics={
            "threshold": plan.threshold,
            "num_channels": plan.num_channels,
            "num_removed": plan.num_removed,
            "rules": str(plan.rules),
            "spared_by_floors": dict(plan.spared),
            "restored_by_rounding": sum(layer.restored for layer in plan.layers),
            "difference_from_masked": difference,
            "plan_digest": plan.digest,
        },
        says=lambda accuracy: (
            f"{plan.num_removed} of {plan.num_channels} channels removed ({plan.rules or 'no rules'}), "
            f"accuracy {accuracy:.4f}, cut and masked network differ by {difference:.1e}"
            + " in their own precision, since they do not run in float64" * (not is_double)
            + "".join(f"; {note}" for note in (*plan.departures, *notes))
        ),
        tables={"channels": rows},
        pictures=picture_cut(rows, list(gammas.values()), plan),
    )


def restore(job: Job, stage: Stage) -> Made:
    """Repair the cut network by the training images, which all ranks share, without a training step."""
    started = time.perf_counter()
    before, cut_off = stage.sources(job.config)
    sparse, small, plan = job.read_sparse(before), job.read(cut_off), job.read_plan(cut_off)
    refusal = too_few(job.num_calibration)
    if refusal is not None:
        return Made(
            model=small,
            plan=plan,
            metrics={
                "loss_cut": None,
                "loss_repaired": None,
                "steps": [],
                "num_images": job.num_calibration,
                "repair_seconds": None,
                "plan_digest": plan.digest,
            },
            says=lambda accuracy: f"left as it was cut: {refusal}; accuracy {accuracy:.4f}",
        )
    repaired, outcome = repair(sparse, small, plan, job.calibration, job.config.repair)
    job.run.check_equal(repaired, f"after the repair at ratio {stage.ratio}")
    seconds = time.perf_counter() - started
    images = f"by all {job.num_calibration:,} training images, " * (job.num_calibration < job.config.repair.images)
    return Made(
        model=repaired,
        plan=plan,
        metrics={
            "loss_cut": outcome.loss_cut,
            "loss_repaired": outcome.loss,
            "steps": list(outcome.kept),
            "num_images": job.calibration.num_images,
            "repair_seconds": seconds,
            "plan_digest": plan.digest,
        },
        says=lambda accuracy: f"{outcome}, {images}in {seconds:.1f} s, accuracy {accuracy:.4f}",
    )


def finetune(job: Job, stage: Stage) -> Made:
    """Train the small network without the penalty, from one of the starts."""
    (source,) = stage.sources(job.config)
    small, plan = job.read(source), job.read_plan(source)
    kept = initialise(small, job.config.model, job.config.seed) if stage.kind is Kind.SCRATCH else []
    what = f"{len(kept)} parameters are not new, since no module around them says how they begin: {', '.join(kept[:3])}"
    warns = [what + ", ..." * (len(kept) > 3)] if kept else []
    return Made(model=small, plan=plan, training=Training(config=job.config.finetune, warns=warns))
