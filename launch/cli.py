"""The command ``netslim``: which command is meant, and at once what can be said without torch, whose import takes
seconds."""

import os
import sys
from collections.abc import Sequence

from netslim import __version__
from netslim.launch.help import COMMANDS, HELP, check_command, check_target, help_of, overview, script
from netslim.launch.mistakes import LOST_RANK, UNREAD, end_at_once, guarded

__all__ = ["COMMANDS", "dispatch", "main"]

_WITH_OWN_HELP = ("export", "submit", "sweep", "compare")


def main() -> int:
    """The console script, and ``python -m netslim``."""
    code = guarded(_dispatch_and_flush, rank=0)  # also under a launcher, whose processes it does not join
    if code == LOST_RANK:
        end_at_once(code)
    return code


def _dispatch_and_flush() -> int:
    try:
        code = dispatch(sys.argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read this has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD


def dispatch(arguments: Sequence[str]) -> int:
    """Carry out one command line; raises ValueError or OSError for a mistake in it."""
    name, *rest = arguments or HELP
    if name in HELP:
        print(overview())
        return 0
    if name == "--version":
        print(f"netslim {__version__}")
        return 0
    command = check_command(name)
    if name == "help":
        return dispatch([*(each for each in rest if each not in HELP), HELP[1]])
    asks_for_help = not rest or rest[0] in HELP
    if asks_for_help and name not in _WITH_OWN_HELP:
        print(help_of(name))
        return 0
    if name == "completion":
        print(script(rest[0]))
        return 0
    if not asks_for_help and not rest[0].startswith("-"):
        check_target(name, rest[0])
    from netslim.launch.commands import carry_out  # here: with it comes torch

    return carry_out(name, command.about, rest)
