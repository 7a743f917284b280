"""Named image sets: what they hold, and how they refuse what cannot be used."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from netslim.data import DataConfig
from netslim.data.sources import open_source


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


def test_classes_of_one_split_only_are_named(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"same classes; only one has: \['emu'\]"):
        open_source(folder_config(tmp_path))


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
