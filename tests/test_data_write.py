"""Prepared data is whole, written once, found again; or not there at all."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import Disk
from PIL import Image

from netslim.data import DataConfig, prepare
from netslim.data.sources import open_source, spare_cache
from netslim.data.store import older
from netslim.data.store.write import choose_loader


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def make_folder(root: Path) -> DataConfig:
    """Two classes of plain images: small and quick to write."""
    for split, count in (("train", 40), ("test", 2)):
        for name in ("cat", "dog"):
            (root / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (5 * i, 0, 0)).save(root / "images" / split / name / f"{i}.png")
    return DataConfig(source="folder", root=root / "images", cache=root / "cache", size=16)


def times(directory: Path | None) -> dict[str, int]:
    assert directory is not None
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


def leftovers(config: DataConfig) -> list[str]:
    """What is in the cache but lock files."""
    return [path.name for path in config.cache.iterdir() if path.suffix != ".lock"]


def test_the_figures_are_those_of_the_training_images(data_cache: Path) -> None:
    config = DataConfig(cache=data_cache)
    info, train = prepare(config, quiet=True), open_source(config).train
    pixels = np.stack([train[i][0] for i in range(len(train))]) / 255
    np.testing.assert_allclose(info.mean, pixels.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(info.std, pixels.std(axis=(0, 1, 2)))
    assert (info.num_train, info.num_test, info.size, len(info.classes)) == (1442, 355, 32, 10)


def test_the_second_call_writes_nothing(tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    first = prepare(config, quiet=True)
    before = times(first.directory)
    assert prepare(config, quiet=True) == first
    assert times(first.directory) == before


def test_another_size_is_another_directory(tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    first, second = prepare(config, quiet=True), prepare(replace(config, size=24), quiet=True)
    assert first.directory != second.directory


def test_settings_that_leave_the_pixels_alone_share_a_directory(tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    first, second = prepare(config, quiet=True), prepare(replace(config, batch_size=2, flip=False), quiet=True)
    assert first.directory == second.directory


def test_processes_that_start_together_write_once(tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    code = (
        "from pathlib import Path; from netslim.data import *; import netslim.data.store.write as w\n"
        "write = w._write\n"
        "def counted(*args): print('wrote'); write(*args)\n"
        "w._write = counted\n"
        f"prepare(DataConfig(source='folder', root=Path({str(config.root)!r}), cache=Path({str(config.cache)!r}), "
        "size=16), quiet=True)"
    )
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    output = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(output) == ["", "wrote\n"]


def test_an_unreadable_image_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    (tmp_path / "images" / "train" / "dog" / "7.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"train/dog/7\.png cannot be read"):
        prepare(config, quiet=True)
    assert leftovers(config) == []


@pytest.mark.parametrize("loader", ["ffcv", "torch"])
def test_all_unreadable_images_of_both_sides_are_counted_and_the_first_ten_named(tmp_path: Path, loader: Any) -> None:
    config = replace(make_folder(tmp_path), loader=loader)
    bad = [f"train/cat/{i}.png" for i in (0, 11, 12, 13, 20, 39)] + [f"train/dog/{i}.png" for i in (1, 2, 3)]
    bad += ["test/cat/0.png", "test/cat/1.png", "test/dog/1.png"]
    for name in bad:
        (tmp_path / "images" / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^12 of 84 images cannot be read: ") as caught:
        prepare(config, quiet=True)
    ten = sorted(bad[:9]) + bad[9:10]
    named = "; ".join(f"{tmp_path}/images/{name} (it is no image that Pillow knows)" for name in ten)
    assert str(caught.value).endswith(f"read: {named}; and 2 more; replace or remove them")
    assert leftovers(config) == []


def test_an_unreadable_test_image_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    config = replace(make_folder(tmp_path), loader="torch")
    (tmp_path / "images" / "test" / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"image .*test/dog/1\.png cannot be read \(it is empty\)"):
        prepare(config, quiet=True)


def save_odd(config: DataConfig) -> None:
    """One image on its side, one of 16 bits, one of transparency, and one far from square, among 80 plain ones."""
    cat = Path(str(config.root)) / "train" / "cat"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.kron([[0, 255], [9, 99]], np.ones((8, 8))).astype(np.uint8)).save(cat / "0.png", exif=exif)
    Image.fromarray((np.arange(256) * 257).reshape(16, 16).astype(np.uint16)).save(cat / "1.png")
    Image.new("RGBA", (16, 16), (1, 2, 3, 0)).save(cat / "2.png")
    Image.new("RGB", (48, 16)).save(cat / "3.png")


NOTES = (
    "of 84 images 1 turned upright by EXIF orientation (--data.no-upright leaves them), 1 scaled to 8 bits, "
    "1 read without transparency",
    "far from square (over 1.5 to 1) are 1 of 84 images, up to 3.0 to 1, of which the centre crop leaves out 67%; "
    "--data.fit pad or stretch keeps all",
)


@pytest.mark.parametrize("loader", ["ffcv", "torch"])
def test_what_was_turned_scaled_and_cut_is_counted_and_said_each_time(tmp_path: Path, loader: Any) -> None:
    config = replace(make_folder(tmp_path), loader=loader)
    save_odd(config)
    (tmp_path / "images" / "train" / "cat" / "notes.txt").touch()
    want = (f"left out of {config.root}: 1 .txt", *NOTES)
    assert prepare(config, quiet=True).notes == want
    assert prepare(config, quiet=True).notes == want
    assert prepare(replace(config, fit="pad"), quiet=True).notes == want[:2]


def test_12_bits_in_files_of_16_are_said_to_be_dark_unless_white_is_named(tmp_path: Path) -> None:
    config = replace(make_folder(tmp_path), loader="torch")
    for name, high in (("cat", 4095), ("dog", 4000)):
        Image.fromarray(np.full((16, 16), high, np.uint16)).save(tmp_path / "images" / "train" / name / "0.png")
    scaled, dark = prepare(config, quiet=True).notes
    assert scaled == "of 84 images 2 scaled to 8 bits"
    assert dark.startswith("the brightest of the images that were scaled to 8 bits has 4095 where 65535 is white")
    assert prepare(replace(config, white=4095), quiet=True).notes == (scaled,)


def test_plain_images_are_not_spoken_of(tmp_path: Path) -> None:
    assert prepare(make_folder(tmp_path), quiet=True).notes == ()


@pytest.mark.parametrize(
    "change", [{"fit": "pad"}, {"fit": "stretch"}, {"upright": False}, {"white": 4095.0}, {"white": 255.0}]
)
def test_another_way_of_reading_is_another_directory(tmp_path: Path, change: dict[str, Any]) -> None:
    config = make_folder(tmp_path)
    first, second = prepare(config, quiet=True), prepare(replace(config, **change), quiet=True)
    assert first.directory != second.directory
    assert prepare(replace(config, **change), quiet=True).directory == second.directory


def test_images_that_are_no_files_lie_where_they_always_did(data_cache: Path) -> None:
    digits = DataConfig(cache=data_cache)
    assert [Path(str(prepare(each, quiet=True).directory)).name for each in (digits, replace(digits, white=9.0))] == [
        "digits-eda5e63066ba"
    ] * 2


def as_an_older_netslim_wrote_it(directory: Path | None) -> dict[str, int]:
    assert directory is not None
    about = json.loads((directory / "info.json").read_text())
    for name in ("reading", "notes"):
        del about[name]
    (directory / "info.json").write_text(json.dumps(about))
    return times(directory)


def test_what_an_older_netslim_wrote_is_used_where_its_pixels_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_folder(tmp_path)
    Image.new("RGB", (48, 16)).save(tmp_path / "images" / "train" / "cat" / "3.png")
    first = prepare(config, quiet=True)
    before = as_an_older_netslim_wrote_it(first.directory)
    assert prepare(config, quiet=True) == first
    after = times(first.directory)
    assert [name for name in before if before[name] != after[name]] == ["info.json"]
    assert first.notes == NOTES[1:]
    monkeypatch.setattr(older, "look", None)  # from now on none is looked at
    assert prepare(config, quiet=True) == first
    assert times(first.directory) == after


@pytest.mark.parametrize("odd", ["turned", "scaled"])
def test_what_an_older_netslim_read_otherwise_is_written_anew_beside_it(
    tmp_path: Path, odd: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_folder(tmp_path)
    save_odd(config)
    (tmp_path / "images" / "train" / "cat" / ("1.png" if odd == "turned" else "0.png")).unlink()
    first = prepare(config, quiet=True)
    before = as_an_older_netslim_wrote_it(first.directory)
    second = prepare(config, quiet=False)
    assert (
        f"netslim: an older netslim wrote {first.directory} and read 1 of 83 images otherwise"
        in capsys.readouterr().err
    )
    assert second.directory != first.directory
    assert replace(second, directory=first.directory) == first
    assert first.directory is not None
    assert (first.directory / "train.beton").stat().st_mtime_ns == before["train.beton"]
    monkeypatch.setattr(older, "look", None)
    assert prepare(config, quiet=False) == second
    assert capsys.readouterr().err == ""


def test_what_an_older_netslim_wrote_where_nobody_may_write_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_folder(tmp_path)
    first = prepare(config, quiet=True)
    before = as_an_older_netslim_wrote_it(first.directory)

    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(older, "exclusive", refused)
    monkeypatch.setattr(older, "replace_all", refused)
    assert prepare(config, quiet=True) == first
    assert times(first.directory) == before


def test_what_a_killed_writer_left_is_swept_away(tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    directory = prepare(config, quiet=True).directory
    assert directory is not None
    directory.rename(config.cache / f".{directory.name}.0123abcd")
    prepare(config, quiet=True)
    assert leftovers(config) == [directory.name]


@pytest.mark.parametrize("name", ["train.beton", "test.beton"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    config = make_folder(tmp_path)
    directory = prepare(config, quiet=True).directory
    assert directory is not None
    os.truncate(directory / name, 1000)
    with pytest.raises(ValueError, match=rf"{name} has 1000 bytes, .*; delete {directory} and run again"):
        prepare(config, quiet=True)


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    directory = prepare(config, quiet=True).directory
    assert directory is not None
    with (directory / "train.beton").open("r+b") as file:
        file.seek(2**21 + 5)
        (byte,) = file.read(1)
        file.seek(-1, io.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match=r"train\.beton has changed since it was written .*delete"):
        prepare(config, quiet=True)


def test_a_damaged_info_file_is_refused(tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    directory = prepare(config, quiet=True).directory
    assert directory is not None
    (directory / "info.json").write_text("{")
    with pytest.raises(ValueError, match=r"info\.json is not what was written .*delete"):
        prepare(config, quiet=True)


def test_a_disk_without_room_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_folder(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 2**20))
    with pytest.raises(OSError, match=r"no room in .*MiB are needed, 1 MiB are free; .*--data\.cache") as raised:
        prepare(config, quiet=True)
    assert raised.value.errno == errno.ENOSPC
    assert leftovers(config) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from netslim.data import ffcv_door

    def full(self: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = make_folder(tmp_path)
    monkeypatch.setattr(ffcv_door.MemoryAllocator, "flush_page", full)
    with pytest.raises(OSError, match=r"no room in .*--data\.cache") as raised:
        prepare(config, quiet=True)
    assert raised.value.errno == errno.ENOSPC
    assert leftovers(config) == []


def test_a_page_written_in_part_is_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from netslim.data import ffcv_door

    whole = ffcv_door.MemoryAllocator.flush_page

    def short(self: Any) -> None:
        if self.my_page >= 0:
            self.page_data = self.page_data[:-4096]
        whole(self)

    config = make_folder(tmp_path)
    monkeypatch.setattr(ffcv_door.MemoryAllocator, "flush_page", short)
    with pytest.raises(OSError, match="no room"):
        prepare(config, quiet=True)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/cache cannot be written .*--data\.cache"):
        prepare(replace(config, cache=tmp_path / "file" / "cache"), quiet=True)


@pytest.mark.parametrize("loader", ["torch", "device"])
def test_the_loaders_without_files_write_only_the_figures(tmp_path: Path, loader: Any) -> None:
    config = make_folder(tmp_path)
    ffcv, other = prepare(config, quiet=True), prepare(replace(config, loader=loader), quiet=True)
    assert other == replace(ffcv, directory=None, loader=loader)
    assert [len(list((config.cache / name).iterdir())) for name in sorted(leftovers(config))] in ([1, 3], [3, 1])


def test_without_ffcv_auto_takes_torch_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_ffcv(monkeypatch)
    config = replace(make_folder(tmp_path), loader="auto", quality=80)
    assert choose_loader(config) == "torch"
    (line,) = prepare(config, quiet=True).notes
    assert line.startswith("ffcv cannot be imported (")
    assert "images load slower, by torch, and data.quality 80 is not read; pip install" in line


def test_more_threads_than_there_are_and_a_cache_that_may_vanish_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from netslim.data import ffcv_door

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = replace(make_folder(tmp_path), num_workers=1000, cache=spare_cache())
    threads, home = prepare(config, quiet=True).notes
    assert threads == f"data.num_workers 1000 is more than there are: {ffcv_door.most_threads()} threads decode"
    assert home.startswith(f"nobody knows a home of this user, so that {config.cache} is the cache")


def test_a_cache_on_a_read_only_disk_is_named(tmp_path: Path, disk: Disk) -> None:
    config = replace(make_folder(tmp_path), cache=disk.path / "cache")
    disk.mount("remount,ro")
    with pytest.raises(OSError, match=r"disk/cache cannot be written \(Read-only file system\).*--data\.cache"):
        prepare(config, quiet=True)


@pytest.mark.parametrize("loader", ["torch", "device"])
def test_without_ffcv_the_others_are_taken_without_a_word(monkeypatch: pytest.MonkeyPatch, loader: Any) -> None:
    hide_ffcv(monkeypatch)
    assert choose_loader(DataConfig(loader=loader)) == loader


def test_without_ffcv_asking_for_it_is_an_error_with_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_ffcv(monkeypatch)
    with pytest.raises(ValueError, match=r"pip install 'netslim\[ffcv\]'.*--data\.loader torch"):
        choose_loader(DataConfig(loader="ffcv"))


def hide_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    import netslim.data

    monkeypatch.delattr(netslim.data, "ffcv_door", raising=False)
    monkeypatch.setitem(sys.modules, "netslim.data.ffcv_door", None)
