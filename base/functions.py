"""Functions by name, as "module:function"; what is said where calling one fails."""

import sys


def split_function(name: str) -> tuple[str, str]:
    """Split "module:function" into its two parts; ValueError unless they could name a function that is not Python's."""
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise ValueError(f"{name!r} names no function; write module:function, as in mypkg.nets:build")
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{name}: {module} is a module of Python's own; give yours another name")
    return module, function


def said(error: BaseException) -> str:
    """An error of somebody else's code in one line, its type first."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
