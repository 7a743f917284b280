"""What `gammas` tells of a network's scales: figures, the threshold of `slim`, a table, a picture."""

import html
import io
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from test_prune_nets import EXAMPLE, Gated, Residual, Shuffling, block, chain, scramble
from torch import nn

from netslim.prune import Coupling, Gammas, gammas, make_plan, map_channels


def two_layers() -> nn.Module:
    """Four channels and two that can all go, with gammas that are easy to reckon with."""
    model = nn.Sequential(block(3, 4), block(4, 2), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        model[0][1].weight.copy_(torch.tensor([0.5, -0.0005, 0.005, -1.0]))
        model[1][1].weight.copy_(torch.tensor([0.25, 0.75]))
    return model


@pytest.fixture
def found() -> Gammas:
    return gammas(two_layers(), EXAMPLE, ratio=0.5)


def test_a_row_has_the_figures_of_its_layer(found: Gammas) -> None:
    first, second = found
    assert first == {
        "layer": "0.1",
        "channels": 4,
        "removable": 4,
        "num_below": 2,
        "below_threshold": 0.5,
        "smallest": pytest.approx(0.0005),
        "median": pytest.approx(0.2525),
        "largest": 1.0,
        "below_1e-2": 0.5,
        "below_1e-3": 0.25,
        "histogram": [2, *[0] * 7, 1, *[0] * 6, 1],
    }
    assert (second["num_below"], second["median"], found.threshold) == (1, 0.5, 0.25)
    assert (len(found), found[-1], found[:1]) == (2, second, [first])


@pytest.mark.parametrize("coupling", ["group", "select"])
@pytest.mark.parametrize("network", [Residual, Gated, Shuffling, lambda: chain(12, 10, 14)])
def test_the_threshold_takes_what_a_plan_takes_where_no_floor_holds_any(network, coupling: Coupling) -> None:
    torch.manual_seed(0)
    model = scramble(network())
    channels = map_channels(model, EXAMPLE, coupling)
    for ratio in (0, 0.1, 0.29, 0.4):
        plan = make_plan(channels.named_gammas(model, coupling), channels, ratio=ratio, coupling=coupling)
        seen = gammas(model, channels, ratio=ratio, coupling=coupling)
        assert not plan.spared
        assert seen.threshold == plan.threshold
        gone = {layer.name: layer.width - len(layer.kept) for layer in plan.layers}
        assert {row["layer"]: row["num_below"] for row in seen} == {row["layer"]: gone[row["layer"]] for row in seen}
        assert sum(row["num_below"] for row in seen) == plan.num_removed


def test_a_layer_that_the_threshold_would_empty_is_no_error() -> None:
    model = two_layers()
    nn.init.zeros_(model[1][1].weight)
    assert [row["below_threshold"] for row in gammas(model, EXAMPLE, ratio=0.5)] == [0.25, 1.0]


def test_without_an_example_all_batchnorms_are_there_whether_or_not_they_can_go() -> None:
    model = nn.Sequential(two_layers(), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False))
    found = gammas(model, ratio=0.5)
    assert [(row["layer"], row["channels"], row["removable"]) for row in found] == [
        ("0.0.1", 4, None),
        ("0.1.1", 2, None),
        ("1", 2, None),
    ]
    assert found.threshold == 0.5
    assert str(found).splitlines()[-3:] == [
        "all 8 channels, whether or not they can go: give an example to know",
        "threshold of ratio 0.5: |gamma| 0.5, which takes 4 of 8 channels",
        "without BatchNorms that have no gamma (affine=False): '2'",
    ]


def test_with_an_example_batchnorms_of_which_nothing_can_go_are_left_out_and_named() -> None:
    model = nn.Sequential(two_layers(), nn.BatchNorm2d(2))
    found = gammas(model, EXAMPLE)
    assert [(row["layer"], row["removable"], row["num_below"]) for row in found] == [
        ("0.0.1", 4, None),
        ("0.1.1", 2, None),
    ]
    assert str(found).splitlines()[-2:] == [
        "6 of 6 channels can go",
        "without BatchNorms of which no channel can go: '1'",
    ]


def test_it_prints_as_a_table_and_shows_the_same_in_a_notebook(found: Gammas) -> None:
    head, first, *_, last = repr(found).splitlines()
    assert re.split("  +", head) == [
        *("layer", "channels", "can go", "below", "smallest", "median", "largest", "< 1e-2", "< 1e-3", "|gamma|")
    ]
    assert first.split()[:9] == ["0.1", "4", "4", "2", "0.0005", "0.252", "1", "50%", "25%"]
    assert last == "threshold of ratio 0.5: |gamma| 0.25, which takes 3 of 6 channels"
    shown = re.sub(r"</?(table|p|tr)>", "\n", found._repr_html_())
    lines = [re.sub(r"</?t[hd]>", " ", line).split() for line in shown.splitlines() if line]
    assert lines == [html.escape(line).split() for line in repr(found).splitlines()]


def test_the_picture_shows_the_channels_that_can_go_and_the_threshold_of_the_ratio_asked_for(
    found: Gammas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = matplotlib.get_backend(auto_select=False)
    figure = found.plot(tmp_path / "gammas.png", ratio=0.7)
    assert matplotlib.get_backend(auto_select=False) == before
    assert "matplotlib.pyplot" not in sys.modules  # which keeps figures open
    spread, layers, _ = figure.axes
    assert sum(bar.get_height() for bar in spread.patches) == 6
    assert [line.get_xdata()[0] for line in (*spread.lines, *layers.lines)] == [0.5, 0.5]
    assert [label.get_text() for label in layers.get_yticklabels()] == ["0.1", "1.1"]
    assert np.asarray(layers.images[0].get_array()).sum(1).tolist() == [100.0, 100.0]
    for picture in ((tmp_path / "gammas.png").read_bytes(), figure._repr_png_()):  # type: ignore[attr-defined]
        assert len(Image.open(io.BytesIO(picture)).convert("RGB").getcolors(1 << 24)) > 100
    assert gammas(two_layers()).plot().axes[0].lines[:] == []


def test_gammas_that_are_all_zero_are_drawn_too() -> None:
    model = two_layers()
    for each in (model[0][1], model[1][1]):
        nn.init.zeros_(each.weight)
    assert gammas(model, ratio=0.5).plot().axes[1].get_xlim() == (0.0, 1.0)


@pytest.mark.parametrize(
    ("look", "parts"),
    [
        (lambda: gammas(nn.Linear(2, 2)), ["no BatchNorm layer", "use one with BatchNorm"]),
        (
            lambda: gammas(nn.Sequential(nn.BatchNorm2d(3, affine=False))),
            ["no BatchNorm", "gamma", "'0'", "affine=True"],
        ),
        (lambda: gammas(nn.Linear(2, 2), torch.zeros(1, 2)), ["no BatchNorm layer"]),
        (lambda: gammas(two_layers(), ratio=1.0), ["ratio 1.0 is not in [0, 1)", "try 0.5"]),
        (lambda: gammas(two_layers(), EXAMPLE, ratio=float("nan")), ["ratio nan is not in [0, 1)"]),
        (lambda: gammas(two_layers()).plot(ratio=-0.1), ["ratio -0.1 is not in [0, 1)"]),
        (lambda: gammas(chain(4), map_channels(two_layers(), EXAMPLE)), ["channel map is of another network"]),
        (lambda: gammas(nn.Sequential(block(3, 4), nn.Flatten()), EXAMPLE), ["no channel of the network is prunable"]),
    ],
)
def test_a_mistake_is_a_value_error_of_one_line(look, parts: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
        look()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_gammas_that_are_not_finite_are_named() -> None:
    model = two_layers()
    nn.init.constant_(model[1][1].weight, float("nan"))
    for example in (None, EXAMPLE):
        with pytest.raises(ValueError, match=r"BatchNorm '1\.1' has gammas that are NaN or infinite"):
            gammas(model, example)
