"""Batches are the same with every loader, on any number of ranks, every time."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from netslim.data import DataConfig, DataInfo, Loaders, Shard, open_calibration, open_loaders, prepare
from netslim.data.batches import device_loader
from netslim.data.batches import ffcv_loader as module
from netslim.launch.mistakes import MISTAKE, guarded

CPU = torch.device("cpu")
LOADERS = ["ffcv", "torch", "device"]
OTHERS = ["torch", "device"]
"""Held against FFCV, which the fixtures prepare."""


@pytest.fixture
def config(data_cache: Path) -> DataConfig:
    return DataConfig(cache=data_cache, batch_size=96, eval_batch_size=100)


@pytest.fixture
def info(config: DataConfig) -> DataInfo:
    return prepare(config, quiet=True)


def by_loader(loader: str, config: DataConfig) -> tuple[DataConfig, DataInfo]:
    """The same images by another loader."""
    config = replace(config, loader=loader, num_workers=0)  # type: ignore[arg-type]
    return config, prepare(config, quiet=True)


def loaders(config: DataConfig, info: DataInfo, rank: int = 0, ranks: int = 1, accumulation: int = 1) -> Loaders:
    return open_loaders(config, info, Shard(rank, ranks), seed=7, accumulation=accumulation, device=CPU)


def epoch(opened: Loaders, number: int = 0, first_batch: int = 0) -> tuple[Tensor, Tensor]:
    """All images and labels of an epoch, micro-batch by micro-batch, `(batches, n, ...)`."""
    images, labels = zip(*opened.train.epoch(number, first_batch), strict=True)
    return torch.stack(images), torch.stack(labels)


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_normalised_floats_in_channels_last(config: DataConfig, loader: str) -> None:
    images, labels = next(loaders(*by_loader(loader, config)).train.epoch(0))
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == (
        (96, 3, 32, 32),
        torch.float32,
        (96,),
        torch.int64,
    )
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_unaugmented_training_images_have_mean_0_and_deviation_1(config: DataConfig, info: DataInfo) -> None:
    plain = replace(config, flip=False, pad=0, batch_size=1442)
    images, _ = epoch(loaders(plain, info))
    torch.testing.assert_close(images.mean((0, 1, 3, 4)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 1, 3, 4)), torch.ones(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("flip", "pad"), [(True, 4), (True, 0), (False, 3), (False, 31), (False, 0)])
@pytest.mark.parametrize("loader", OTHERS)
def test_every_loader_gives_the_same_pixels(
    config: DataConfig, info: DataInfo, loader: str, flip: bool, pad: int
) -> None:
    config = replace(config, flip=flip, pad=pad)
    one, two = loaders(config, info), loaders(*by_loader(loader, config))
    for number in (0, 3):
        images, labels = epoch(one, number)
        other_images, other_labels = epoch(two, number)
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_worker_processes_change_nothing(config: DataConfig, info: DataInfo) -> None:
    other = replace(config, loader="torch", num_workers=1)
    opened = loaders(other, prepare(other, quiet=True))
    for number in (0, 1):  # the second by the same workers
        assert torch.equal(epoch(opened, number)[0], epoch(loaders(config, info), number)[0])


def chunks(
    config: DataConfig, info: DataInfo, num_images: int, rank: int = 0, ranks: int = 1
) -> list[tuple[int, Tensor, Tensor]]:
    shard = Shard(rank, ranks)
    return [*open_calibration(config, info, shard, num_images=num_images, chunk_size=18, seed=7, device=CPU)]


@pytest.mark.parametrize("loader", LOADERS)
def test_calibration_images_are_training_images_without_augmentation_by_every_loader(
    config: DataConfig, info: DataInfo, loader: str
) -> None:
    plain = replace(config, flip=False, pad=0, batch_size=256)
    want, labels = (part[0] for part in epoch(loaders(plain, info)))
    found = chunks(*by_loader(loader, config), 256)
    assert torch.equal(torch.cat([images for _, images, _ in found]), want)
    assert torch.equal(torch.cat([some for *_, some in found]), labels)


@pytest.mark.parametrize(("loader", "ranks"), [("ffcv", 1), ("ffcv", 2), ("ffcv", 3), ("ffcv", 40), ("device", 3)])
def test_chunks_for_calibration_do_not_depend_on_the_number_of_ranks(
    config: DataConfig, loader: str, ranks: int
) -> None:
    config, info = by_loader(loader, config)
    want = chunks(config, info, 300)
    found = sorted(
        (chunk for rank in range(ranks) for chunk in chunks(config, info, 300, rank, ranks)), key=lambda chunk: chunk[0]
    )
    assert [number for number, *_ in found] == [number for number, *_ in want] == list(range(17))
    assert all(torch.equal(one[1], two[1]) for one, two in zip(found, want, strict=True))


def test_all_training_images_are_taken_where_more_are_asked_for(config: DataConfig, info: DataInfo) -> None:
    opened = open_calibration(config, info, Shard(0, 1), num_images=10_000, chunk_size=64, seed=7, device=CPU)
    assert opened.num_images == info.num_train == sum(len(images) for _, images, _ in opened)
    assert torch.equal(opened.first(2), next(iter(opened))[1][:2])


@pytest.mark.parametrize("loader", OTHERS)
def test_every_loader_gives_the_same_test_images(config: DataConfig, info: DataInfo, loader: str) -> None:
    for one, two in zip(loaders(config, info).test, loaders(*by_loader(loader, config)).test, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_two_runs_are_the_same(config: DataConfig, info: DataInfo) -> None:
    first, second = (epoch(loaders(config, info), 2) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_epochs_differ_in_order(config: DataConfig, info: DataInfo) -> None:
    opened = loaders(config, info)
    assert not torch.equal(epoch(opened, 0)[1], epoch(opened, 1)[1])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (3, 1), (1, 4), (2, 4)])
def test_ranks_share_the_steps_of_a_single_process(
    config: DataConfig, info: DataInfo, loader: str, ranks: int, accumulation: int
) -> None:
    alone, alone_labels = epoch(loaders(config, info), 1)
    config, info = by_loader(loader, config)
    parts = [epoch(loaders(config, info, rank, ranks, accumulation), 1) for rank in range(ranks)]
    # (steps * accumulation, ranks, n, ...) holds the images of a step one after the other
    images = torch.stack([part[0] for part in parts], dim=1).reshape(alone.shape)
    labels = torch.stack([part[1] for part in parts], dim=1).reshape(alone_labels.shape)
    assert torch.equal(images, alone)
    assert torch.equal(labels, alone_labels)


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_can_start_in_its_middle(config: DataConfig, loader: str) -> None:
    opened = loaders(*by_loader(loader, config), accumulation=2)
    assert torch.equal(epoch(opened, 1, first_batch=5)[0], epoch(opened, 1)[0][5:])


class Watched:
    """A reader that notes which samples each batch is of."""

    def __init__(self, reader: Any, size: int) -> None:
        self.reader, self.size = reader, size

    def batches(self, order: Any, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        samples = torch.from_numpy(order).split(self.size)
        for (images, labels), indices in zip(self.reader.batches(order, number), samples, strict=True):
            yield images, torch.stack([labels, indices], dim=1)  # type: ignore[misc]  # where labels go, indices go too


def global_batches(opened: list[Loaders], number: int, first: int, last: int, parts: int) -> list[list[Tensor]]:
    """Images, and labels beside sample indices, of the steps [first, last) of an epoch, from all ranks together."""
    epochs = [each.train.epoch(number, first * parts) for each in opened]
    steps = []
    for _ in range(first, last):
        micro_batches = [next(batches) for _ in range(parts) for batches in epochs]
        steps.append([torch.cat(tensors) for tensors in zip(*micro_batches, strict=True)])
    for batches in epochs:
        batches.close()  # type: ignore[attr-defined]  # as by a process that ends here
    return steps


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_goes_on_at_every_step_with_the_same_samples_and_pixels(
    config: DataConfig, loader: str, before: int, after: int, accumulation: int
) -> None:
    config, info = by_loader(loader, replace(config, batch_size=288, size=16, flip=True, pad=2))

    def opened(ranks: int) -> list[Loaders]:
        found = [loaders(config, info, rank, ranks, accumulation) for rank in range(ranks)]
        for each in found:
            each.train._reader = Watched(each.train._reader, 288 // (ranks * accumulation))  # type: ignore[assignment]
        return found

    steps = 5
    want = global_batches(opened(1), 1, 0, steps, accumulation)
    assert len(torch.cat([about[:, 1] for _, about in want]).unique()) == steps * 288
    first, second = opened(before), opened(after)
    for k in range(steps):
        have = global_batches(first, 1, 0, k, accumulation) + global_batches(second, 1, k, steps, accumulation)
        for (images, about), (want_images, want_about) in zip(have, want, strict=True):
            assert torch.equal(about, want_about)
            assert torch.equal(images, want_images)
    assert [len(each.train) for each in second] == [steps * accumulation] * after


@pytest.mark.parametrize("loader", ["ffcv", "device"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_test_image_comes_exactly_once(config: DataConfig, loader: str, ranks: int) -> None:
    config, info = by_loader(loader, config)
    parts = [loaders(config, info, rank, ranks).test for rank in range(ranks)]
    seen = [tuple(image.flatten().tolist()) for part in parts for images, _ in part for image in images]
    every = torch.cat([images for images, _ in loaders(config, info).test])
    assert sorted(seen) == sorted(tuple(image.flatten().tolist()) for image in every)
    assert len(seen) == 355
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]


@pytest.mark.parametrize("loader", LOADERS)
def test_a_rank_may_have_no_test_images(config: DataConfig, loader: str) -> None:
    assert list(loaders(*by_loader(loader, replace(config, batch_size=356 * 2)), 355, 356).test) == []


def test_lengths_count_micro_batches_and_steps(config: DataConfig, info: DataInfo) -> None:
    train = loaders(config, info, 1, 2, accumulation=4).train
    assert (train.steps_per_epoch, len(train)) == (15, 60)


def test_a_batch_that_cannot_be_cut_evenly_is_refused_on_opening(config: DataConfig, info: DataInfo) -> None:
    with pytest.raises(ValueError, match=r"96 is not a multiple of 5 ranks"):
        loaders(config, info, 0, 5)


def test_a_file_cut_short_since_is_refused_on_opening(config: DataConfig, tmp_path: Path) -> None:
    info = prepare(replace(config, cache=tmp_path), quiet=True)
    assert info.directory is not None
    with (info.directory / "test.beton").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match=r"test\.beton has 5000 bytes"):
        loaders(config, info)


def make_folder(root: Path, num_train: int = 150) -> DataConfig:
    """Two classes of noise, one grey and one in colour."""
    draws = np.random.default_rng(0)
    for split, num in (("train", num_train), ("test", 40)):
        for name, shape in (("colour", (20, 16, 3)), ("grey", (16, 20))):
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                pixels = draws.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return DataConfig(source="folder", root=root, cache=root / "cache", size=16, batch_size=30, eval_batch_size=30)


def test_image_files_grey_ones_too_are_the_same_on_the_device(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    one, two = (loaders(*by_loader(loader, folder)) for loader in ("torch", "device"))
    assert all(torch.equal(a, b) for a, b in zip(epoch(one), epoch(two), strict=True))
    for first, second in zip(one.test, two.test, strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("change", [{}, {"fit": "pad"}, {"fit": "stretch"}, {"upright": False, "white": 70000.0}])
def test_images_of_every_depth_orientation_and_shape_are_the_same_by_every_loader(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = replace(make_folder(tmp_path, 30), **change)
    draws, exif = np.random.default_rng(1), Image.Exif()
    for i in range(8):
        exif[0x0112] = i + 1
        pixels = draws.integers(0, 256, (20, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / "colour" / f"turned{i}.jpg", exif=exif)
        deep = draws.integers(0, 65536, (30, 20), dtype=np.uint16)
        Image.fromarray(deep).save(tmp_path / "test" / "grey" / f"deep{i}.tif")
        Image.fromarray(deep).save(tmp_path / "train" / "grey" / f"deep{i}.png")
    one, *others = (loaders(*by_loader(loader, folder)) for loader in LOADERS)
    for other in others:
        assert other.info.mean == one.info.mean
        assert all(torch.equal(a, b) for a, b in zip(epoch(one), epoch(other), strict=True))
        for first, second in zip(one.test, other.test, strict=True):
            assert torch.equal(first[0], second[0])
            assert torch.equal(first[1], second[1])


def test_images_that_are_read_otherwise_are_not_those_that_lie_on_the_device(tmp_path: Path) -> None:
    config, info = by_loader("device", make_folder(tmp_path, 30))
    one, two = loaders(config, info), loaders(*by_loader("device", replace(config, fit="stretch")))
    assert not torch.equal(epoch(one)[0], epoch(two)[0])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_damaged_since_is_the_users_mistake_in_one_line_also_of_a_worker(
    tmp_path: Path, num_workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config, info = by_loader("torch", make_folder(tmp_path, 30))
    opened = loaders(replace(config, num_workers=num_workers), info)
    path = tmp_path / "train" / "grey" / "7.png"
    path.write_bytes(b"no image")
    assert guarded(lambda: epoch(opened) and None) == MISTAKE
    why = "it is no image that Pillow knows"
    assert capsys.readouterr().err == f"netslim: image {path} cannot be read ({why}); replace it or remove it\n"


def test_an_image_damaged_since_is_named_when_all_are_put_on_the_device(tmp_path: Path) -> None:
    config, info = by_loader("device", make_folder(tmp_path))
    (tmp_path / "train" / "grey" / "7.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"train/grey/7\.png cannot be read"):
        loaders(config, info)


def test_images_that_have_no_room_on_the_device_are_refused(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, info = by_loader("device", config)
    monkeypatch.setattr(device_loader, "free_memory", lambda _: 10 * 2**20)
    with pytest.raises(
        ValueError, match=r"1797 images of 32 x 32 take 7 MiB, more than half of the 10 MiB .* on cpu; u"
    ):
        loaders(config, info)


def test_the_memory_that_is_free_is_less_than_the_machine_has() -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < device_loader.free_memory(CPU) <= pages


def test_all_loaders_of_a_process_share_the_images_on_the_device_until_none_is_left(config: DataConfig) -> None:
    config, info = by_loader("device", replace(config, size=12))
    one, two = loaders(config, info), loaders(config, info, 1, 2)
    calibration = open_calibration(config, info, Shard(0, 1), num_images=64, chunk_size=8, seed=0, device=CPU)
    readers: Any = [one.train._reader, two.train._reader, calibration._reader]
    assert len({reader._resident.pixels.data_ptr() for reader in readers}) == 1
    assert len([key for key in device_loader._residents if key[2].size == 12]) == 2
    del one, two, calibration, readers
    assert [key for key in device_loader._residents if key[2].size == 12] == []


def test_an_error_in_the_loaders_thread_reaches_the_reader(
    config: DataConfig, info: DataInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = loaders(config, info)

    def fail(*_: Any) -> None:
        raise ArithmeticError("on purpose")

    monkeypatch.setattr(module, "_augment", fail)
    with pytest.raises(RuntimeError, match=r"reading .*train\.beton failed: ArithmeticError\('on purpose'\)"):
        list(opened.train.epoch(0))


def test_a_batch_that_never_comes_is_an_error(
    config: DataConfig, info: DataInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = loaders(config, info)
    released = threading.Event()
    monkeypatch.setattr(module, "_augment", lambda *_: released.wait())
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.2)
    batches = opened.train.epoch(0)
    timer = threading.Timer(1.0, released.set)
    timer.start()
    with pytest.raises(TimeoutError, match=r"no batch of .*train\.beton came"):
        next(batches)
    timer.join()


def test_a_left_epoch_ends_its_thread(config: DataConfig, info: DataInfo) -> None:
    before = threading.active_count()
    batches = loaders(config, info).train.epoch(0)
    next(batches)
    assert threading.active_count() == before + 1
    assert isinstance(batches, Iterator)
    batches.close()  # type: ignore[attr-defined]  # what leaving a loop does
    assert threading.active_count() == before


@pytest.mark.parametrize("loader", LOADERS)
def test_reading_on_in_an_epoch_that_was_left_is_an_error(config: DataConfig, loader: str) -> None:
    train = loaders(*by_loader(loader, config)).train
    first, second = train.epoch(0), train.epoch(1)
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="another one has been opened"):
        next(first)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_batch_stays_as_it_was_while_later_ones_are_read(config: DataConfig, info: DataInfo, loader: str) -> None:
    kept = list(loaders(*by_loader(loader, config)).train.epoch(0))
    copies = [images.clone() for images, _ in loaders(config, info).train.epoch(0)]
    assert all(torch.equal(images, copy) for (images, _), copy in zip(kept, copies, strict=True))


def test_jpeg_storage_is_close_to_the_raw_pixels(config: DataConfig, info: DataInfo) -> None:
    lossy = replace(config, quality=95)
    images, _ = epoch(loaders(lossy, prepare(lossy, quiet=True)))
    exact, _ = epoch(loaders(config, info))
    assert (images - exact).abs().mean() < 0.05


@pytest.mark.parametrize("loader", LOADERS)
def test_no_global_random_state_is_touched(config: DataConfig, loader: str) -> None:
    config, info = by_loader(loader, config)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index,union-attr]
    opened = loaders(config, info)
    epoch(opened)
    list(opened.test)
    assert (np.random.get_state()[1] == numpy_state).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_torchs_thread_count_is_left_alone(config: DataConfig, info: DataInfo) -> None:
    # In a fresh process: FFCV sets it on import, on opening, for every epoch, and from its own thread.
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from pathlib import Path; from netslim.data import *\n"
        f"config = DataConfig(cache=Path({str(config.cache)!r}), batch_size=96, num_workers=1)\n"
        "loaders = open_loaders(config, prepare(config, quiet=True), Shard(0, 1), seed=0, device=torch.device('cpu'))\n"
        "for _ in loaders.train.epoch(0): assert torch.get_num_threads() == 2\n"
        "for _ in loaders.test: pass\n"
        "assert loaders.info.loader == 'ffcv' and torch.get_num_threads() == 2"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=600).returncode == 0


def test_a_process_ends_in_the_middle_of_an_epoch(config: DataConfig, info: DataInfo) -> None:
    # as after an error: what holds the epoch goes when Python ends, and no thread runs any more
    code = (
        "import torch; from pathlib import Path; from netslim.data import *\n"
        f"config = DataConfig(cache=Path({str(config.cache)!r}), batch_size=96, num_workers=1)\n"
        "loaders = open_loaders(config, prepare(config, quiet=True), Shard(0, 1), seed=0, device=torch.device('cpu'))\n"
        "assert loaders.info.loader == 'ffcv'\n"
        "batches = loaders.train.epoch(0); next(batches)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=600).returncode == 0
