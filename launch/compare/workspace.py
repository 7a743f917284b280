"""Runs side by side in W&B: a saved workspace, with the plots that compare networks that were slimmed differently."""

import warnings
from collections.abc import Sequence
from typing import Any, get_args

from netslim.launch.run import StageName
from netslim.train.record import Probe, has_key

MOST_RUNS = 50
"""That a panel shows."""
_STAGES = get_args(StageName)
_FIGURES = ("params", "macs", "file_mb", "latency_ms_1", "latency_ms_64")


def save_workspace(project: str, entity: str | None, groups: Sequence[str], name: str) -> str:
    """Lay out the runs of these groups in W&B, under a name, and return the address.

    ``entity`` is the user or team that has the project; None is the key's own.
    Raises ValueError, in one line, where the package or a key is missing, or where W&B does not answer or refuses.
    """
    _find_package()
    if not has_key():
        raise ValueError("a W&B workspace needs a key; set one by `wandb login`, or as WANDB_API_KEY")
    probe = Probe()
    if not probe.finds_server():
        raise ValueError(f"W&B does not answer at {probe.url}, and a workspace is kept there; try again online")
    import wandb

    owner = entity
    try:
        owner = entity or wandb.Api().default_entity or ""
        workspace = make_workspace(project, owner, groups, name)
        workspace.save()
        return str(workspace.url)
    except Exception as error:
        place = f"{owner}/{project}" if owner else project
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"W&B did not save the workspace in {place} ({reason}); name a --record.entity and a --record.project that "
            "your key may write to"
        ) from None


def make_workspace(project: str, entity: str, groups: Sequence[str], name: str) -> Any:
    """What `save_workspace` saves: the runs of the groups, by lambda and ratio, and the plots. Needs no network."""
    ws, panels = _find_package()
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=title, is_open=True, panels=make(panels))
            for title, make in (
                ("Accuracy against cost", _trade_offs),
                ("Accuracy by stage", _stages),
                ("Training", _curves),
                ("Pruning", _pruning),
            )
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Metric("Group").isin(list(groups))),
            # not `sparsity.weight` and `prune.ratio`: W&B takes a dot in a name for a level
            groupby=[ws.Config("lambda"), ws.Config("ratio")],
            pinned_columns=[f"summary:{key}" for key in ("accuracy", *map(_accuracy, _STAGES), *_FIGURES)],
        ),
    )


def _find_package() -> tuple[Any, Any]:
    """The package's modules for workspaces and for their panels; ValueError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of pydantic, about the package
            import wandb_workspaces.reports.v2 as panels
            import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ValueError(
            f"a W&B workspace needs a package that is missing ({error}); pip install '.[workspaces]'"
        ) from None
    return ws, panels


def _accuracy(stage: str) -> str:
    return f"accuracy_{stage}"


def _trade_offs(panels: Any) -> list[Any]:
    """What a smaller network costs in accuracy."""
    accuracy = panels.SummaryMetric(_accuracy("finetuned"))
    scatters = [
        panels.ScatterPlot(title=f"Accuracy by {figure}", x=panels.SummaryMetric(figure), y=accuracy, log_x=True)
        for figure in _FIGURES
    ]
    # of the stages that every run has
    outcomes = (*map(_accuracy, ("sparse", "cut", "repaired", "finetuned")), "params")
    columns = [panels.Config("lambda"), panels.Config("ratio"), *map(panels.SummaryMetric, outcomes)]
    lines = panels.ParallelCoordinatesPlot(
        title="From lambda and ratio to accuracy",
        columns=[panels.ParallelCoordinatesPlotColumn(metric=column) for column in columns],
    )
    return [*scatters, lines]


def _stages(panels: Any) -> list[Any]:
    """What each stage left of the accuracy."""
    return [
        panels.BarPlot(title=f"Accuracy, {stage}", metrics=[panels.SummaryMetric(_accuracy(stage))], range_x=(0, 1))
        for stage in _STAGES
    ]


def _curves(panels: Any) -> list[Any]:
    """What happened epoch by epoch, in sparsity training (which has ratio 0) and fine-tuning: no other has epochs."""
    return [
        panels.LinePlot(title=title, x="epoch", y=[key])
        for title, key in (
            ("Accuracy", "accuracy"),
            ("Test loss", "test_loss"),
            ("Median |gamma|", "gamma_median"),
            ("Share of the time spent waiting for images", "data_wait"),
        )
    ]


def _pruning(panels: Any) -> list[Any]:
    """What the cuts took."""
    return [
        panels.MediaBrowser(title="What the cuts left", media_keys=["channels_by_layer", "gamma_density"]),
        panels.WeavePanelSummaryTable(table_name="channels"),
    ]
