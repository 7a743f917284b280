"""Named image sets: what they hold, and how they refuse what cannot be used."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from netslim.data import DataConfig
from netslim.data.sources import default_cache, open_source


def make_folder(root: Path, num: int = 3, size: tuple[int, int] = (12, 10)) -> Path:
    """Two classes, `num` images each for training and one for testing."""
    for split, count in (("train", num), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", size, (100 * label, 10 * i, 0)).save(root / split / name / f"{i}.PNG")
    return root


def folder_config(root: Path | None) -> DataConfig:
    return DataConfig(source="folder", root=root, size=8, pad=1)


def test_the_digits_are_split_by_class_into_train_and_test() -> None:
    source = open_source(DataConfig())
    per_class = np.bincount([source.test[i][1] for i in range(len(source.test))])
    assert (len(source.train), len(source.test)) == (1442, 355)
    assert per_class.min() >= 34
    assert per_class.max() <= 37


def test_an_image_is_a_square_of_the_asked_size() -> None:
    image, _ = open_source(DataConfig(size=48)).train[0]
    assert (image.shape, image.dtype) == ((48, 48, 3), np.uint8)


def test_a_folder_gives_its_classes_and_labels(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "train" / "cat" / "notes.txt").write_text("not an image")
    source = open_source(folder_config(tmp_path))
    assert source.classes == ("cat", "dog")
    assert [source.train[i][1] for i in range(len(source.train))] == [0, 0, 0, 1, 1, 1]


def test_an_oblong_image_is_cut_at_its_centre(tmp_path: Path) -> None:
    make_folder(tmp_path)
    stripes = np.zeros((8, 24, 3), dtype=np.uint8)
    stripes[:, 8:16] = 255
    Image.fromarray(stripes).save(tmp_path / "train" / "cat" / "0.PNG")
    assert (open_source(folder_config(tmp_path)).train[0][0] == 255).all()


def test_changed_content_changes_the_fingerprint(tmp_path: Path) -> None:
    make_folder(tmp_path)
    before = open_source(folder_config(tmp_path)).fingerprint
    Image.new("RGB", (9, 9)).save(tmp_path / "test" / "dog" / "0.PNG")
    assert open_source(folder_config(tmp_path)).fingerprint != before


def test_a_folder_that_is_not_given_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"add --data\.root"):
        open_source(folder_config(None))


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        open_source(folder_config(tmp_path / "nowhere"))


def test_a_folder_without_test_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="neither test/ nor val/"):
        open_source(folder_config(tmp_path))


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / "emu").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*train/emu"):
        open_source(folder_config(tmp_path))


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with pytest.raises(ValueError, match=r"no class folders in .*train"):
        open_source(folder_config(tmp_path))


def test_classes_that_differ_are_named_by_the_side_that_has_them(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"must hold the same classes; train/ alone has emu$"):
        open_source(folder_config(tmp_path))
    (tmp_path / "test").rename(tmp_path / "valid")
    for i in range(7):
        (tmp_path / "valid" / f"z{i}").mkdir()
    with pytest.raises(ValueError, match=r"train/ alone has emu; valid/ alone has z0, z1, z2, z3, z4 and 2 more$"):
        open_source(folder_config(tmp_path))


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_every_usual_name_of_the_test_images_is_known(tmp_path: Path, name: str) -> None:
    (make_folder(tmp_path) / "test").rename(tmp_path / name)
    source = open_source(folder_config(tmp_path))
    assert (len(source.train), len(source.test), source.notes) == (6, 2, ())
    with pytest.raises(ValueError, match=r"--data\.source folder"):
        open_source(DataConfig(source="cifar10", root=tmp_path))


def test_another_folder_to_test_with_is_not_read_and_that_is_said(tmp_path: Path) -> None:
    shutil.copytree(make_folder(tmp_path) / "test", tmp_path / "validation")
    source = open_source(folder_config(tmp_path))
    assert (len(source.test), source.notes) == (
        2,
        (f"{tmp_path} also holds validation/, which is not read: test/ is",),
    )


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path)
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / split / "dog")
    with pytest.raises(ValueError, match=r"/train holds one class alone, cat, .* add the folders of the others"):
        open_source(folder_config(tmp_path))


def test_classes_one_folder_too_deep_are_pointed_out(tmp_path: Path) -> None:
    make_folder(tmp_path / "deep")
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / "deep" / split).rename(tmp_path / split / "images")
    with pytest.raises(
        ValueError, match=r"one class alone, images, .* if cat, dog in it are the classes, move them up"
    ):
        open_source(folder_config(tmp_path))


def test_every_format_is_read_in_sub_folders_too_and_the_rest_is_counted_by_kind(tmp_path: Path) -> None:
    cat = make_folder(tmp_path) / "train" / "cat"
    formats = ["x.tif", "x.gif", "x.pgm", "x.JPEG", "x.webp", "x.bmp", "x.jp2", "x.tga", "x.ico"]
    for name in formats:
        Image.new("L", (16, 16), 9).save(cat / name)
    (cat / "day" / "noon").mkdir(parents=True)
    for name in ("day/a.png", "day/noon/b.png"):
        shutil.copy(cat / "0.PNG", cat / name)
    for name in ("a.heic", "b.HEIC", "c.txt", "readme", "._0.PNG", ".DS_Store", "day/.hidden.png"):
        (cat / name).write_bytes(b"not to be read")
    (cat / ".thumbnails").mkdir()
    (cat / "gone.png").symlink_to("nowhere.png")
    (cat / "linked.png").symlink_to(cat / "0.PNG")
    (cat / "day" / "back").symlink_to(cat)
    os.mkfifo(cat / "pipe.png")
    (tmp_path / "train" / "stray.png").touch()
    source = open_source(folder_config(tmp_path))
    assert len(source.train) == 6 + len(formats) + 2 + 1
    assert [source.train[i][0].shape for i in range(len(source.train))] == [(8, 8, 3)] * len(source.train)
    assert source.notes == (
        f"left out of {tmp_path}: 4 hidden, 2 .heic, 1 .txt, 1 broken links, 1 links to a folder above, "
        "1 no regular files, 2 of other kinds",
    )


def test_folders_that_link_to_each_other_are_read_once_on_each_way(tmp_path: Path) -> None:
    cat = make_folder(tmp_path) / "train" / "cat"
    (cat / "a").mkdir()
    (cat / "b").mkdir()
    (cat / "a" / "to_b").symlink_to(cat / "b")
    (cat / "b" / "to_a").symlink_to(cat / "a")
    shutil.copy(cat / "0.PNG", cat / "a" / "x.png")
    source = open_source(folder_config(tmp_path))
    assert len(source.train) == 6 + 2  # a/x.png, and by way of b/to_a
    assert source.notes == (f"left out of {tmp_path}: 2 links to a folder above",)


def test_a_class_without_images_says_what_it_holds_instead(tmp_path: Path) -> None:
    cat = make_folder(tmp_path) / "train" / "cat"
    for path in cat.iterdir():
        path.rename(path.with_suffix(".heic"))
    (cat / "._0.png").touch()
    with pytest.raises(ValueError, match=r"no images in .*train/cat \(it holds 3 \.heic, 1 hidden\)"):
        open_source(folder_config(tmp_path))


def test_the_order_and_the_fingerprint_of_plain_folders_are_as_they_were(tmp_path: Path) -> None:
    # by both the files that an older netslim wrote are found again
    make_folder(tmp_path)
    for path in tmp_path.rglob("*.PNG"):
        os.utime(path, ns=(0, 10**9))
        path.write_bytes(b"12345")
        os.utime(path, ns=(0, 10**9))
    digest = hashlib.sha256()
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            for i in range(count):
                digest.update(f"{split}/{name}/{i}.PNG\0{5}\0{10**9}\n".encode())
    assert open_source(folder_config(tmp_path)).fingerprint == digest.hexdigest()


def test_a_name_that_is_no_text_is_read_too(tmp_path: Path) -> None:
    cat = make_folder(tmp_path) / "train" / "cat"
    (cat / "0.PNG").rename(os.fsdecode(os.fsencode(cat) + b"/caf\xe9.png"))
    assert len(open_source(folder_config(tmp_path)).train) == 6


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    path = make_folder(tmp_path) / "train" / "cat" / "0.PNG"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"image .*train/cat/0\.PNG cannot be read"):
        open_source(folder_config(tmp_path)).train[0]


def test_a_missing_cifar_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no cifar10 .*--data\.download"):
        open_source(DataConfig(source="cifar10", root=tmp_path))


def test_a_cifar_that_is_a_folder_of_images_points_to_the_folder_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data\.source folder"):
        open_source(DataConfig(source="cifar10", root=make_folder(tmp_path)))


def test_the_cache_respects_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DataConfig().cache == tmp_path / "netslim"


def test_padding_that_hides_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="pad 8 moves images of size 8 out of sight"):
        DataConfig(size=8, pad=8)


def test_a_user_whom_the_system_knows_no_home_of_has_a_cache_among_the_temporary_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert default_cache() == tmp_path / f"netslim-{os.getuid()}"
