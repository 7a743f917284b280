"""What the command can say of itself at once: its help, its words for a shell's completion, and what is a wrong word.

Words of a command line come in, text or a ValueError comes out. Presets and fields are read from their sources, for
importing them takes torch, and seconds; nothing else of netslim is known here.
"""

from netslim.launch.help.commands import COMMANDS, DRY_RUN, HELP, HELP_ALL, Command, list_presets
from netslim.launch.help.completion import SHELLS, script
from netslim.launch.help.short import short_help
from netslim.launch.help.source import Field, fields_of, presets
from netslim.launch.help.targets import check_command, check_target, known_runs, nearest_preset
from netslim.launch.help.texts import help_of, overview

__all__ = [
    "COMMANDS",
    "DRY_RUN",
    "HELP",
    "HELP_ALL",
    "SHELLS",
    "Command",
    "Field",
    "check_command",
    "check_target",
    "fields_of",
    "help_of",
    "known_runs",
    "list_presets",
    "nearest_preset",
    "overview",
    "presets",
    "script",
    "short_help",
]
