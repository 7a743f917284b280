"""A run's configuration: the sum of its stages', read from a preset, a file and flags, in that order of precedence."""

import contextlib
import dataclasses
import difflib
import io
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from netslim.data import DataConfig
from netslim.prune import RepairConfig, Rules
from netslim.train import CheckpointConfig, EngineConfig, FitConfig, ModelConfig, RecordConfig, SparsityConfig

Start = Literal["slim", "cut", "scratch"]


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


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FinetuneConfig(FitConfig):
    start: Annotated[tuple[Start, ...], Field(min_length=1)] = ("slim",)
    """What is trained, each from the same plan. slim: the network as it stands, repaired where there is a repair. cut:
    as the cut left it. scratch: newly initialised, for comparison (Liu et al. 2019, arXiv 1810.05270)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.start)) < len(self.start):
            raise ValueError(f"finetune.start names a start twice in {self.start}; name each once")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class InspectConfig:
    ratios: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (
        *(0.1, 0.2, 0.3, 0.4, 0.5),
        *(0.6, 0.7, 0.8, 0.9),
    )
    """Ratios that are tried, by the run's own rules and repair; each in one of the processes."""
    loss: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Accuracy that may be lost: the largest ratio that loses no more, repaired, is marked."""


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
    record: RecordConfig = RecordConfig()
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


_ADAPTER = TypeAdapter(RunConfig)
_LARGEST_FILE = 1 << 20  # bytes of a --config file; a whole configuration has two thousand
_MOST_ALIASES = 20  # in one; each may double what the file grows to
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200
Config = TypeVar("Config")

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
    "data.cache",
    "data.num_workers",
    "engine.backend",
    "engine.timeout_seconds",
    "sparsify.skip_nonfinite",
    "finetune.skip_nonfinite",
    "prune.ratio",
    "finetune.start",
)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    values: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return values


def from_dict(values: Mapping[str, Any], source: str) -> RunConfig:
    """The configuration that ``to_dict`` wrote; raises ValueError in one line that begins with its source."""
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise ValueError(f"{source}: {_describe(error, field_names(RunConfig()))}") from None


def parse(prog: str, description: str, preset: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """Resolve preset < ``--config FILE`` (JSON or YAML) < flags; ``--model NAME`` is short for model.name.

    Raises ValueError in one line that names the field, the value and what is allowed; ``--help`` prints all fields
    and raises SystemExit.
    """
    arguments, file = _take_config_file(_spell_out_model(arguments))
    if file is not None:
        preset = _merge_file(preset, file)
    known = [f"--{name.replace('_', '-')}" for name in field_names(preset)]
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        positive = re.sub(r"(^--|\.)no-", r"\1", flag)
        if flag.startswith("--") and flag != "--help" and positive not in known:
            raise ValueError(f"there is no field {flag}; {_nearest(flag, known)}; --help lists all")
    description += (
        "\n\n--config FILE (JSON or YAML) is read before the flags. "
        "--model NAME is short for --model.name NAME --model.width 1."
    )
    return read_flags(RunConfig, arguments, default=preset, prog=prog, description=description)


def read_flags(kind: type[Config], arguments: Sequence[str], **options: Any) -> Config:
    """A configuration from flags; raises ValueError in one line for a wrong one, and SystemExit after ``--help``."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config: Config = tyro.cli(kind, args=list(arguments), **options)
            return config
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(stop, errors.getvalue())) from None


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


def differences(old: Mapping[str, Any], new: Mapping[str, Any], unread: Sequence[str] = ()) -> list[str]:
    """The fields in which two configurations (as ``to_dict`` gives them) differ, in one phrase each.

    As `fixed_fields` it passes over some.
    """
    before, after = fixed_fields(old, unread), fixed_fields(new, unread)
    return [
        f"{name} was {json.dumps(before.get(name))}, now {json.dumps(after.get(name))}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def fixed_fields(values: Mapping[str, Any], unread: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a configuration (as ``to_dict`` gives it) that change what came out of a run, by dotted names.

    Not those in the sections that no stage has read yet.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in (*_FREE_FIELDS, *unread):
            inner = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else None
            found |= {name: value} if inner is None else fixed_fields(inner)
    return found


def _spell_out_model(arguments: Sequence[str]) -> list[str]:
    """Write ``--model NAME`` in full: another network, at its own width where no ``--model.width`` is given."""
    named = [re.sub(r"^--model(?==|$)", "--model.name", argument) for argument in arguments]
    return named if named == list(arguments) else ["--model.width", "1", *named]


def _take_config_file(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    rest, file = [], None
    remaining = iter(arguments)
    for argument in remaining:
        name, has_value, value = argument.partition("=")
        if name != "--config":
            rest.append(argument)
            continue
        path = value if has_value else next(remaining, "")
        if not path:
            raise ValueError("--config needs a file; name a JSON or YAML file after it")
        file = Path(path)
    return rest, file


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses what is a mistake or an attack: a field given twice, too many aliases."""

    aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > _MOST_ALIASES:
            raise yaml.YAMLError(f"more than {_MOST_ALIASES} aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.YAMLError(f"{twice[0]} is given twice")
        return super().construct_mapping(node, deep)


def _merge_file(preset: RunConfig, file: Path) -> RunConfig:
    if not file.is_file():
        raise FileNotFoundError(f"--config {file}: there is no such file")
    if file.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"--config {file} has {file.stat().st_size} bytes, no configuration has so many")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # JSON is YAML too
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: also for dates and numbers
        raise ValueError(f"--config {file} is neither JSON nor YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"--config {file} holds {type(values).__name__}, not fields with values")
    values = {key: value for key, value in values.items() if key != "preset"}  # which a run's config.json says
    return from_dict(_merge(to_dict(preset), values), f"--config {file}")


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _describe(error: ValidationError, known: Sequence[str]) -> str:
    """The first complaint of pydantic in one line."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    if first["type"] == "unexpected_keyword_argument":
        return f"there is no field {name}; {_nearest(name, known)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    return f"{name} is {_SHORT.repr(first['input'])}: {message[0].lower()}{message[1:]}"


def _nearest(name: str, known: Sequence[str]) -> str:
    last = {candidate.rsplit(".", 1)[-1].lstrip("-"): candidate for candidate in reversed(known)}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    # `ratio` for `prune.ratio` is a likelier slip than any that resembles it by letters
    exact = last.get(name.rsplit(".", 1)[-1].lstrip("-"))
    names = list(dict.fromkeys([*([exact] if exact else []), *close]))
    return f"the nearest are {', '.join(names)}" if names else "none has a name like it"


def _one_line(stop: SystemExit, printed: str) -> str:
    """What tyro printed in a box, or the validation error behind it, as one line."""
    cause: BaseException | None = stop
    while cause is not None:
        if isinstance(cause, ValidationError):
            # tyro builds the innermost dataclass, so that the name lacks what stands before it
            section = re.search(r"Error parsing (?:--)?([\w.]+):", printed)
            prefix = f"{section.group(1)}." if section else ""
            is_ours = cause.errors()[0]["type"] == "value_error"  # and names its field itself
            return _describe(cause, []) if is_ours else prefix + _describe(cause, [])
        cause = cause.__context__
    lines = [line.strip("│╭╰─╮╯ ") for line in printed.splitlines()]
    body = lines[1 : lines.index("", 1)] if "" in lines[1:] else lines[1:]
    return " ".join(body)
