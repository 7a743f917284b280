"""Order and augmentation depend on nothing but (seed, epoch, sample index)."""

import numpy as np
import pytest
from numpy.typing import NDArray

from netslim.data.batches.pipelines import Augmentation, Shard, draw_augmentation, epoch_order, shard_order


def global_batches(order: NDArray[np.int64], batch: int, ranks: int, accumulation: int) -> NDArray[np.int64]:
    """The optimizer steps `(steps, batch)` that all ranks see together."""
    parts = [shard_order(order, batch, Shard(r, ranks), accumulation) for r in range(ranks)]
    cut = np.stack([part.reshape(-1, accumulation, batch // (ranks * accumulation)) for part in parts], axis=2)
    return cut.reshape(-1, batch)


def test_an_epochs_order_is_a_permutation() -> None:
    assert sorted(epoch_order(1000, seed=3, epoch=5)) == list(range(1000))


def test_the_same_seed_and_epoch_give_the_same_order() -> None:
    np.testing.assert_array_equal(epoch_order(1000, 3, 5), epoch_order(1000, 3, 5))


def test_another_epoch_or_seed_gives_another_order() -> None:
    orders = [epoch_order(1000, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_any_number_of_ranks_sees_the_same_global_batches(ranks: int, accumulation: int) -> None:
    order = epoch_order(100, seed=0, epoch=1)
    np.testing.assert_array_equal(global_batches(order, 24, ranks, accumulation), order[:96].reshape(4, 24))


def test_a_batch_that_cannot_be_cut_evenly_is_refused_with_one_that_can() -> None:
    with pytest.raises(ValueError, match=r"128 is not a multiple of 3 ranks x 1 .* --data.batch-size 129"):
        shard_order(epoch_order(1000, 0, 0), 128, Shard(0, 3), 1)


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="batch size 128 exceeds the 100 training images"):
        shard_order(epoch_order(100, 0, 0), 128, Shard(0, 1), 1)


def test_a_shard_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="shard 2 of 2"):
        Shard(2, 2)


def test_a_samples_augmentation_does_not_depend_on_its_batch() -> None:
    whole = draw_augmentation(np.arange(100), 0, 1, 4)
    part = draw_augmentation(np.array([70, 7]), 0, 1, 4)
    for all_draws, two_draws in zip(whole, part, strict=True):
        np.testing.assert_array_equal(all_draws[[70, 7]], two_draws)


def test_another_epoch_draws_another_augmentation() -> None:
    first, second = (np.stack(draw_augmentation(np.arange(100), 0, epoch, 4)) for epoch in (0, 1))
    assert (first != second).any(axis=0).mean() > 0.9


def test_half_of_the_images_are_mirrored_and_all_shifts_are_equally_likely() -> None:
    flip, down, right = draw_augmentation(np.arange(90_000), 0, 0, 4)
    cells = np.bincount((down + 4) * 9 + right + 4, minlength=81)
    assert abs(flip.mean() - 0.5) < 0.01
    # 81 cells of about 1,111: chi-squared of 80 degrees of freedom exceeds 150 once in a million.
    assert ((cells - 90_000 / 81) ** 2).sum() / (90_000 / 81) < 150


def test_no_padding_moves_nothing() -> None:
    _, down, right = draw_augmentation(np.arange(50), 0, 0, 0)
    assert not down.any()
    assert not right.any()


def test_a_moved_image_is_filled_with_the_mean_colour() -> None:
    image = np.arange(64 * 3, dtype=np.uint8).reshape(1, 8, 8, 3)
    augmentation = Augmentation(seed=0, flip=True, pad=3, fill=(200, 201, 202))
    for index in range(20):
        indices = np.array([index])
        (flip,), (down,), (right,) = augmentation.draw(indices, 0)
        padded = np.empty((14, 14, 3), dtype=np.uint8)
        padded[:] = (200, 201, 202)
        padded[3:11, 3:11] = image[0, :, ::-1] if flip else image[0]
        expected = padded[3 - down : 11 - down, 3 - right : 11 - right]
        np.testing.assert_array_equal(augmentation.apply(image, indices, 0)[0], expected)
