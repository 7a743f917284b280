"""The commands of ``netslim``: what each is called with, and what it does."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from netslim.launch.help.source import presets

HELP = ("-h", "--help")
HELP_ALL = "--help-all"
DRY_RUN = "--dry-run"
_WIDTH = 80
"""Columns of all help: what every terminal has."""


@dataclass(frozen=True)
class Command:
    """One command, as help and completion know it."""

    about: str
    subject: str = "PRESET"
    """What it is about, the first word after it."""
    kinds: tuple[str, ...] = ("RunConfig",)
    """The configurations whose fields are its flags."""
    extra: tuple[str, ...] = ("--config", "--model", HELP_ALL)
    """Flags of no configuration."""


_DRY = (*Command("").extra, DRY_RUN)
COMMANDS = {
    "run": Command("all stages on this machine: sparsity training, pruning, repair, fine-tuning", extra=_DRY),
    "sparsify": Command("sparsity training only", extra=_DRY),
    "prune": Command("cut the run's sparse model by the global threshold, at each ratio", extra=_DRY),
    "repair": Command("restore the run's cut models, with no training step", extra=_DRY),
    "finetune": Command("fine-tune the run's repaired models", extra=_DRY),
    "submit": Command("all stages as a batch job of SLURM", kinds=("RunConfig", "SlurmConfig")),
    "sweep": Command(
        "a grid of lambdas, ratios and seeds, here or as jobs of SLURM",
        subject="PRESET|SWEEP",
        kinds=("RunConfig", "SweepConfig", "SlurmConfig"),
    ),
    "compare": Command(
        "runs side by side: table, figures, and which network to take", "RUN...", ("CompareConfig",), extra=()
    ),
    "inspect": Command(
        "which channels can go, and why the others stay; of a run directory also what its sparse model bears",
        "PRESET|RUN",
    ),
    "data": Command("write the images of a preset as .beton files"),
    "export": Command(
        "write a run's slim model as ONNX, pt2 or stand-alone weights", "RUN", ("ExportConfig",), extra=()
    ),
    "config": Command("print the configuration that a preset or a run, a file and flags make, as YAML", "PRESET|RUN"),
    "help": Command("what a command does, as COMMAND --help", "[COMMAND]", (), ()),
    "completion": Command("a shell's completion of all this", "bash|zsh", (), ()),
}


def columns(rows: Mapping[str, str]) -> str:
    """Names and what is said of each, in two columns, the second wrapped."""
    indent = max(map(len, rows)) + 4
    return "\n".join(
        textwrap.fill(about, _WIDTH, initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)
        for name, about in rows.items()
    )


def paragraphs(text: str, indent: str = "") -> str:
    """Text wrapped, each of its lines by itself."""
    wrapped = (
        textwrap.fill(line, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
        for line in text.splitlines()
    )
    return "\n".join(wrapped)


def list_presets() -> str:
    """The presets with the first line of what each says, for help texts."""
    return f"presets:\n{columns(presets())}"
