"""Networks of timm, and of torchvision for other tasks than classification: cut exactly in both modes; they train."""

from typing import Any

import pytest
from zoo_exact import assert_exact, measured
from zoo_networks import TORCHVISION, Network, detector, smallest, timm_files, timm_network

pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore")  # of old functions that they call

SMALL: dict[str, int | None] = {  # pixels of images; none where the network takes only its own
    "cs3darknet_s": 64,  # one half of the channels goes around
    "dpn48b": 64,  # sums and concatenations of the same values
    "efficientvit_b0": 64,  # linear attention
    "ghostnet_050": 64,  # half of the channels made of the other half
    "hrnet_w18_small": 64,  # branches that exchange
    "lcnet_050": 64,  # depthwise convolutions, gates
    "levit_128s": None,  # attention between BatchNorms, a bias for each place
    "mobilenetv3_small_050": 64,
    "mobilevit_xxs": 64,  # transformers among convolutions
    "regnetx_002": 64,  # BatchNorms that activate
    "repvgg_a0": 64,  # a BatchNorm beside two convolutions
    "resnest14d": 64,  # groups that attend to each other
}
FEW_BOXES = {f"rpn_{when}_nms_top_n_{mode}": 20 for when in ("pre", "post") for mode in ("train", "test")}
TASKS = {
    "segmentation": TORCHVISION["lraspp_mobilenet_v3_large"],
    "video": TORCHVISION["r3d_18"],
    "detection": detector(
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        **{"min_size": 96, "max_size": 128, "box_score_thresh": 0.0, "num_classes": 3, **FEW_BOXES},
    ),
}


def assert_cut(network: Network, coupling: Any, least: float = 0.1) -> None:
    found: dict[str, Any] = {}
    measured(network, coupling, found)
    assert_exact(found)
    assert found["gone"] > least
    assert min(found["effect in eval"], found["effect in training"]) > 1e-4, "the outputs hang on nothing that went"


@pytest.mark.parametrize("coupling", ["group", "select"])
@pytest.mark.parametrize("name", SMALL)
def test_a_network_of_timm_is_cut_exactly_trains_and_comes_back(name, coupling):
    assert_cut(timm_network(name, SMALL[name]), coupling)


@pytest.mark.parametrize("coupling", ["group", "select"])
@pytest.mark.parametrize("task", TASKS)
def test_a_network_for_another_task_is_cut_exactly_trains_and_comes_back(task, coupling):
    assert_cut(TASKS[task], coupling, least=0.05)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_every_file_of_timm_and_every_task_of_torchvision_is_cut_exactly_trains_and_comes_back():
    names = filter(None, map(smallest, timm_files().values()))
    networks = [*map(timm_network, names), *TORCHVISION.values()]
    failures: dict[str, Any] = {}
    for network in networks:
        for coupling in ("group", "select"):
            found: dict[str, Any] = {}
            try:
                measured(network, coupling, found)
                assert_exact(found)
            except Exception as error:
                if "no BatchNorm" not in str(error):
                    failures[f"{network.name}, {coupling}"] = error
            print(f"{network.name:<40} {coupling:<7} {found}", flush=True)
    assert len(networks) >= 86
    assert not failures
