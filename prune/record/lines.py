"""Lines of the network's own code, for reasons and errors: file:line."""

from __future__ import annotations

import os
import sys
from functools import cache
from types import CodeType, FrameType

import torch


def line_of_user() -> str:
    """Name the line of code outside torch that is being executed in the network's forward: file:line."""
    frame: FrameType | None = sys._getframe(1)
    found = ""
    while frame is not None and not _is_run(frame.f_code):
        if _is_users(frame.f_code):
            found = found or _line(frame.f_code, frame.f_lineno)
            if not _is_librarys(frame.f_code):
                return _line(frame.f_code, frame.f_lineno)
        frame = frame.f_back
    return found


def line_of_traceback(error: BaseException) -> str:
    """Name the innermost line of the code outside torch that an error went through."""
    found, step = "", error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if _is_users(code):
            found = _line(code, step.tb_lineno)
        step = step.tb_next
    return found


_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # labels are followed meanwhile


_RECORDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "recorder.py")


@cache
def _is_run(code: CodeType) -> bool:
    """Tell whether this is where a network's run began: what called it is no part of the network."""
    return code.co_name == "run" and code.co_filename == _RECORDER


@cache
def _is_users(code: CodeType) -> bool:
    return not code.co_filename.startswith((_TORCH, _HERE, "<"))


@cache
def _is_librarys(code: CodeType) -> bool:
    return any(f"{os.sep}{root}{os.sep}" in code.co_filename for root in _PACKAGES)


_PACKAGES = ("site-packages", "dist-packages")


def _line(code: CodeType, number: int) -> str:
    return f"{_cell(code.co_filename) or _short(code.co_filename)}:{number}"


def _cell(path: str) -> str:
    """Name the cell of a notebook that is kept in this file, as in `In[3]`; empty where it is none."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    name_of = getattr(getattr(shell, "compile", None), "format_code_name", None)  # since IPython 8
    kind, name = (name_of and name_of(path)) or ("", "")
    return str(name) if kind == "Cell" else ""


@cache
def _short(path: str) -> str:
    """Cut a path of a file down to what tells it from others: below the working directory, or the packages'."""
    for root in _PACKAGES:
        _, found, rest = path.rpartition(os.sep + root + os.sep)
        if found:
            return rest
    here = os.getcwd() + os.sep
    return path.removeprefix(here) if path.startswith(here) else os.path.join(*path.split(os.sep)[-2:])
