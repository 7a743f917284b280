"""A run's configuration: the sum of its stages'; and how one compares with another."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from netslim.base import plainly
from netslim.data import DataConfig
from netslim.prune import RepairConfig, Rules
from netslim.train import CheckpointConfig, EngineConfig, FitConfig, ModelConfig, RecordConfig, SparsityConfig

Start = Literal["slim", "cut", "scratch"]


@plainly
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PruneConfig(Rules):
    ratio: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)] = (0.5,)
    """Shares of the target to remove; each is pruned and fine-tuned from the same sparse model."""
    passes: Annotated[int, Field(ge=1)] = 1
    """Rounds of sparsity training and pruning in which a ratio is reached; each takes the same share of what the one
    before left (Liu et al. 2017, section 3)."""

    def __post_init__(self) -> None:
        if len(set(self.ratio)) < len(self.ratio):
            raise ValueError(f"prune.ratio names a ratio twice in {self.ratio}; name each once")

    @property
    def rules(self) -> Rules:
        """All but the ratio."""
        return Rules(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Rules)})


@plainly
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FinetuneConfig(FitConfig):
    start: Annotated[tuple[Start, ...], Field(min_length=1)] = ("slim",)
    """What is trained, each from the same plan. slim: the network as it stands, repaired where there is a repair. cut:
    as the cut left it. scratch: newly initialised, for comparison (Liu et al. 2019, arXiv 1810.05270)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.start)) < len(self.start):
            raise ValueError(f"finetune.start names a start twice in {self.start}; name each once")


@plainly
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class InspectConfig:
    ratios: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (
        *(0.1, 0.2, 0.3, 0.4, 0.5),
        *(0.6, 0.7, 0.8, 0.9),
    )
    """Ratios that are tried, by the run's own rules and repair; each in one of the processes."""
    loss: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Accuracy that may be lost: the largest ratio that loses no more, repaired, is marked."""


@plainly
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class RunConfig:
    data: DataConfig = DataConfig()
    """Which images, and how they reach the network."""
    model: ModelConfig = ModelConfig()
    """The network before it is slimmed."""
    sparsify: FitConfig = FitConfig()
    """Sparsity training."""
    sparsity: SparsityConfig = SparsityConfig()
    """The L1 penalty on BatchNorm scales during sparsity training."""
    prune: PruneConfig = PruneConfig()
    """The global threshold."""
    repair: RepairConfig = RepairConfig()
    """What is restored after the cut, with no training step."""
    inspect: InspectConfig = InspectConfig()
    """What `netslim inspect` tries on the run's sparse model."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Training of the small network."""
    engine: EngineConfig = Field(default_factory=EngineConfig)
    """How each process computes."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When training is saved, to be taken up again after a crash."""
    record: RecordConfig = Field(default_factory=RecordConfig)
    """Where metrics go besides the run directory."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of weights, order and augmentation; two runs with the same seed end with the same weights on CPU."""
    cpu: bool = False
    """Compute on the CPU also where there is a GPU."""
    num_processes: Annotated[int, Field(ge=1)] | None = None
    """Processes on this machine; None is one per GPU, or one. Only for `netslim`; `accelerate launch` has its own."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often `netslim` starts all processes again, from the last checkpoint, after one of them has died."""
    run_dir: Path | None = None
    """Where the run is kept, on storage that all nodes share; None is runs/PRESET."""

    def __post_init__(self) -> None:
        self.sparsity.interval(f"zero{self.engine.zero}")  # it refuses what cannot be, before anything starts


ADAPTER = TypeAdapter(RunConfig)
"""Reads and writes configurations as plain values."""

# Fields that say where and how a run is made, not what comes out: they may differ when a run directory is used again.
# Ratios and starts may, because each has directories of its own.
_FREE_FIELDS = (
    "record",
    "checkpoint",
    "inspect",
    "max_restarts",
    "run_dir",
    "num_processes",
    "cpu",
    "model.weights",  # where: what, says its sha256
    "data.cache",
    "data.num_workers",
    "engine.backend",
    "engine.timeout_seconds",
    "sparsify.skip_nonfinite",
    "finetune.skip_nonfinite",
    "prune.ratio",
    "finetune.start",
)

# Fields that older runs do not name, with the value by which those were made: at it they are no difference.
_NEWER_FIELDS = {
    "data.fit": "crop",
    "data.upright": True,
    "data.white": None,
    "prune.normalise": "none",
    "prune.scope": "network",
}


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    values: dict[str, Any] = ADAPTER.dump_python(config, mode="json")
    return values


class _Dumper(yaml.SafeDumper):
    """A list on one line, as a person writes ratios."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(list, lambda dumper, each: dumper.represent_sequence("tag:yaml.org,2002:seq", each, True))


def to_yaml(config: RunConfig) -> str:
    """The configuration as a file that `--config` takes, with the same values."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def with_tuples(values: Mapping[str, Any], kind: Any = RunConfig) -> dict[str, Any]:
    """Plain values of a configuration, in which one value stands for a tuple of it: ``ratio: 0.5`` for ``[0.5]``."""
    found = dict(values)
    for name, hint in get_type_hints(kind).items():
        value = found.get(name)
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            found[name] = with_tuples(value, hint)
        elif isinstance(value, str | int | float) and any(
            get_origin(each) is tuple for each in (hint, *get_args(hint))
        ):
            found[name] = [value]
    return found


def run_directory(preset: str, config: RunConfig) -> Path:
    """Where the run is kept: ``--run-dir``, or runs/PRESET."""
    return config.run_dir or Path("runs") / preset


def field_names(config: Any) -> list[str]:
    """The dotted names of all fields, as flags and errors spell them: ``prune.ratio``, ``seed``."""
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            names += [f"{field.name}.{name}" for name in field_names(value)]
        else:
            names.append(field.name)
    return names


def unread_fields(config: RunConfig) -> dict[str, str]:
    """The fields that nothing reads beside the others, by their dotted names, and why."""
    sections = ("data", "sparsify", "sparsity", "prune", "repair", "finetune")
    found = {
        f"{section}.{name}": f"{section}.{why}"
        for section in sections
        for name, why in getattr(config, section).unread.items()
    }
    if not config.repair.steps and config.prune.score != "reconstruction":
        found["repair.images"] = "repair.steps is empty"
    if config.engine.precision == "fp16":
        why = "engine.precision is fp16, whose loss scaler leaves steps out by itself"
        found |= dict.fromkeys(("sparsify.skip_nonfinite", "finetune.skip_nonfinite"), why)
    return found


def value_of(config: RunConfig, name: str) -> Any:
    """The value of a field by its dotted name."""
    return reduce(getattr, name.split("."), config)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], unread: Sequence[str] = ()) -> list[str]:
    """The fields in which two configurations (as ``to_dict`` gives them) differ, in one phrase each.

    As `fixed_fields` it passes over some.
    """
    before, after = fixed_fields(old, unread), fixed_fields(new, unread)
    pairs = {
        name: tuple(fields.get(name, _NEWER_FIELDS.get(name)) for fields in (before, after))
        for name in dict.fromkeys([*before, *after])
    }
    return [f"{name} was {json.dumps(old)}, now {json.dumps(new)}" for name, (old, new) in pairs.items() if old != new]


def fixed_fields(values: Mapping[str, Any], unread: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a configuration (as ``to_dict`` gives it) that change what came out of a run, by dotted names.

    Not those in the sections that no stage has read yet. What `auto` stands for is filled in, so that a run is the
    same by whichever name its values were given; fields that older runs do not name are left out where they change
    nothing, so that their checkpoints are still theirs.
    """
    model = ModelConfig(**values["model"])
    settled: dict[str, Any] = {**values["model"], "initial_gamma": model.first_gamma}
    if model.weights is None:
        del settled["weights_head"]  # which runs from before there were weights do not have
    found = _fixed({**values, "model": settled}, unread)
    return {name: value for name, value in found.items() if name not in _NEWER_FIELDS or value != _NEWER_FIELDS[name]}


def _fixed(values: Mapping[str, Any], unread: Sequence[str] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in (*_FREE_FIELDS, *unread):
            inner = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else None
            found |= {name: value} if inner is None else _fixed(inner)
    return found
