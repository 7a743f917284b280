"""The short help of a command with its preset: the fields that are set most often, with their present values."""

from collections.abc import Mapping
from typing import Any

from netslim.launch.help.commands import COMMANDS, DRY_RUN, HELP_ALL, paragraphs
from netslim.launch.help.source import Field, fields_of

_OFTEN = (
    "data.source",
    "data.root",
    "data.size",
    "data.batch_size",
    "model.name",
    "model.width",
    "model.weights",
    "sparsify.epochs",
    "sparsify.lr",
    "sparsity.weight",
    "sparsity.method",
    "prune.ratio",
    "prune.coupling",
    "finetune.epochs",
    "finetune.lr",
    "engine.precision",
    "record.wandb",
    "seed",
    "cpu",
    "num_processes",
    "run_dir",
)
_OWN = {
    "--config FILE": "A file of fields, JSON or YAML, read before the flags.",
    "--model NAME": "Short for --model.name NAME --model.width 1.",
    DRY_RUN: "Say what would be done, cut and needed, as a file for --config; do nothing.",
    HELP_ALL: "All fields: {count} of them.",
}


def short_help(usage: str, about: str, values: Mapping[str, Any]) -> str:
    """The help of a command whose configuration has these values, as JSON has them; 80 columns wide."""
    every = {field.name: field for field in fields_of("RunConfig")}
    command = COMMANDS.get(usage.split()[1])
    own = {name: text.format(count=len(every)) for name, text in _OWN.items()}
    if command is None or DRY_RUN not in command.extra:
        del own[DRY_RUN]
    shown = {_usage(every[name]): f"{every[name].about} (default: {_value(values, name)})" for name in _OFTEN}
    entries = "\n".join(
        f"  {name}\n{paragraphs(' '.join(text.split()), ' ' * 8)}" for name, text in (own | shown).items()
    )
    return f"usage: {usage} [flags]\n\n{paragraphs(about)}\n\nfields that are set most often:\n{entries}"


def _usage(field: Field) -> str:
    if field.is_switch:
        return ", ".join(field.flags)
    return f"{field.flag} {'|'.join(field.choices) or field.name.rpartition('.')[2].upper()}"


def _value(values: Mapping[str, Any], name: str) -> str:
    found: Any = values
    for part in name.split("."):
        found = found[part]
    return " ".join(map(str, found)) if isinstance(found, list | tuple) else str(found)
