"""`netslim inspect RUN`: what a sparse model bears, told before anything is cut for good."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import Disk
from PIL import Image
from test_launch_cli import Netslim, assert_one_line, smallest
from whole_run import SCRIPT, call

from netslim.launch.cli import dispatch
from netslim.launch.inspect.sparse import format_inspection, largest_ratio
from netslim.launch.mistakes import guarded

RATIOS = ("--inspect.ratios", 0.3, 0.5, 0.99)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Path:
    directory = tmp_path_factory.mktemp("inspected") / "run"
    # a loader that compiles would do so for each command
    loader = ["--data.loader", "torch", "--data.num-workers", 0]
    flags = [str(flag) for flag in [*smallest(directory, data_cache), *loader]]
    for command in ("sparsify", "prune", "repair"):
        assert dispatch([command, *flags, "--prune.ratio", "0.5"]) == 0
    return directory


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def inspection(run: Path) -> dict:
    return json.loads((run / "inspect.json").read_text())


def test_it_says_what_the_run_itself_comes_to_and_marks_the_largest_ratio_within_the_loss(
    run: Path, netslim: Netslim, capfd: pytest.CaptureFixture[str]
) -> None:
    assert dispatch([str(part) for part in ("inspect", run, *RATIOS, "--inspect.loss", 0.9)]) == 0
    printed = capfd.readouterr().out
    (marked,) = [line for line in printed.splitlines() if "the largest that loses at most 90.00%" in line]
    assert marked.split()[0] == "0.5"
    assert "pull " in printed
    low, middle, high = inspection(run)["ratios"]
    assert [row["ratio"] for row in (low, middle, high)] == [0.3, 0.5, 0.99]
    for stage, key in (("prune-0.50", "cut"), ("repair-0.50", "repaired")):
        metrics = json.loads((run / stage / "metrics.json").read_text())
        assert (middle[key], middle["params"], middle["macs"]) == tuple(
            metrics[name] for name in ("accuracy", "params", "macs")
        )
    assert low["params"] > middle["params"]
    assert "the largest ratio possible" in high["refused"]
    threshold = json.loads((run / "prune-0.50" / "metrics.json").read_text())["threshold"]
    assert (inspection(run)["ratio"], inspection(run)["threshold"]) == (0.5, threshold)
    assert printed.splitlines()[-1] == f"{run}/inspect.png"
    with Image.open(run / "inspect.png") as picture:
        assert len(picture.convert("RGB").resize((200, 80)).getcolors(16000)) > 100  # something is drawn
    assert not (run / "prune-0.30").exists()


def test_a_terminal_that_knows_ascii_alone_is_shown_the_same(
    run: Path, monkeypatch: pytest.MonkeyPatch, data_cache: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    named = run.rename(run.with_name("größe"))
    words = ["inspect", str(named), "--inspect.ratios", "0.5"]
    assert guarded(lambda: dispatch(words)) == 0
    terminal.flush()
    printed = terminal.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    layers = inspection(named)["layers"]
    assert [sum(bar != " " for bar in line.split("%")[-1]) for line in gamma_lines(printed, layers)] == [
        sum(count > 0 for count in layer["histogram"]) for layer in layers
    ]
    assert printed.splitlines()[-1].endswith("/gr\\xf6\\xdfe/inspect.png")


def test_a_run_on_a_disk_that_cannot_be_written_is_inspected_and_compared_all_the_same(
    finished: Path, disk: Disk, tmp_path: Path, netslim: Netslim, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, disk.path / "run"))
    (run / "failed").write_text("its last attempt left a word\n")
    disk.mount("remount,ro")
    code, error = netslim("inspect", run, "--inspect.ratios", 0.5)
    assert code == 0
    assert_one_line(error, f"{run} cannot be written", "inspect.json and inspect.png are not kept", "--out")
    code, error = netslim("inspect", run, "--inspect.ratios", 0.5, "--out", tmp_path / "found")
    assert (code, error) == (0, "")
    assert [row["ratio"] for row in inspection(tmp_path / "found")["ratios"]] == [0.5]
    assert (tmp_path / "found" / "inspect.png").is_file()
    code, error = netslim("inspect", run, "--out", run / "found")
    assert code == 2
    assert_one_line(error, f"{run / 'found'} cannot be written (Read-only file system)", "--out")
    code, error = netslim("compare", run)
    assert code == 0
    assert error.splitlines()[-1] == (
        f"netslim: warning: the page is not written: {run} cannot be written (Read-only file system); "
        "name another folder with --out"
    )
    code, error = netslim("compare", run, "--out", tmp_path / "page.html")
    assert code == 0
    assert (tmp_path / "page.html").is_file()
    code, error = netslim("inspect", run, "--model.width", 0.5)
    assert code == 2
    assert_one_line(error, "was made with another configuration: model.width")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root may give up its rights")
def test_a_run_of_somebody_else_is_compared_and_nothing_is_made_in_it(run: Path) -> None:
    """As root without the right to pass over permissions, which is what everybody else is."""
    for path in (run, *run.rglob("*")):
        os.chown(path, 12345, 12345)
    stranger = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    before = sorted(run.rglob("*"))
    done = call(*stranger, SCRIPT, "compare", run, "--format", "csv")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"netslim: warning: the page is not written: {run} cannot be written (Permission denied)"
    )
    done = call(
        *stranger, SCRIPT, "sparsify", *smallest(run, run / "cache"), "--data.loader", "torch", "--data.num-workers", 0
    )
    assert done.returncode == 2
    assert_one_line(done.stderr, f"{run} cannot be written (Permission denied)", "--run-dir")
    assert sorted(run.rglob("*")) == before


def gamma_lines(printed: str, layers: list[dict]) -> list[str]:
    """Those of the table of gammas, each with its bars at the end."""
    names = [layer["layer"] for layer in layers]
    return [line for line in printed.splitlines() if line.split()[:1] and line.split()[0] in names and "%" in line]


@pytest.mark.slow
def test_the_ratios_are_shared_among_processes(run: Path, netslim: Netslim) -> None:
    assert netslim("inspect", run, *RATIOS)[0] == 0
    alone = inspection(run)
    assert netslim("inspect", run, *RATIOS, "--num-processes", 2)[0] == 0
    assert inspection(run) == alone


ROWS = [{"ratio": 0.3, "cut": 0.1, "repaired": 0.9}, {"ratio": 0.5, "cut": 0.1, "repaired": 0.85}]
ROWS += [{"ratio": 0.7, "cut": 0.1, "repaired": 0.895}, {"ratio": 0.9, "refused": "why"}]


@pytest.mark.parametrize(("loss", "best"), [(0.0, None), (0.01, 0.3), (0.02, 0.7), (0.1, 0.7)])
def test_the_largest_ratio_is_the_last_that_loses_no_more_than_allowed(loss: float, best: float | None) -> None:
    assert largest_ratio({"accuracy": 0.91, "ratios": ROWS}, loss) == best


def test_layers_that_the_threshold_would_empty_are_named() -> None:
    layers = [
        {"layer": name, "channels": 4, "removable": 4, "num_below": num, "below_threshold": num / 4}
        | {"smallest": 0.1, "median": 0.1, "largest": 0.2, "below_1e-2": 0.0, "below_1e-3": 0.0, "histogram": [0, 4]}
        for name, num in (("a", 2), ("b", 4))
    ]
    rows = [{"ratio": 0.5, "cut": 0.1, "repaired": 0.2, "params": 1, "macs": 1}]
    found = {"accuracy": 0.9, "params": 2, "macs": 2, "pull": "", "ratio": 0.5, "layers": layers, "ratios": rows}
    found["threshold"] = 0.1
    text = format_inspection(found, 0.01)
    assert "threshold of ratio 0.5: |gamma| 0.1, which takes 6 of 8 channels" in text
    assert "the threshold of ratio 0.5 would empty b; floors hold them" in text
    assert "no ratio loses at most 1.00%" in text


def test_a_stage_is_no_run_to_inspect(run: Path, netslim: Netslim) -> None:
    code, error = netslim("inspect", run / "sparse")
    assert code == 2
    assert_one_line(error, "names no preset; name a run directory, not one of its stages")
