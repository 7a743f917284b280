"""What pydantic found, in one line."""

from pydantic import ValidationError


def complaint(error: ValidationError) -> str:
    """The first complaint, after the dotted name of the field where there is one."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])
