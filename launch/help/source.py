"""Presets and fields, as their sources have them: names, values to choose from, and what is said of them."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_LAUNCH = Path(__file__).parents[1]
_ROOMS = ("data", "prune", "train", "launch")
_DEFINED = re.compile(r"Literal\[|pydantic\.dataclasses")
"""In every file that defines a configuration or the values that a field of one may have."""


@dataclass(frozen=True)
class Field:
    """A field of a configuration."""

    name: str
    """Dotted, as prune.min_share."""
    choices: tuple[str, ...]
    """The names that it may be; empty where it is no choice."""
    is_switch: bool
    about: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def flags(self) -> tuple[str, ...]:
        """The flag, and for a switch what puts it off: --cpu, --no-cpu."""
        section, dot, name = self.flag.rpartition(".")
        off = f"{section}.no-{name}" if dot else f"--no-{name[2:]}"
        return (self.flag, off) if self.is_switch else (self.flag,)


@dataclass(frozen=True)
class _Module:
    """What a file of Python defines and imports, by name."""

    room: Path
    classes: dict[str, ast.ClassDef]
    values: dict[str, ast.expr]
    imports: dict[str, tuple[str, ...]]


@cache
def presets() -> dict[str, str]:
    """The names of all presets, and the first line of what each says of itself."""
    body = ast.parse((_LAUNCH / "presets.py").read_text(encoding="utf-8")).body
    return {
        each.name.replace("_", "-"): (ast.get_docstring(each) or "").partition("\n")[0]
        for each in body
        if isinstance(each, ast.FunctionDef)
        if not each.name.startswith("_") and not each.args.args and ast.unparse(each.returns or each) == "RunConfig"
    }


def fields_of(kind: str = "RunConfig") -> list[Field]:
    """All fields of a configuration, by the name of its class, in their order; with those of its sections."""
    return [field for module in _modules() if kind in module.classes for field in _fields(kind, module, "")]


@cache
def _modules() -> list[_Module]:
    found = []
    for room in _ROOMS:
        for path in sorted((_LAUNCH.parent / room).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if _DEFINED.search(text):
                found.append(_module(ast.parse(text), path))
    return found


def _module(tree: ast.Module, path: Path) -> _Module:
    return _Module(
        room=path,
        classes={each.name: each for each in tree.body if isinstance(each, ast.ClassDef)},
        values={
            target.id: each.value
            for each in tree.body
            if isinstance(each, ast.Assign)
            for target in each.targets
            if isinstance(target, ast.Name)
        },
        imports={
            name.asname or name.name: tuple(each.module.split(".")[1:])
            for each in tree.body
            if isinstance(each, ast.ImportFrom) and each.module and each.module.startswith("netslim.")
            for name in each.names
        },
    )


def _where(name: str, module: _Module) -> _Module | None:
    """The file that defines a name which is used in another: that itself, or one in the room that it is imported of."""
    if name in module.classes or name in module.values:
        return module
    if name not in module.imports:
        return None
    room = _LAUNCH.parent.joinpath(*module.imports[name])
    homes = (each for each in _modules() if room in (*each.room.parents, each.room.with_suffix("")))
    return next((each for each in homes if name in each.classes or name in each.values), None)


def _fields(kind: str, module: _Module, prefix: str) -> Iterator[Field]:
    home = _where(kind, module)
    if home is None or kind not in home.classes:
        return
    made = home.classes[kind]
    for base in made.bases:
        yield from _fields(ast.unparse(base), home, prefix)
    for each, after in zip(made.body, [*made.body[1:], ast.Pass()], strict=True):
        if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
            continue
        kind = ast.unparse(each.annotation)
        section = _where(kind, home)
        if section is not None and kind in section.classes:
            yield from _fields(kind, section, f"{prefix}{each.target.id}.")
        elif "tyro.conf." not in kind:  # by which it is no flag
            about = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            choices = tuple(dict.fromkeys(_choices(each.annotation, home)))
            yield Field(prefix + each.target.id, choices, kind == "bool", inspect.cleandoc(str(about)))


def _choices(annotation: ast.expr, module: _Module) -> Iterator[str]:
    """The names that a type allows: those of every Literal in it, also by a name of its own."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        yield from (str(each.value) for each in ast.walk(annotation.slice) if isinstance(each, ast.Constant))
        return
    if isinstance(annotation, ast.Name):
        home = _where(annotation.id, module)
        if home is not None and annotation.id in home.values:
            yield from _choices(home.values[annotation.id], home)
        return
    for each in ast.iter_child_nodes(annotation):
        if isinstance(each, ast.expr):
            yield from _choices(each, module)
