"""The page of benchmarks is made of their figures alone."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))  # whose files are programs that import each other

import performance
from results import Results


def leave_figures(file: Path, title: str = "Pruning") -> Results:
    results = Results(title, "Ours against\ntheirs.")
    results.table(("network", "seconds", "share"), [["a|b", 1234.5, 0.25], ["c", None, 1]], "Medians of 5.")
    results.headline("theirs / ours", 1.002)
    results.finish(file)
    return results


def test_the_page_is_what_the_command_makes_of_the_figures_beside_it():
    page = performance.make_page(performance.FIGURES.glob("*.json"))
    assert performance.PAGE.read_text(encoding="utf-8") == page, "run: python tests/bench/performance.py"


def test_the_page_of_networks_is_what_the_command_makes_of_the_zoos_figures():
    page = performance.make_networks_page(performance.ZOO)
    assert performance.NETWORKS.read_text(encoding="utf-8") == page, "run: python tests/bench/performance.py"


def test_every_figure_of_a_table_comes_back_on_the_page(tmp_path: Path):
    results = leave_figures(tmp_path / "bench_prune.json")
    assert performance.read_figures(tmp_path / "bench_prune.json")["tables"] == results.tables
    page = performance.make_page([tmp_path / "bench_prune.json"])
    assert "| network | seconds | share |\n| --- | ---: | ---: |\n" in page
    assert "| a\\|b | 1,234 | 0.25 |\n| c | not measured | 1 |\n\nMedians of 5.\n" in page
    assert "| [Pruning](#bench_prune) | theirs / ours: **1.002** |" in page
    assert '<a id="bench_prune"></a>\n\n## Pruning\n\nOurs against theirs.\n' in page


def test_benchmarks_come_in_the_order_of_their_files_names(tmp_path: Path):
    files = [tmp_path / f"{name}.json" for name in "cab"]
    for file in files:
        leave_figures(file, title=file.stem)
    sections = [line for line in performance.make_page(files).splitlines() if line.startswith("## ")]
    assert sections == ["## a", "## b", "## c"]


def test_figures_that_lack_something_are_refused_by_name(tmp_path: Path):
    file = tmp_path / "bench_prune.json"
    file.write_text(json.dumps({"title": "Pruning"}))
    with pytest.raises(ValueError, match=r"bench_prune\.json has no about, command"):
        performance.make_page([file])


def test_a_ratio_near_one_is_shown_with_what_tells_it_from_one():
    assert [performance.shown(value) for value in (1.002, 0.9996, 1.2345, 1234.5)] == [
        "1.002",
        "1.000",
        "1.23",
        "1,234",
    ]
