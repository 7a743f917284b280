"""What a stage says of itself at its end."""

from pathlib import Path

import pytest
import torch
from torch import nn

from netslim.data import DataConfig, DataInfo
from netslim.launch.run import summary as under_test
from netslim.launch.run.summary import accuracies, dataset, done_line, flat, latencies

ROWS = [
    {"stage": "sparse", "ratio": 0.0, "accuracy": 0.9},
    {"stage": "sparse", "ratio": 0.3, "accuracy": 0.8},  # of a later pass
    {"stage": "cut", "ratio": 0.5, "accuracy": 0.1},
    {"stage": "repaired", "ratio": 0.5, "accuracy": 0.7},
    {"stage": "cut", "ratio": 0.9, "accuracy": 0.2},
]


def test_a_stage_knows_what_its_own_ratio_came_to_so_far() -> None:
    assert accuracies(ROWS, 0.5) == {"accuracy_sparse": 0.9, "accuracy_cut": 0.1, "accuracy_repaired": 0.7}
    assert accuracies(ROWS, 0.9) == {"accuracy_sparse": 0.9, "accuracy_cut": 0.2}
    assert accuracies(ROWS, 0.0) == {"accuracy_sparse": 0.9}


def test_a_configuration_is_flat_and_in_order() -> None:
    nested = {"seed": 0, "prune": {"ratio": [0.5], "floors": {"b": 1, "a": None}}}
    assert list(flat(nested).items()) == [
        ("prune.floors.a", None),
        ("prune.floors.b", 1),
        ("prune.ratio", [0.5]),
        ("seed", 0),
    ]


def test_the_end_of_a_stage_is_one_line() -> None:
    metrics = {"seconds": 35.61, "accuracy": 0.99437, "params": 579098, "macs": 9880832, "file_mb": 2.3261}
    assert done_line(metrics) == "done in 35.6 s: accuracy 0.9944, 579,098 parameters, 9,880,832 MACs, 2.326 MB"


@pytest.mark.parametrize(("single", "large"), [(2.0, 2.0), (20.0, None)])
def test_a_slow_network_is_not_timed_with_many_images(
    single: float, large: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "latency", lambda _, __, sizes, ___: dict.fromkeys(sizes, single))
    found = latencies(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8))
    assert found == {"latency_ms_1": single, "latency_ms_64": large}


def test_images_are_known_by_what_was_written_of_them(tmp_path: Path) -> None:
    info = DataInfo(
        directory=tmp_path,
        loader="ffcv",
        classes=("a", "b"),
        num_train=3,
        num_test=1,
        mean=(0.5, 0.5, 0.5),
        std=(0.1, 0.1, 0.1),
        size=32,
    )
    found = dataset(DataConfig(), info)
    assert (found.name, found.files) == ("dataset-digits", (tmp_path / "info.json",))
    assert found.about["num_train"] == 3
