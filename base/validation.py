"""What pydantic found, in one line."""

from functools import wraps
from reprlib import repr as short
from typing import Any, TypeVar

from pydantic import ValidationError

Made = TypeVar("Made")
_LACKS = {"missing": "is missing", "unexpected_keyword_argument": "is no field of it"}


def complaint(error: ValidationError) -> str:
    """The first complaint: the field by its dotted name, its value and the rule; our own words as they are."""
    first = error.errors(include_url=False)[0]
    place, said = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if not place or first["type"] == "value_error":
        return said
    lack = _LACKS.get(first["type"])
    return f"{place} {lack}" if lack else f"{place} is {short(first['input'])}: {said[0].lower()}{said[1:]}"


def plainly(kind: type[Made]) -> type[Made]:
    """Have a pydantic dataclass refuse what it is called with by a ValueError of one line, its class first."""
    validated: Any = kind.__init__

    @wraps(validated)
    def init(self: Made, *values: Any, **named: Any) -> None:
        try:
            validated(self, *values, **named)
        except ValidationError as error:
            raise ValueError(f"{kind.__name__}: {complaint(error)}") from None

    kind.__init__ = init  # type: ignore[assignment, method-assign]
    return kind
