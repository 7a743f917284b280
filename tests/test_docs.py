"""The pages can be trusted: their commands are carried out, and links, paths, flags and cited figures are right.

A command in a fenced block is picked up by itself. It is carried out in this process, in a directory of the block's
own, whose name has a space and an umlaut, and after the lines before it, shortened by `SHORT`: a few small images in
the place of a data root that is not here, one epoch, a small network, one process. What is not run is in `INSTEAD`,
with the reason and with what is looked at instead; a command that is in neither fails. Python blocks are run too, with
the names of `prelude`.
"""

import configparser
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from PIL import Image

from netslim.launch.cli import COMMANDS, dispatch
from netslim.launch.mistakes import guarded
from netslim.launch.presets import PRESETS
from netslim.prune import latency
from netslim.train.models import build_network

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

SHORT = """--data.source folder --data.root ~/images --data.no-download --data.size 16 --data.batch-size 16
    --data.loader torch --data.num-workers 0 --sparsify.epochs 1 --finetune.epochs 1
    --repair.images 32 --repair.steps recalibrate --record.wandb disabled
    --cpu --num-processes 1 --max-restarts 0 --engine.zero 0 --engine.precision no
    --engine.no-compile"""
"""Of every command that trains or cuts."""
NETWORK = "--model.name vgg11 --model.width 0.0625"
"""Where a command does not say --model."""
RATIO = "--prune.ratio 0.5"
GRID = "--weights 1e-4 --ratios 0.5"
"""Of a sweep on this machine, in the place of the ratio."""
TRIED = "--inspect.ratios 0.5"
"""Of `netslim inspect RUN`."""
SMALLER = (
    'function="torchvision.models:get_model", name="resnet18"',
    'function="netslim.train.models:build_network", name="vgg11", width=0.0625',
)
"""What is replaced by what in python: there the network is that of `prelude`."""
OF_SBATCH = {"--time", "--partition", "--account", "--qos"}
"""Flags on the pages that are not netslim's."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def file(self) -> str:
        """Where its text belongs, by its first line, `# mypkg/nets.py`; empty where that names no file."""
        named = re.match(r"# ([\w./-]+\.\w+)\n", self.text)
        return named.group(1) if named else ""

    @property
    def commands(self) -> list[str]:
        """What is typed: in a block of `sh` every line, in one of no language those that begin with a known program."""
        if self.language in ("python", "yaml", "json"):
            return []
        programs = {name.split()[0] for name in (*CARRIED_OUT, *INSTEAD)}
        lines = [line.strip() for line in self.text.replace("\\\n", " ").splitlines()]
        typed = [line for line in lines if line and not line.startswith("#")]
        return [line for line in typed if self.language == "sh" or line.split()[0] in programs]


def blocks_of(page: Path, text: str) -> list[Block]:
    """The fenced blocks of a page's text."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text.count("\n", 0, each.start()) + 1, each.group(1), each.group(2)) for each in found]


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def codes_of(page: Path) -> list[str]:
    """What is set as code in a page's prose."""
    return [" ".join(code.replace("\\|", "|").split()) for code in re.findall(r"`([^`]+)`", prose_of(page))]


def words_of(text: str) -> list[str]:
    """The words of a command line, without its comment, as a shell would hand them on."""
    return [os.path.expanduser(word) for word in shlex.split(text, comments=True)]


def called(body: Callable[[], int | None]) -> int | str | None:
    """The exit code of what may also end by SystemExit."""
    try:
        return guarded(body)
    except SystemExit as stop:
        return stop.code or 0


class Shell:
    """Carries out the commands of a block in the current directory."""

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        """Where the runs are that only have to be there."""

    def carry_out(self, command: str) -> None:
        words = words_of(command)
        for name, method in CARRIED_OUT.items():
            if words[: len(name.split())] == name.split():
                method(self, words)
                return
        for name, (_, look) in INSTEAD.items():
            if command.startswith(name):
                look(words)
                return
        pytest.fail(f"nothing here carries out `{command}`; where it cannot be run, list it in INSTEAD with the reason")

    def netslim(self, words: Sequence[str]) -> None:
        command, *rest = words[1:]
        arguments = [command, *rest, *words_of(self.shortened(command, rest))]
        assert called(lambda: dispatch(arguments)) == 0, shlex.join(arguments)

    def shortened(self, command: str, rest: Sequence[str]) -> str:
        """What is added to a command, so that it takes a second or two; ``rest`` are its words after the first."""
        subjects = [word for before, word in zip(["", *rest], rest, strict=False) if before != "--run-dir"]
        runs = {"/".join(word.split("/")[:2]) for word in subjects if word.startswith("runs/")}
        for run in runs:
            self.provide(Path(run))
        if command in ("submit", "compare", "export") or {"--slurm", "--help"} & set(rest):
            return ""
        if runs:
            return TRIED if command == "inspect" else ""
        return " ".join([SHORT, GRID if command == "sweep" else RATIO, NETWORK * ("--model" not in rest)])

    def provide(self, run: Path) -> None:
        """Have a run where a command reads it: a copy of the one that all blocks share."""
        if run.exists():
            return
        if not (self.shared / run).exists():
            preset = run.name.removesuffix("-sweep")
            with contextlib.chdir(self.shared):
                self.netslim(["netslim", "run" if preset == run.name else "sweep", preset])
        shutil.copytree(self.shared / run, run)

    def accelerate(self, words: Sequence[str]) -> None:
        """The launcher's own flags are read as it reads them; then its program runs here, as the only process."""
        launched = launch_command_parser().parse_args([*words[2:], *words_of(f"{SHORT} {RATIO} {NETWORK}")])
        if launched.config_file:
            load_config_from_file(str(ROOT / launched.config_file))
        program = find_spec(launched.training_script)
        assert launched.module
        assert program is not None
        assert program.origin is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [program.origin, *launched.training_script_args])
            patch.delenv("NETSLIM_STAGES", raising=False)
            with pytest.raises(SystemExit) as stop:
                runpy.run_path(program.origin, run_name="__main__")
        assert not stop.value.code, shlex.join(words)


def look_for_target(words: Sequence[str]) -> None:
    """Ask make, which would say that it knows of no such target."""
    asked = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr


def look_for_extras(words: Sequence[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (named,) = re.findall(r"\[(.+)\]", words[-1])
    assert set(named.split(",")) <= set(setup["options.extras_require"])


def look_for_subcommand(words: Sequence[str]) -> None:
    from wandb.cli import cli

    assert words[1] in cli.cli.commands
    if words[1] == "sweep":
        look_for_file(words)


def look_for_file(words: Sequence[str]) -> None:
    path = next(ROOT / word for word in words if "/" in word)
    assert path.is_file(), path


def look_for_events(words: Sequence[str]) -> None:
    assert len(list(Path(words[-1]).glob("*/tensorboard/events.*"))) == 4, "of each stage"


def look_at_script(words: Sequence[str]) -> None:
    look_for_file(words)
    subprocess.run(["bash", "-n", ROOT / words[-1]], check=True)


CARRIED_OUT: dict[str, Callable[[Shell, Sequence[str]], None]] = {
    "netslim": Shell.netslim,
    "accelerate launch": Shell.accelerate,
}
INSTEAD: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "make": ("installs, tests or measures, for minutes and hours; `make fresh` runs the README's two", look_for_target),
    "pip install": ("installs", look_for_extras),
    "python tests/bench/": ("measures, for minutes", look_for_file),
    "sbatch": ("needs SLURM, on which tests/test_launch_slurm.py runs such scripts", look_at_script),
    "tensorboard": ("shows pages until it is stopped", look_for_events),
    "wandb": ("needs W&B's server; tests/test_launch_wandb.py has a stand-in and an agent", look_for_subcommand),
}
"""By the words that a command begins with: why it is not run here, and what is looked at instead."""

AWKWARD = "Jörgs Netze"
"""The name of the folder that commands are carried out in, and of the home directory."""
BLOCKS = [block for page in PAGES for block in blocks_of(page, page.read_text(encoding="utf-8"))]
SBATCH = '#!/bin/bash\nbash -n "${@: -1}" || exit 1\necho $$\n'
"""A stand-in that wants a script which a shell can read, and says a number."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory: images in two classes, some of SLURM's programs, and the runs that blocks share."""
    directory = tmp_path_factory.mktemp("home") / AWKWARD
    directory.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 8)):
        for name in ("cat", "dog"):
            (directory / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8))
                image.save(directory / "images" / split / name / f"{number}.png")
    (directory / "bin").mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": "#!/bin/sh\n", "scontrol": "#!/bin/sh\n"}.items():
        (directory / "bin" / name).write_text(text)
        (directory / "bin" / name).chmod(0o755)
    (directory / "shared").mkdir()
    return directory


@pytest.fixture
def shell(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    """A new directory, with the files that blocks of the pages are the text of."""
    directory = tmp_path / AWKWARD
    directory.mkdir()
    for block in BLOCKS:
        if block.file:
            (directory / block.file).parent.mkdir(parents=True, exist_ok=True)
            (directory / block.file).write_text(block.text)
    monkeypatch.chdir(directory)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    # latency is measured by as few calls as can be
    monkeypatch.setattr(
        sys.modules[latency.__module__], "_repeat", lambda call, _, count: [call() for _ in range(count)]
    )
    # processes that are started find what this one does, from another directory too
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    with unchanged():
        yield Shell(home / "shared")
    for name in [name for name in sys.modules if name.split(".")[0] == "mypkg"]:
        del sys.modules[name]


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Have the environment and what signals do be afterwards as they were: a command may end with its process."""
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.commands], ids=str)
def test_the_commands_of_a_block_do_their_work_one_after_the_other(block: Block, shell: Shell) -> None:
    for command in block.commands:
        shell.carry_out(command)


def prelude() -> dict[str, Any]:
    """What python on the pages takes for granted: a network, its optimizer, images and labels."""

    def my_build_function() -> torch.nn.Module:
        return build_network("vgg11", num_classes=10, width=0.0625)

    torch.manual_seed(0)
    model = my_build_function()
    images, labels = torch.randn(128, 3, 32, 32), torch.arange(128) % 10
    example = images[:2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    return locals()


@pytest.mark.parametrize("page", dict.fromkeys(b.page for b in BLOCKS if b.language == "python"), ids=lambda p: p.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, shell: Shell) -> None:
    names = prelude()
    for block in BLOCKS:
        if (block.page, block.language) == (page, "python") and not block.file:  # which stands by itself
            exec(compile(block.text.replace(*SMALLER), str(block), "exec"), names)


@pytest.mark.parametrize("num_processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_script_of_a_loop_of_ones_own_slims_digits(num_processes: int, shell: Shell) -> None:
    script = Path("slim_digits.py")
    command = [sys.executable, script]
    if num_processes > 1:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        others = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        command = [*launcher, "--num_processes", str(num_processes), *others, script]
    else:  # that it runs: how well is seen below
        script.write_text(script.read_text().replace("SPARSE, FINETUNE = 9, 4", "SPARSE, FINETUNE = 2, 1"))
    done = subprocess.run(
        command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^([a-z-]+): ([\d.]+)%, ([\d,]+) parameters$", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in found] == ["sparse", "cut", "repaired", "fine-tuned"]
    before, *after = (int(size.replace(",", "")) for _, _, size in found)
    assert all(size < before / 2 for size in after)
    if num_processes > 1:
        assert float(found[-1][1]) > 90


def test_a_new_command_is_picked_up_and_one_that_nothing_carries_out_fails() -> None:
    typed = "# first\nnetslim run digits \\\n    --seed 3    # a comment\ntorchrun x\n"
    first, second = blocks_of(Path("page.md"), f"```sh\n{typed}```\n\n```\nstage\nmake demo\n```\n")
    assert [words_of(command) for command in first.commands] == [
        ["netslim", "run", "digits", "--seed", "3"],
        ["torchrun", "x"],
    ]
    assert second.commands == ["make demo"]
    with pytest.raises(pytest.fail.Exception, match="nothing here carries out `torchrun x`"):
        Shell(Path()).carry_out(first.commands[-1])


def anchors_of(page: Path) -> set[str]:
    """What links into a page may name: its headings, as GitHub spells them, and its own anchors."""
    text = prose_of(page)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings} | set(
        re.findall(r'<a id="(.+?)">', text)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), target
            assert not anchor or anchor in anchors_of(path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_of_the_repository_on_a_page_exists(page: Path) -> None:
    roots = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name not in ("runs", "build"))
    for code in codes_of(page):
        is_pattern = re.search(r"[<>\s]|[A-Z]{4}", code)  # train/CLASS/*, tests/test_<room>.py
        if not is_pattern and (code.startswith(roots) or code in ("setup.cfg", "Makefile", "pyproject.toml")):
            assert list(ROOT.glob(code.rstrip("/"))), code


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag that a command's help lists."""
    helps = ([], ["run", "digits", "--help-all"], ["submit"], ["sweep"], ["compare"], ["export"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for command in helps:
            asks = command if "--help-all" in command else [*command, "--help"]
            called(lambda asks=asks: dispatch(asks))  # type: ignore[misc]
    return {"--config", "--model", *OF_SBATCH, *re.findall(r"--[a-z][\w.-]*", said.getvalue())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_and_command_that_a_page_speaks_of_is_there(page: Path, flags: set[str]) -> None:
    for code in codes_of(page):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\*?", code) if code.startswith(("--", "netslim ")) else []:
            found = (
                [each for each in flags if each.startswith(flag.rstrip("*"))] if flag.endswith("*") else flag in flags
            )
            assert found, code
        if named := re.match(r"netslim ([a-z]+)", code):
            assert named.group(1) in COMMANDS, code


def test_the_readme_has_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_page_is_in_the_readmes_list_of_links() -> None:
    linked = set(re.findall(r"\]\((docs/[\w.-]+)\)", prose_of(ROOT / "README.md")))
    assert linked == {f"docs/{page.name}" for kind in ("md", "ipynb") for page in (ROOT / "docs").glob(f"*.{kind}")}


def section(page: str, title: str) -> str:
    """What stands under a heading of a page in docs."""
    return re.split(
        r"^## ", prose_of(ROOT / "docs" / page).partition(f"## {title}\n")[2], maxsplit=1, flags=re.MULTILINE
    )[0]


def test_the_table_of_presets_is_what_the_presets_are() -> None:
    table = re.findall(
        r"^\| `([\w-]+)` \| (.+) \| (\w+) \| (.+) \| (.+) \|$", section("configuration.md", "Presets"), re.MULTILINE
    )
    made = []
    for name, make in PRESETS.items():
        run = make()
        width = f", width {run.model.width:g}" if run.model.width != 1 else ""
        ratios = ", ".join(f"{ratio:g}" for ratio in run.prune.ratio)
        made.append((name, f"{run.model.name}{width}", run.data.source, f"{run.sparsity.weight:g}", ratios))
    assert table == made


def test_the_share_of_time_that_the_readme_cites_is_what_the_benchmark_came_to() -> None:
    figures = json.loads((ROOT / "docs" / "performance" / "bench_end_to_end.json").read_text(encoding="utf-8"))
    (share,) = re.findall(r"took (\w+) tenths of the time", " ".join(prose_of(ROOT / "README.md").split()))
    came_to = {each["name"]: each["value"] for each in figures["headlines"]}
    tenths = round(10 * came_to["netslim, in flight / plain script, seconds"])
    assert {5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}[tenths] == share
