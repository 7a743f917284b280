"""A plan says how its network is built and nothing else: load needs no build function, and runs no stranger's code."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_prune_nets import EXAMPLE, chain, scramble
from torch import nn

import netslim.prune.choose.plan
from netslim.prune import Origin, Plan, load, load_origin, load_plan, save, slim

NETWORKS = "netslim.train.models:build_network"


def build(num_classes: int = 10) -> nn.Module:
    return chain(12, num_classes)


def needs_more(depth: int, num_classes: int = 10) -> nn.Module:
    raise AssertionError(f"called with {depth} and {num_classes}")


def fails(num_classes: int = 10) -> nn.Module:
    raise RuntimeError("no\nluck")


def gives_a_number(num_classes: int = 10) -> int:
    return num_classes


OWN = Origin(function=f"{__name__}:build", num_classes=10)
ORIGINS = {
    "a network of ours": Origin(function=NETWORKS, name="vgg11", width=0.125, num_classes=7),
    "torchvision's": Origin(function="torchvision.models:get_model", name="resnet18", num_classes=10),
    "torchvision's by function": Origin(function="torchvision.models:shufflenet_v2_x0_5", num_classes=10),
    "a user's own": OWN,
}


def keep(directory: Path, origin: Origin | None, ratio: float = 0.4) -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    small, plan = slim(scramble((origin or OWN).build()).eval(), EXAMPLE, ratio=ratio)
    save(small, plan, directory, origin)
    return small, plan


@pytest.mark.parametrize("name", ORIGINS)
def test_a_slim_network_is_loaded_from_its_directory_alone(name, tmp_path):
    small, plan = keep(tmp_path, ORIGINS[name])
    with torch.no_grad():
        assert torch.equal(load(tmp_path).eval()(EXAMPLE), small(EXAMPLE))
    assert load_plan(tmp_path) == replace(plan, origin=ORIGINS[name])


def test_a_build_function_given_to_load_wins_over_the_origin(tmp_path):
    keep(tmp_path, OWN)
    assert next(load(tmp_path, lambda: build().double()).parameters()).dtype == torch.float64


def test_without_an_origin_load_asks_for_the_build_function(tmp_path):
    keep(tmp_path, None)
    with pytest.raises(ValueError, match=r"says how its network is built; load it with build="):
        load(tmp_path)


def test_a_network_that_is_whole_says_by_itself_where_it_came_from(tmp_path):
    model = build()
    save(model, None, tmp_path, OWN)
    assert load_origin(tmp_path) == OWN
    back = load(tmp_path).state_dict()
    assert all(torch.equal(value, back[key]) for key, value in model.state_dict().items())
    save(model, None, tmp_path)  # which leaves nothing of the save before
    with pytest.raises(ValueError, match=r"nothing in .* says how its network is built"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not an origin"),
        ('{"function": "ctypes:CDLL", "name": "libc.so.6", "num_classes": 1}', "a module of Python's own"),
        ('{"function": "mypkg:build", "num_classes": 10, "more": 1}', "not an origin"),
    ],
)
def test_an_origin_that_was_tampered_with_is_refused_by_its_file(text, what, tmp_path):
    save(build(), None, tmp_path, OWN)
    (tmp_path / "origin.json").write_text(text)
    with pytest.raises(ValueError, match=what) as caught:
        load(tmp_path)
    assert f"{tmp_path}/origin.json: " in str(caught.value)


def test_the_digest_covers_the_origin(tmp_path):
    keep(tmp_path, OWN)
    path = tmp_path / "plan.json"
    path.write_text(path.read_text().replace('"num_classes": 10', '"num_classes": 11'))
    with pytest.raises(ValueError, match="changed after it was written"):
        load(tmp_path)


def test_plans_without_an_origin_keep_the_digest_they_had_before_there_were_origins(tmp_path):
    keep(tmp_path, None)
    assert "origin" not in json.loads((tmp_path / "plan.json").read_text())
    assert load_plan(tmp_path).origin is None


def test_building_leaves_torchs_random_numbers_as_they_were(tmp_path):
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    OWN.build()
    assert torch.equal(torch.rand(2), want)


def forge(directory: Path, origin: dict[str, object]) -> None:
    """Write a plan with another origin, and every digest as it should be: what an attacker can do."""
    _, plan = keep(directory, OWN)
    content = {**json.loads(replace(plan, origin=OWN).to_json()), "origin": origin}
    del content["digest"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (directory / "plan.json").write_text(json.dumps({**content, "digest": digest}))


@pytest.mark.parametrize(
    "origin",
    [
        {"function": "os:system", "name": "touch executed", "width": None, "num_classes": 10},
        {"function": "os:system", "name": None, "width": None, "num_classes": 10},
        {"function": "posix:system", "name": None, "width": None, "num_classes": 10},
        {"function": "ctypes:CDLL", "name": "executed.so", "width": None, "num_classes": 10},
        {"function": "ctypes:CDLL", "name": None, "width": None, "num_classes": 10},
        {"function": "stranger:run", "name": "touch executed", "width": None, "num_classes": 10},
        {"function": "netslimmer.train:run", "name": "touch executed", "width": None, "num_classes": 10},
        {"function": "stranger:run", "width": 1.0, "name": None, "num_classes": 10},
        {"function": "stranger:run", "name": None, "width": None, "num_classes": "10"},
        {"function": "stranger:run", "name": None, "width": None, "num_classes": 10, "command": "touch executed"},
        {"function": "stranger.run", "name": None, "width": None, "num_classes": 10},
        {"function": "stranger:__import__('os').mkdir", "name": None, "width": None, "num_classes": 10},
    ],
)
def test_a_plan_that_names_anything_but_a_builder_never_runs_it(origin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("stranger.py", "netslimmer.py"):
        Path(module).write_text("import os\nos.mkdir('executed')\ndef run(**anything): os.mkdir('executed')\n")
    for function in ("os.system", "posix.system", "ctypes.CDLL"):
        monkeypatch.setattr(function, lambda *_, **__: os.mkdir("executed"))
    forge(tmp_path / "slim", origin)
    with pytest.raises(ValueError, match=r"plan.json: not a plan: ") as caught:
        load(tmp_path / "slim")
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()


def test_a_function_that_netslim_only_imports_is_given_no_name(monkeypatch):
    called = []
    monkeypatch.setattr(
        netslim.prune.choose.plan, "stranger", lambda name, num_classes: called.append(name), raising=False
    )
    with pytest.raises(ValueError, match=rf"is of {__name__}, and may be given num_classes alone"):
        Origin(function="netslim.prune.choose.plan:stranger", name="x", num_classes=10).build()
    assert not called


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("no_such_package.nets:build", "No module named 'no_such_package'"),
        (f"{__name__}:nothing", "has no attribute 'nothing'"),
        (f"{__name__}:EXAMPLE", "is not a callable object"),
        (f"{__name__}:needs_more", "missing a required argument: 'depth'"),
        (f"{__name__}:fails", r"raised RuntimeError: no luck"),
        (f"{__name__}:gives_a_number", "returned int, not a torch.nn.Module"),
    ],
)
def test_a_builder_that_does_not_work_is_named_in_one_line(function, what):
    with pytest.raises(ValueError, match=what) as caught:
        Origin(function=function, num_classes=10).build()
    assert str(caught.value).startswith(function)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_refused_by_the_function_that_knows_the_names():
    with pytest.raises(ValueError, match=r"no model is called 'vgg91'"):
        Origin(function=NETWORKS, name="vgg91", num_classes=10).build()


class Malicious:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_pickle_given_as_weights_is_never_executed(write, tmp_path):
    keep(tmp_path / "slim", OWN)
    trap = tmp_path / "executed"
    with (tmp_path / "slim" / "weights.safetensors").open("wb") as file:
        write(Malicious(os.mkdir, str(trap)), file)
    with pytest.raises(ValueError, match=r"weights.safetensors is not a safetensors file, or is damaged"):
        load(tmp_path / "slim")
    assert not trap.exists()
    pickle.loads(pickle.dumps(Malicious(os.mkdir, str(trap))))  # it would have worked
    assert trap.exists()
