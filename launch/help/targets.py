"""What a command is about: a preset, or a directory of a run or a sweep; a wrong word is answered by what there is."""

import difflib
import json
from pathlib import Path

from netslim.launch.help.commands import COMMANDS, HELP, Command
from netslim.launch.help.source import presets

_MOST = 10
_DIRECTORIES = {"RUN": "config.json", "SWEEP": "sweep.json"}
"""What a command may be about besides presets, and the file that tells."""


def check_command(name: str) -> Command:
    """The command of this name; ValueError that names the nearest."""
    if name in COMMANDS:
        return COMMANDS[name]
    if name in presets():
        raise ValueError(f"{name} is a preset, no command; say what to do with it, as in netslim run {name}")
    known = [*COMMANDS, *HELP, "--version"]
    nearest = difflib.get_close_matches(name, known, n=2, cutoff=0.3) or list(COMMANDS)
    raise ValueError(f"no command is called {name!r}; the nearest are {', '.join(nearest)}")


def check_target(command: str, target: str) -> None:
    """Raise ValueError where a command is about a preset, a run or a sweep, and there is none of this name."""
    kinds = [kind for kind in COMMANDS[command].subject.split("|") if kind in ("PRESET", *_DIRECTORIES)]
    if "PRESET" not in kinds or target in presets():
        return
    path = Path(target)
    if len(kinds) == 1:
        raise ValueError(_was_run(command, path) or nearest_preset(target))
    if not path.is_dir():
        kind = kinds[1].lower()
        raise ValueError(
            f"there is no {kind} directory {target}, and no preset is called {target!r}; "
            f"{_directories(path, kinds[1])}; the presets are {', '.join(presets())}"
        )


def nearest_preset(name: str) -> str:
    """What is said where there is no preset of this name."""
    nearest = difflib.get_close_matches(name, presets(), n=3, cutoff=0.3) or list(presets())
    return f"no preset is called {name!r}; the nearest are {', '.join(nearest)}"


def known_runs(path: Path) -> str:
    """Which run directories there are, where there is none at a path."""
    return _directories(path, "RUN")


def _was_run(command: str, path: Path) -> str | None:
    """What is said where a run's directory stands in the place of a preset."""
    try:
        preset = json.loads((path / _DIRECTORIES["RUN"]).read_text(encoding="utf-8"))["preset"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (
        f"{path} is a run directory, of the preset {preset}; to go on with it: "
        f"netslim {command} {preset} --config {path}/config.json --run-dir {path}"
    )


def _directories(path: Path, kind: str) -> str:
    """Which directories there are that could have been meant: those beside it, or under runs/."""
    for folder in dict.fromkeys((path.parent, Path("runs"))):
        found = sorted(str(each.parent) for each in folder.glob(f"*/{_DIRECTORIES[kind]}"))
        if found:
            nearest = difflib.get_close_matches(str(path), found, n=_MOST, cutoff=0) if len(found) > _MOST else found
            rest = len(found) - len(nearest)
            return f"the {kind.lower()}s are {', '.join(nearest)}" + f" and {rest} more" * bool(rest)
    return f"there are no {kind.lower()}s in {path.parent} or runs/" if path.parent != Path() else "runs/ holds none"
