"""The cost of a network, against numbers counted by hand."""

import torch
from test_prune_nets import EXAMPLE, chain, scramble
from torch import Tensor, nn

from netslim.prune import Cost, cost, slim


def test_the_cost_of_a_tiny_network_is_the_one_counted_by_hand():
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), *head)
    params = (3 * 4 * 9 + 4) + 2 * 4 + (4 * 5 + 5)
    macs = 3 * 4 * 9 * 8 * 8 + 4 * 5
    assert cost(net, torch.zeros(3, 3, 8, 8)) == Cost(params, macs)


def test_the_cost_is_per_image():
    net = chain(4, 6)
    assert cost(net, EXAMPLE) == cost(net, EXAMPLE[:1])


def test_counting_leaves_training_flags_and_statistics_alone():
    net = chain(4, 6).train()
    before = net[0][1].running_mean.clone()
    cost(net, EXAMPLE)
    assert all(module.training for module in net.modules())
    assert torch.equal(net[0][1].running_mean, before)


def test_a_slim_network_costs_less():
    net = scramble(chain(12, 10))
    small, _ = slim(net, EXAMPLE, ratio=0.5)
    assert cost(small, EXAMPLE).params < cost(net, EXAMPLE).params
    assert cost(small, EXAMPLE).macs < cost(net, EXAMPLE).macs


def test_images_are_counted_whatever_the_example_is():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = chain(4)

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.net(torch.stack(images))

    one = cost(chain(4), EXAMPLE).macs
    assert cost(Listed(), ([EXAMPLE[0], EXAMPLE[1]],)).macs == one
    assert cost(chain(4), {"input": EXAMPLE}).macs == one
