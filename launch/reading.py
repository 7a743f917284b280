"""How a configuration is read: from a preset, a file and flags, in that order of precedence, or as a run left it."""

import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from pydantic import ValidationError

from netslim.launch.config import ADAPTER, RunConfig, field_names, to_dict, value_of, with_tuples
from netslim.launch.help import HELP, HELP_ALL, short_help
from netslim.launch.mistakes import LAUNCHER_VARIABLE, is_rank_0, warn
from netslim.train import RecordConfig
from netslim.train.record import OF_ENVIRONMENT

_LARGEST_FILE = 1 << 20  # bytes of a --config file; a whole configuration has two thousand
_MOST_ALIASES = 20  # in one; each may double what the file grows to
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200
Config = TypeVar("Config")


def from_dict(values: Mapping[str, Any], source: str) -> RunConfig:
    """The configuration that ``to_dict`` wrote; raises ValueError in one line that begins with its source."""
    try:
        return ADAPTER.validate_python(with_tuples(values))
    except ValidationError as error:
        raise ValueError(f"{source}: {_describe(error, field_names(RunConfig()))}") from None


def parse(prog: str, description: str, preset: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """Resolve preset < ``--config FILE`` (JSON or YAML) < flags; ``--model NAME`` is short for model.name.

    Raises ValueError in one line that names the field, the value and what is allowed, FileNotFoundError for weights
    that are not there; ``--help`` prints some fields, ``--help-all`` all, and raises SystemExit.
    """
    arguments, file = take_path(_spell_out_model(arguments), "--config", "a file, JSON or YAML")
    if file is not None:
        preset = _merge_file(preset, file)
    if not {*HELP}.isdisjoint(arguments):
        print(short_help(prog, description, to_dict(preset)))
        raise SystemExit(0)
    known = [f"--{name.replace('_', '-')}" for name in field_names(preset)]
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        positive = re.sub(r"(^--|\.)no-", r"\1", flag)
        if flag.startswith("--") and flag != HELP_ALL and positive not in known:
            raise ValueError(f"there is no field {flag}; {_nearest(flag, known)}; --help-all lists all")
    description += (
        "\n\n--config FILE (JSON or YAML) is read before the flags. "
        "--model NAME is short for --model.name NAME --model.width 1."
    )
    arguments = [HELP[1] if argument == HELP_ALL else argument for argument in arguments]
    config = read_flags(RunConfig, arguments, default=preset, prog=prog, description=description)
    # here, where all is known of which file: the run, and whoever goes on with it, takes no other
    return dataclasses.replace(config, model=config.model.pinned)


def as_it_began(config: RunConfig, directory: Path, arguments: Sequence[str]) -> RunConfig:
    """The configuration with which the run in a directory goes on, or that of a new run: as `recorded_as`."""
    path = directory / "config.json"
    if not (directory / "sparse").is_dir() or not path.is_file() or path.stat().st_size > _LARGEST_FILE:
        return config
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        before = from_dict({key: value for key, value in values.items() if key != "preset"}, str(path))
    except (ValueError, OSError, AttributeError, RecursionError):  # whoever claims the directory says what is wrong
        return config
    return recorded_as(before.record, config, directory, arguments)


def recorded_as(before: RecordConfig, config: RunConfig, directory: Path, arguments: Sequence[str]) -> RunConfig:
    """The configuration, recorded where the first start was, unless the arguments name another place.

    The environment, which says the defaults, may have changed since; what of it is not taken is said in one line.
    """
    given = _given(arguments)
    kept = {name: getattr(before, name) for name in OF_ENVIRONMENT if f"record.{name}" not in given}
    odd = [name for name, value in kept.items() if value != getattr(config.record, name)]
    if odd and _is_first():
        warn(
            f"{directory} goes on in W&B as it began, with "
            f"{', '.join(f'record.{name} {_SHORT.repr(kept[name])}' for name in odd)}; give a flag for another"
        )
    return dataclasses.replace(config, record=dataclasses.replace(config.record, **kept))


def warn_of_unread(preset: RunConfig, config: RunConfig, unread: Mapping[str, str]) -> None:
    """Say in one line which of the fields that a user has set nothing reads: those that a preset has otherwise."""
    told = [f"{name} ({why})" for name, why in unread.items() if value_of(config, name) != value_of(preset, name)]
    if told and _is_first():
        warn(f"nothing reads {', '.join(told)}")


def _is_first() -> bool:
    """Whether this process is to say something: rank 0, where no command of ours has said so already."""
    return is_rank_0() and LAUNCHER_VARIABLE not in os.environ


def _given(arguments: Sequence[str]) -> set[str]:
    """The dotted names of the fields that flags or a file name."""
    flags, file = take_path(arguments, "--config", "a file, JSON or YAML")
    names = {
        re.sub(r"(^--|\.)no-", r"\1", flag.partition("=")[0].replace("_", "-")).lstrip("-").replace("-", "_")
        for flag in flags
        if flag.startswith("--")
    }
    values = {} if file is None else _read_file(file)
    return names | {f"{section}.{name}" for section, of in values.items() if isinstance(of, Mapping) for name in of}


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


def _spell_out_model(arguments: Sequence[str]) -> list[str]:
    """Write ``--model NAME`` in full: another network, at its own width where no ``--model.width`` is given."""
    named = [re.sub(r"^--model(?==|$)", "--model.name", argument) for argument in arguments]
    return named if named == list(arguments) else ["--model.width", "1", *named]


def take_path(arguments: Sequence[str], flag: str, kind: str) -> tuple[list[str], Path | None]:
    """The arguments without a flag that no field has, and the path that it names; ValueError where it names none."""
    rest: list[str] = []
    path: Path | None = None
    remaining = iter(arguments)
    for argument in remaining:
        name, has_value, value = argument.partition("=")
        if name != flag:
            rest.append(argument)
            continue
        given = value if has_value else next(remaining, "")
        if not given or given.startswith("--"):
            raise ValueError(f"{flag} needs {kind}; name one after it")
        if path is not None:
            raise ValueError(f"{flag} names {path} and {given}, and takes one; put both into one")
        path = Path(given)
    return rest, path


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
    return from_dict(_merge(to_dict(preset), _read_file(file)), f"--config {file}")


def _read_file(file: Path) -> dict[str, Any]:
    """What a --config file says, without the preset that a run's config.json names."""
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
    return {key: value for key, value in values.items() if key != "preset"}


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
