"""Whether tensors are those of a network, by their names and shapes alone."""

from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]


def misfits(want: Shapes, have: Shapes) -> str:
    """What is missing, unexpected or of another shape: how many, and the first three by name; empty where all fit."""
    faults = {
        "missing": [name for name in want if name not in have],
        "unexpected": [name for name in have if name not in want],
        "of another shape": [
            f"{name} {have[name]} instead of {want[name]}" for name in want if name in have and have[name] != want[name]
        ],
    }
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for what, names in faults.items()
        if names
    )
