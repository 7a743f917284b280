"""The help of the whole command, and of one command before a preset is named."""

from netslim.launch.help.commands import COMMANDS, HELP_ALL, columns, list_presets, paragraphs


def overview() -> str:
    """What ``netslim --help`` prints."""
    commands = columns({f"{name} {command.subject}": command.about for name, command in COMMANDS.items()})
    more = f"netslim COMMAND PRESET --help lists the fields that are set most often, {HELP_ALL} all of them."
    usage = "usage: netslim COMMAND SUBJECT [flags]\n       netslim --version"
    return f"{usage}\n\ncommands:\n{commands}\n\n{list_presets()}\n\n{paragraphs(more)}"


def help_of(name: str) -> str:
    """What ``netslim NAME --help`` prints."""
    command = COMMANDS[name]
    parts = [f"usage: netslim {name} {command.subject}{' [flags]' * bool(command.kinds)}", paragraphs(command.about)]
    if "PRESET" in command.subject:
        more = f"netslim {name} PRESET --help lists the fields that are set most often, {HELP_ALL} all of them."
        parts += [list_presets(), paragraphs(more)]
    return "\n\n".join(parts)
