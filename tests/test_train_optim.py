"""Schedules are literal numbers; parameter groups go by type."""

import pytest
from torch import nn

from netslim.train import FitConfig, learning_rate, make_optimizer, travel


def rates(config: FitConfig, steps_per_epoch: int) -> list[float]:
    steps = range(config.epochs * steps_per_epoch)
    return [round(learning_rate(step, steps_per_epoch=steps_per_epoch, config=config), 6) for step in steps]


def test_step_divides_by_ten_at_one_half_and_three_quarters() -> None:
    config = FitConfig(epochs=4, lr=0.1, schedule="step")
    assert rates(config, 2) == [0.1] * 4 + [0.01] * 2 + [0.001] * 2


def test_step_decays_also_where_half_the_epochs_is_no_whole_number() -> None:
    assert rates(FitConfig(epochs=3, lr=0.1, schedule="step"), 4) == [0.1] * 6 + [0.01] * 3 + [0.001] * 3


def test_cosine_falls_from_the_peak_through_one_half() -> None:
    values = rates(FitConfig(epochs=4, lr=0.2, schedule="cosine"), 1)
    assert values == [0.2, 0.170711, 0.1, 0.029289]


def test_warm_up_rises_linearly_to_the_peak() -> None:
    values = rates(FitConfig(epochs=4, lr=0.4, schedule="constant", warmup_epochs=1), 3)
    assert values[:4] == [0.1, 0.2, 0.3, 0.4]


def test_onecycle_rises_for_a_quarter_and_falls_to_almost_zero() -> None:
    values = rates(FitConfig(epochs=4, lr=0.4, schedule="onecycle"), 3)
    assert values[:4] == [0.1, 0.2, 0.3, 0.4]
    assert values[-1] == pytest.approx(0.4 / 9, abs=1e-6)


def test_constant_stays() -> None:
    assert set(rates(FitConfig(epochs=2, lr=0.3, schedule="constant"), 5)) == {0.3}


def test_travel_is_the_sum_of_learning_rates_over_one_minus_momentum() -> None:
    assert travel(FitConfig(epochs=2, lr=0.1, schedule="constant", momentum=0.9), 5) == pytest.approx(10.0)


def test_decay_weights_spares_batch_norm_and_biases() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    groups = make_optimizer(model, FitConfig(decay="weights", weight_decay=0.1)).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(model[0].weight)] == 0.1
    assert [decays[id(p)] for p in (model[0].bias, model[1].weight, model[1].bias)] == [0.0] * 3


def test_decay_all_has_every_parameter_once() -> None:
    shared = nn.Linear(4, 4)
    groups = make_optimizer(nn.Sequential(shared, nn.BatchNorm1d(4), shared), FitConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [4]


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        FitConfig(nesterov=True, momentum=0.0)
