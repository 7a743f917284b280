"""What is saved is what is loaded; what is damaged or foreign is refused."""

import errno
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from test_prune_nets import EXAMPLE, Residual, chain, scramble
from torch import nn

from netslim.prune import load, load_plan, save, slim


def build() -> nn.Module:
    return chain(12, 10)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    small, plan = slim(scramble(build()), EXAMPLE, ratio=0.5)
    save(small, plan, tmp_path / "slim")
    return tmp_path / "slim", small, plan


def test_a_slim_network_comes_back_bit_for_bit(saved):
    path, small, plan = saved
    again = load(path, build)
    assert load_plan(path) == plan
    assert again.state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in again.state_dict().items())
    assert torch.equal(again.eval()(EXAMPLE), small.eval()(EXAMPLE))


def test_a_whole_network_comes_back_without_a_plan(tmp_path):
    model = scramble(build())
    save(model, None, tmp_path)
    assert load_plan(tmp_path) is None
    assert torch.equal(load(tmp_path, build)[0][1].weight, model[0][1].weight)


def test_a_whole_network_saved_over_a_slim_one_takes_its_plan_away(saved):
    path, _, _ = saved
    save(build(), None, path)
    assert load(path, build)[0][1].num_features == 12


def test_the_built_networks_dtype_and_memory_format_are_kept(saved):
    path, _, _ = saved
    again = load(path, lambda: build().to(torch.float64, memory_format=torch.channels_last))
    assert again[2][0].weight.dtype == torch.float64
    assert again[2][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_in_channels_last_and_shared_weights_are_saved_too(tmp_path):
    model = build().to(memory_format=torch.channels_last)
    model[2][1].bias = model[2][1].weight
    save(model, None, tmp_path)
    again = load(tmp_path, build)
    assert torch.equal(again[2][0].weight, model[2][0].weight)
    assert torch.equal(again[2][1].bias, model[2][1].weight)


def test_missing_weights_are_refused_naming_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*weights.safetensors"):
        load(tmp_path, build)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights_are_refused_in_one_line(saved, size):
    path = saved[0] / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"weights.safetensors is not a safetensors file, or is damaged") as caught:
        load(path.parent, build)
    assert "\n" not in str(caught.value)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_given_as_weights_is_refused_and_never_executed(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = saved[0] / "weights.safetensors"
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load(path.parent, build)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("metadata", ["[1]", "5", "x", "[" * 100_000])
def test_metadata_that_were_not_written_so_are_refused(metadata, saved):
    path = saved[0] / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"netslim": metadata})
    with pytest.raises(ValueError, match=r"weights.safetensors is not a safetensors file, or is damaged"):
        load(path.parent, build)


def test_weights_of_another_architecture_are_refused_naming_the_keys(tmp_path):
    save(chain(12, 10), None, tmp_path)
    with pytest.raises(ValueError, match=r"missing \(stem.0.weight, .*, \.\.\.\); \d+ unexpected \(0.0.weight"):
        load(tmp_path, Residual)


def test_weights_of_another_width_are_refused_naming_both_shapes(tmp_path):
    save(chain(12, 10), None, tmp_path)
    with pytest.raises(ValueError, match=r"of another shape \(0.0.weight \(12, 3, 3, 3\) instead of \(13, 3, 3, 3\)"):
        load(tmp_path, lambda: chain(13, 10))


def test_a_plan_that_does_not_fit_the_built_network_is_refused(saved):
    with pytest.raises(ValueError, match=r"'0.1' has 13 channels, the plan says 12"):
        load(saved[0], lambda: chain(13, 10))


def test_a_damaged_plan_is_refused_naming_the_file(saved):
    (saved[0] / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan.json: not a plan"):
        load(saved[0], build)


def test_a_plan_of_another_save_is_refused(saved):
    path, _, _ = saved
    (path / "plan.json").unlink()
    with pytest.raises(ValueError, match="are not of one save"):
        load(path, build)


def test_a_full_disk_leaves_the_old_files(saved, monkeypatch):
    path, _, _ = saved
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    calls = iter([None])  # the first file fits, the second does not

    def full(handle):
        if next(calls, "full"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    small, plan = slim(scramble(build(), seed=1), EXAMPLE, ratio=0.3)
    with pytest.raises(OSError, match="No space left"):
        save(small, plan, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
