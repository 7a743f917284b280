"""The fast copy of a network is the copy that copy.deepcopy makes."""

import copy
from collections import OrderedDict

import torch
from test_prune_nets import EXAMPLE, chain
from torch import Tensor, nn

from netslim.prune.record import replica


class Odd(nn.Module):
    """Holds what a network may hold besides layers: itself, its layers twice, lists, tensors, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = chain(4, 6), nn.Parameter(torch.ones(1))
        self.twice = self.net[0]
        self.layers = [self.net[0], self.net[2]]
        self.table = {"widths": [4, 6], ("a", 1): torch.arange(3)}
        self.register_buffer("steps", torch.zeros(2), persistent=False)
        self.outside = (self.scale, {1, 2})

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


class Copying(nn.Module):
    def __deepcopy__(self, memo: dict[int, object]) -> "Copying":
        made = Copying()
        made.was_asked = True
        return made


def test_a_replica_computes_the_same_from_tensors_of_its_own():
    model = Odd().eval()
    twin = replica(model, {})
    assert torch.equal(twin(EXAMPLE), model(EXAMPLE))
    mine = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert mine.isdisjoint(tensor.data_ptr() for tensor in (*twin.parameters(), *twin.buffers()))


def test_what_is_one_object_stays_one_object():
    twin = replica(Odd(), {})
    assert twin.twice is twin.net[0] is twin.layers[0]
    assert twin.outside[0] is twin.scale


def test_a_replica_shares_nothing_that_can_change():
    model = Odd()
    twin = replica(model, {})
    assert twin.table["widths"] == model.table["widths"]
    for value in ("table", "layers", "_parameters", "_modules", "_forward_hooks", "_non_persistent_buffers_set"):
        assert getattr(twin, value) is not getattr(model, value)
    assert twin.table["widths"] is not model.table["widths"]
    assert twin._non_persistent_buffers_set == {"steps"}


def test_a_replica_has_every_attribute_of_a_deep_copy():
    model = chain(4, 6).train()
    for mine, other in zip(replica(model, {}).modules(), copy.deepcopy(model).modules(), strict=True):
        assert list(mine.__dict__) == list(other.__dict__)
        assert [type(value) for value in mine.__dict__.values()] == [type(value) for value in other.__dict__.values()]


def test_hooks_are_copied_with_their_network():
    model, calls = chain(4, 6).eval(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    replica(model, {})(EXAMPLE)
    assert calls == [1]
    assert isinstance(replica(model, {})._forward_hooks, OrderedDict)


def test_the_memo_stands_in_for_what_it_names():
    model = Odd()
    weight = nn.Parameter(torch.zeros(1))
    assert replica(model, {id(model.scale): weight}).scale is weight


def test_a_module_that_says_how_it_is_copied_is_asked():
    assert replica(nn.Sequential(Copying()), {})[0].was_asked
