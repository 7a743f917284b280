"""The page of a comparison: complete in one file, readable on any screen, and its figures are those of the runs."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_launch_compare import HOSTILE, Compare, Run, compare, make_run, sweep

from netslim.launch.compare import drawing
from netslim.launch.compare.charts import INK, PAPER, SERIES
from netslim.launch.compare.choice import judge
from netslim.launch.compare.curves import read_drawn, read_epochs, read_gammas
from netslim.launch.compare.drawing import named_together
from netslim.launch.compare.entries import gather

__all__ = ["compare", "make_run", "sweep"]  # fixtures
WIDTHS = (1400, 390)


@pytest.fixture(scope="module")  # longer, and its event loop would be in the way of other tests
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(make_run: Run, compare: Compare) -> Path:
    """Of two lambdas, two seeds and two ratios, with a hostile name among them and a run that has not ended."""
    runs = [
        make_run("free", finetuned={0.3: 0.949, 0.8: 0.71}),
        make_run("penalised", weight=1e-3, finetuned={0.3: 0.947, 0.8: 0.92}),
        make_run("again", weight=1e-3, seed=1, finetuned={0.3: 0.951, 0.8: None}),
        make_run(HOSTILE, weight=1e-2, finetuned={0.5: 0.99}),
    ]
    assert compare(*runs)[0] == 0
    return Path("comparison.html").absolute()


def marks_of(page: Path) -> dict[str, list[tuple[str, list[tuple[float, float, str]]]]]:
    """What a reader can ask each figure for."""
    found = re.findall(
        r'<figure id="([^"]+)">.*?<script type="application/json">(.*?)</script>', page.read_text(), re.DOTALL
    )
    return {name: json.loads(text) for name, text in found}


def test_the_page_is_one_file_of_text_that_names_nothing_outside_itself(page: Path) -> None:
    text = page.read_text()
    addresses = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^")\s>]*)', text)
    assert {address for address in addresses if not address.startswith("#")} == {"data:,"}
    assert "@import" not in text
    assert text.count("<style") == 1  # that of a figure would be of the whole page
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'")


def test_names_of_runs_are_text_and_not_markup(page: Path) -> None:
    text = page.read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert text.count("<script") == text.count("</script>") == len(marks_of(page)) + 1


def test_ids_are_unique_and_all_that_is_referred_to_is_there(page: Path) -> None:
    text = page.read_text()
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert {*re.findall(r'(?:href="#|url\(#)([^")]*)', text)} <= {*ids}


def test_every_colour_of_a_figure_is_the_style_sheets(page: Path) -> None:
    body = page.read_text().partition("<body>")[2]
    assert not {*re.findall("#[0-9a-f]{6}", body)} & {INK, PAPER, *SERIES}
    assert "fill: var(--ink)" in body


def test_the_same_runs_make_the_same_bytes(make_run: Run, compare: Compare) -> None:
    run = make_run("one")
    digests = []
    for _ in range(2):
        assert compare(run)[0] == 0
        digests.append(hashlib.sha256((run / "report.html").read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_a_page_that_does_not_draw_all_cuts_says_how_many(
    make_run: Run, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "_MOST_CUTS", 1)
    run = make_run("one", weight=1e-3, finetuned={0.5: 0.9, 0.8: 0.8})
    assert compare(run)[0] == 0
    assert len([name for name in marks_of(run / "report.html") if "layers" in name]) == 1
    assert "1 of 2 cuts are drawn." in (run / "report.html").read_text()


def test_the_marks_of_the_figures_say_what_the_artefacts_say(make_run: Run, compare: Compare) -> None:
    run = make_run("one", weight=1e-3, finetuned={0.5: 0.9125})
    assert compare(run)[0] == 0
    marks = marks_of(run / "report.html")
    row = json.loads((run / "results.json").read_text())["rows"][-1]
    for name in ("f1-params", "f1-macs", "f1-ratio"):
        texts = dict(marks[name])
        (((_, _, text),),) = [texts["one"]]
        assert text.splitlines()[:2] == ["91.25 %", f"{row['params']:,} params, {row['macs']:,} MACs"]
    for name, epochs in (("sparsify", ["47.50 %", "95.00 %"]), ("finetune", ["45.62 %", "91.25 %"])):
        texts = [text.splitlines()[0] for _, _, text in dict(marks[f"f1-{name}"])["one"]]
        assert texts == [f"epoch {number}: {accuracy}" for number, accuracy in enumerate(epochs, 1)]
    plan = json.loads((run / "prune-0.50" / "plan.json").read_text())
    assert [(label, points[0][2]) for label, points in marks["f1-layers-1"]] == [
        (layer["name"], f"{len(layer['kept'])} of {layer['width']} channels stay") for layer in plan["layers"]
    ]
    (threshold,) = dict(marks["f1-gammas"])["threshold of one"]
    assert threshold[2].startswith(f"|gamma| <= {plan['threshold']:.4g} goes")


def test_what_a_mark_says_is_said_where_it_is_drawn(page: Path) -> None:
    for name in ("f1-params", "f1-macs", "f1-ratio"):
        (svg,) = re.findall(rf'<figure id="{name}">.*?(<svg.*?</svg>)', page.read_text(), re.DOTALL)
        drawn = [(float(x), float(y)) for x, y in re.findall(r'<use [^>]*? x="([^"]*)" y="([^"]*)"', svg)]
        for label, points in marks_of(page)[name]:
            for x, y, _ in points:
                assert min(abs(x - left) + abs(y - top) for left, top in drawn) < 0.2, (name, label)


def test_the_stages_of_each_network_and_its_milliseconds_are_drawn(page: Path) -> None:
    marks = marks_of(page)
    (stages,) = (each for name, each in marks.items() if name.endswith("-stages"))
    lines = [[text.partition("\n")[0] for _, _, text in points] for name, points in stages if name == "penalised"]
    start = ["sparse: 95.00 %", "cut: 10.00 %", "repaired: 50.00 %"]
    assert lines == [[*start, "fine-tuned: 94.70 %"], [*start, "fine-tuned: 92.00 %"]]
    (latencies,) = (each for name, each in marks.items() if name.endswith("-latency"))
    places = [points[0][0] for name, points in latencies if name == "penalised"]
    assert places[0] > places[1]  # the smaller network takes less time
    text = page.read_text()
    assert "accuracy, % (stretched towards 100)" in text
    assert "solid: ratio 0.3, dashed: ratio 0.5, dotted: ratio 0.8" in text
    assert ">features.1</text>" in text  # a layer's name under its bar


def test_ratios_whose_thresholds_lie_close_are_named_together() -> None:
    lambdas = [(0.7, 0.013), (0.3, 0.0), (0.5, 0.001), (0.9, 0.5), (0.7, 0.011)]
    assert named_together(lambdas, near=0.08) == [(0.013, ["0.3", "0.5", "0.7"]), (0.5, ["0.9"])]
    assert named_together(lambdas, near=1e-4) == [(0.0, ["0.3"]), (0.001, ["0.5"]), (0.013, ["0.7"]), (0.5, ["0.9"])]


def test_gammas_are_of_every_batchnorm_and_epochs_those_that_are_written_in_full(make_run: Run) -> None:
    sparse = make_run("one") / "sparse"
    gammas = read_gammas(sparse / "weights.safetensors")
    assert gammas is not None
    plan = json.loads((sparse.parent / "prune-0.50" / "plan.json").read_text())
    assert len(gammas) == sum(layer["width"] for layer in plan["layers"])
    assert 0 <= gammas.min() < gammas.max() < 1
    with (sparse / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "accu')
    assert read_epochs(sparse) == ((1, 2), (0.475, 0.95))


@pytest.mark.parametrize(
    "file",
    ["sparse/weights.safetensors", "sparse/metrics.jsonl", "finetune-0.50/metrics.jsonl", "prune-0.50/plan.json"],
)
def test_a_damaged_artefact_is_named_and_only_its_figure_lacks_it(file: str, make_run: Run, compare: Compare) -> None:
    run = make_run("one")
    (run / file).write_text("{not\n")
    code, _, errors = compare(run)
    assert code == 0
    assert str(run / file) in errors
    assert "Left out of the figures: one: " in (run / "report.html").read_text()
    (verdict,) = judge(gather([run]), 0.01, "params")
    drawn = read_drawn(verdict, gather([run]))
    assert len(drawn.troubles) == 1
    kinds = {"weights": drawn.gammas, "plan": drawn.cuts, "sparse": drawn.sparsify, "finetune": drawn.finetune}
    lacking = "weights" if "weights" in file else "plan" if "plan" in file else file.split("/")[0].split("-")[0]
    assert {kind for kind, what in kinds.items() if not what} == {lacking}


def test_figures_are_also_written_to_stand_alone(make_run: Run, compare: Compare) -> None:
    run = make_run("one")
    assert compare(run, "--figures")[0] == 0
    directory = run / "report-figures"
    for name in ("params", "macs", "ratio", "sparsify", "finetune", "gammas", "layers-1"):
        assert (directory / f"f1-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "lambda 0" in (directory / f"f1-{name}.svg").read_text()


def test_a_hundred_rows_and_forty_lambdas_are_still_a_page(make_run: Run, compare: Compare, tmp_path: Path) -> None:
    parent = tmp_path / "many"
    runs = [make_run(f"run-{i}", weight=i * 1e-4, finetuned={0.5: 0.9 + i / 1e4}, parent=parent) for i in range(40)]
    code, _, _ = compare(*runs, "--out", "many.html")
    assert code == 0
    text = Path("many.html").read_text()
    assert len(re.findall(r'<th scope="row"', text)) == 40
    assert len(re.findall(r"<li>", text)) < 5  # a legend of forty would be longer than the figures


def open_page(browser: Any, page: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    """The page in a window of this width, and what goes wrong in it."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    troubles: list[str] = []
    tab.on("console", lambda message: troubles.append(message.text))
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.on("requestfailed", lambda request: troubles.append(request.url))
    tab.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else troubles.append(request.url)
    )
    tab.goto(page.as_uri())
    return tab, troubles


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_goes_wrong_and_nothing_scrolls_sideways(width: int, scheme: str, browser: Any, page: Path) -> None:
    tab, troubles = open_page(browser, page, width, scheme)
    assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    background, ink = tab.evaluate(
        "[getComputedStyle(document.documentElement).backgroundColor, "
        "getComputedStyle(document.querySelector('text')).fill]"
    )
    lightness = [sum(map(int, re.findall(r"\d+", color)[:3])) / 765 for color in (background, ink)]
    assert (
        (lightness[0] > 0.9 and lightness[1] < 0.2) if scheme == "light" else (lightness[0] < 0.15 < 0.8 < lightness[1])
    )
    assert troubles == []
    tab.close()


def test_texts_of_a_figure_do_not_overlap_and_are_not_cut(browser: Any, page: Path) -> None:
    for width in WIDTHS:
        tab, _ = open_page(browser, page, width, "light")
        figures = tab.evaluate(
            "[...document.querySelectorAll('figure')].map((figure) => [figure.id, [...figure.querySelectorAll('text')]"
            ".map((text) => { const box = text.getBoundingClientRect(); "
            "return [text.textContent, box.left, box.top, box.right, box.bottom]; })])"
        )
        for name, texts in figures:
            for index, (text, left, top, right, bottom) in enumerate(texts):
                assert left >= 0, (name, text)
                assert right <= width, (name, text)
                for other, x0, y0, x1, y1 in texts[:index]:
                    overlap = min(right, x1) - max(left, x0), min(bottom, y1) - max(top, y0)
                    # a box is as high as the tallest letter may be
                    assert min(overlap[0], overlap[1] - 4) < 0, (name, text, other)
        tab.close()


def test_a_heading_sorts_and_sorts_back_by_mouse_and_by_keyboard(browser: Any, page: Path) -> None:
    tab, troubles = open_page(browser, page, 1400, "light")
    read = "[...document.querySelectorAll('tbody tr')].map((row) => row.cells[7].dataset.value)"
    head = tab.locator("th", has=tab.get_by_role("button", name="fine-tuned"))
    head.get_by_role("button").click()
    up = tab.evaluate(read)
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").click()
    down = tab.evaluate(read)
    assert head.get_attribute("aria-sort") == "descending"
    measured = sorted((float(value) for value in up if value), reverse=True)
    assert [float(value) for value in down if value] == measured
    assert up[:-1] == down[-2::-1]
    assert up[-1] == down[-1] == ""  # not measured: last in either direction
    tab.get_by_role("button", name="params").focus()
    tab.keyboard.press("Enter")
    params = [float(value) for value in tab.evaluate(read.replace("[7]", "[9]"))]
    assert params == sorted(params)
    assert troubles == []
    tab.close()


def test_pointing_tapping_and_arrow_keys_show_the_value_of_results_json(
    make_run: Run, compare: Compare, browser: Any
) -> None:
    run = make_run("one", finetuned={0.5: 0.9125})
    assert compare(run)[0] == 0
    row = json.loads((run / "results.json").read_text())["rows"][-1]
    ((_, ((x, y, _),)),) = [mark for mark in marks_of(run / "report.html")["f1-params"] if mark[0] == "one"]
    tab, _ = open_page(browser, run / "report.html", 390, "dark")
    svg = tab.locator("#f1-params svg")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    scale = box["width"] / 360
    tip = tab.locator("#tip")
    assert not tip.is_visible()
    tab.mouse.move(box["x"] + x * scale + 3, box["y"] + y * scale + 3)
    shown = tip.inner_text().split("\n")
    assert shown[:3] == ["one", f"{100 * row['accuracy']:.2f} %", f"{row['params']:,} params, {row['macs']:,} MACs"]
    tab.mouse.move(5, 5)
    assert not tip.is_visible()
    for name in ("f1-macs", "f1-ratio"):  # the second tap takes the focus from where the first one was
        (((x, y, _),),) = [points for label, points in marks_of(run / "report.html")[name] if label == "one"]
        tab.locator(f"#{name} svg").scroll_into_view_if_needed()
        box = tab.locator(f"#{name} svg").bounding_box()
        tab.mouse.click(box["x"] + x * scale, box["y"] + y * scale)
        assert tip.is_visible()
    tab.mouse.move(5, 5)
    svg.focus()
    seen = set()
    for _ in range(2):
        tab.keyboard.press("ArrowRight")
        seen.add(tip.inner_text().split("\n")[0])
    assert seen == {"one", "not slimmed"}
    tab.keyboard.press("Escape")
    assert not tip.is_visible()
    tab.close()
