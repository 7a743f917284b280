"""A shell's completion of commands, presets, flags and their values: words in a script, so that no key waits for us."""

from collections.abc import Iterable

from netslim.launch.help.commands import COMMANDS, HELP, Command
from netslim.launch.help.source import Field, fields_of, presets

SHELLS = ("bash", "zsh")
_FUNCTION = """# netslim's completion for {shell}; in its start-up file: eval "$(netslim completion {shell})"
{setup}_netslim() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        words="{commands}"
    elif [[ $word == -* ]]; then
        case $command in
{flags}
        esac
    else
        case $command:$before in
{values}
        esac
        if [[ -z $words ]] && ((COMP_CWORD == 2)); then
            case $command in
{subjects}
            esac
        fi
    fi
    [[ -z $words ]] || COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o bashdefault -o default -F _netslim netslim"""


def script(shell: str) -> str:
    """The completion for one of the `SHELLS`; raises ValueError for another."""
    if shell not in SHELLS:
        raise ValueError(f"there is completion for {' and '.join(SHELLS)}, not for {shell!r}; netslim completion bash")
    kinds = {kind: fields_of(kind) for command in COMMANDS.values() for kind in command.kinds}
    return _FUNCTION.format(
        shell=shell,
        setup="autoload -U +X bashcompinit && bashcompinit\n" * (shell == "zsh"),
        commands=" ".join([*COMMANDS, "--help", "--version"]),
        flags=_cases(" " * 12, ((name, _flags(command, kinds)) for name, command in COMMANDS.items())),
        values=_cases(" " * 12, _values(kinds)),
        subjects=_cases(" " * 16, ((name, _subjects(command)) for name, command in COMMANDS.items())),
    )


def _cases(indent: str, words: Iterable[tuple[str, Iterable[str]]]) -> str:
    """Branches of a shell's case, those of the same words as one."""
    names: dict[str, list[str]] = {}
    for name, choices in words:
        if joined := " ".join(choices):
            names.setdefault(joined, []).append(name)
    return "\n".join(f'{indent}{"|".join(each)}) words="{joined}" ;;' for joined, each in names.items())


def _flags(command: Command, kinds: dict[str, list[Field]]) -> list[str]:
    own = (flag for kind in command.kinds for field in kinds[kind] for flag in field.flags)
    return [*dict.fromkeys(own), *command.extra, HELP[1]]


def _values(kinds: dict[str, list[Field]]) -> list[tuple[str, tuple[str, ...]]]:
    """The values of each flag that has some; of one that has others in another command, for each command by itself."""
    found: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for name, command in COMMANDS.items():
        for field in (field for kind in command.kinds for field in kinds[kind]):
            found.setdefault(field.flag, {}).setdefault(field.choices, []).append(name)
    return [
        (pattern, choices)
        for flag, by_choices in found.items()
        for choices, names in by_choices.items()
        for pattern in ([f"*:{flag}"] if len(by_choices) == 1 else [f"{name}:{flag}" for name in names])
    ]


def _subjects(command: Command) -> list[str]:
    if "PRESET" in command.subject:
        return list(presets())
    return {"[COMMAND]": list(COMMANDS), "|".join(SHELLS): list(SHELLS)}.get(command.subject, [])
