"""DeepSpeed compiles on the CPU: it finds the tools of its own environment, and what is missing is said at once."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from netslim.train import EngineConfig, Runtime, check_devices
from netslim.train.ranks import engine

ZERO = EngineConfig(zero=2)
Install = Callable[[str, str], Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Give a CPU machine without any program, and a function that puts one into a folder: "own" has the interpreter,
    "system" is on PATH."""

    def put(folder: str, program: str) -> Path:
        path = tmp_path / folder / program
        path.touch(mode=0o755)
        return path

    for folder in ("own", "system"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "executable", str(put("own", "python")))
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    for name in ("CXX", "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # so that what a test changes is undone
        monkeypatch.delenv(name)
    return put


@pytest.mark.parametrize("places", [["own"], ["system", "own"]])
def test_deepspeed_finds_the_ninja_beside_an_interpreter_whose_environment_is_not_activated(
    places: list[str], install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    ninjas, found = [install(folder, "ninja") for folder in places], []
    install("system", "c++")

    def plugin(**_: object) -> None:
        found.append(shutil.which("ninja"))
        raise ImportError("seen enough")

    monkeypatch.setattr(engine, "DeepSpeedPlugin", plugin)
    with pytest.raises(ValueError, match=r"engine\.zero needs DeepSpeed"):
        Runtime(ZERO, seed=0)
    assert found == [str(ninjas[0])]  # one of the system's comes first


@pytest.mark.parametrize(
    ("there", "missing"), [(["c++"], "ninja.*pip install"), (["ninja"], r"C\+\+ compiler.*install g\+\+")]
)
def test_zero_on_the_cpu_says_in_one_line_what_it_cannot_compile_without(
    there: list[str], missing: str, install: Install
) -> None:
    for program in there:
        install("system", program)
    with pytest.raises(ValueError, match=missing) as caught:
        check_devices(ZERO, 1)
    assert "\n" not in str(caught.value)
    check_devices(EngineConfig(), 1)  # DDP compiles nothing


def test_a_compiler_that_cxx_names_will_do_and_one_that_is_not_there_will_not(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("system", "ninja")
    install("system", "clang++")
    monkeypatch.setenv("CXX", "clang++ -g")
    check_devices(ZERO, 1)
    monkeypatch.setenv("CXX", "nowhere/c++")
    with pytest.raises(ValueError, match=f"nowhere{os.sep}c"):
        check_devices(ZERO, 1)
