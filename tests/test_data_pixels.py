"""One image file as a square of 8-bit pixels: by depth, orientation, transparency, shape and format."""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from netslim.data.pixels import Fit, Reading, UnreadableError, look, read, square, suffixes

SIDE = 16
RAMP = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
"""Every grey level of 8 bits once."""


def pixels(path: Path, **options: object) -> NDArray[np.uint8]:
    return read(str(path), Reading(SIDE, **options))[0]  # type: ignore[arg-type]


def traits(path: Path, **options: object) -> tuple[str, ...]:
    reading = Reading(SIDE, **options)  # type: ignore[arg-type]
    seen = read(str(path), reading)[1]
    assert look(str(path), reading) == replace(seen, brightest=0.0, white=0.0)  # by the header alone
    return seen.traits


def saved(path: Path, values: NDArray[np.generic], **options: object) -> Path:
    Image.fromarray(values).save(path, **options)  # type: ignore[arg-type]
    return path


def why_unreadable(path: Path, **options: object) -> str:
    with pytest.raises(UnreadableError) as caught:
        pixels(path, **options)
    assert str(path) in str(caught.value)
    assert "BytesIO" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm", ".jp2"])
def test_grey_of_16_bits_is_scaled_to_8(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"a{suffix}", (RAMP * 257).astype(np.uint16))  # 65535 is white
    assert (pixels(path) == RAMP[..., None]).all()
    assert traits(path) == ("scaled",)


def test_grey_between_two_levels_is_rounded(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", np.full((SIDE, SIDE), 128, np.uint16))
    assert (pixels(path) == 0).all()
    path = saved(tmp_path / "b.png", np.full((SIDE, SIDE), 129, np.uint16))
    assert (pixels(path) == 1).all()


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_a_big_endian_tiff_is_read_as_a_little_endian_one(tmp_path: Path, byteorder: str) -> None:
    path = tmp_path / "a.tif"
    content = (RAMP * 257).astype(f"{byteorder}u2").tobytes()
    path.write_bytes(tiff(content, byteorder, bits=16, photometric=1))
    assert (pixels(path) == RAMP[..., None]).all()


def test_a_tiff_whose_zero_is_white_is_turned_round(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff((RAMP * 257).astype("<u2").tobytes(), "<", bits=16, photometric=0))
    assert (pixels(path) == 255 - RAMP[..., None]).all()


def test_the_12_bits_of_a_tiff_are_scaled_by_their_own_white(tmp_path: Path) -> None:
    values = np.full((SIDE, SIDE), 4095)
    packed = bytes(byte for _ in range(SIDE * SIDE // 2) for byte in (0xFF, 0xFF, 0xFF))
    assert values.size * 12 == len(packed) * 8
    (tmp_path / "a.tif").write_bytes(tiff(packed, "<", bits=12, photometric=1))
    assert (pixels(tmp_path / "a.tif") == 255).all()


@pytest.mark.parametrize(
    ("lowest", "why"), [(0, None), (-1, "from -1 to 32767 are not within 0 and 32767; scale them")]
)
def test_signed_integers_of_16_bits_are_scaled_from_32767(tmp_path: Path, lowest: int, why: str | None) -> None:
    path = tmp_path / "a.tif"
    values = np.round(RAMP * (32767 / 255)).astype("<i2")
    values[0, 0] = lowest
    path.write_bytes(tiff(values.tobytes(), "<", bits=16, photometric=1, sample_format=2))
    if why is None:
        assert (pixels(path) == RAMP[..., None]).all()
    else:
        assert why in why_unreadable(path)


def tiff(content: bytes, byteorder: str, *, bits: int, photometric: int, sample_format: int = 1) -> bytes:
    """A TIFF of one strip, of what Pillow itself does not write."""
    tags = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: SIDE, 279: len(content)}
    tags[339] = sample_format
    entries = b"".join(struct.pack(f"{byteorder}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = b"II*\0" if byteorder == "<" else b"MM\0*"
    directory = struct.pack(f"{byteorder}H", len(tags)) + entries + struct.pack(f"{byteorder}I", 0)
    return head + struct.pack(f"{byteorder}I", 8 + len(content)) + content + directory


def test_12_bits_in_a_png_of_16_are_scaled_by_the_white_that_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", np.round(RAMP * (4095 / 255)).astype(np.uint16))
    assert (pixels(path, white=4095) == RAMP[..., None]).all()
    assert pixels(path).max() == 16  # dark, as the file's own white is 65535


def test_a_value_above_the_white_that_is_named_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", np.full((SIDE, SIDE), 5000, np.uint16))
    assert "5000 to 5000 are not within 0 and 4095; name another value for white with --data.white" in why_unreadable(
        path, white=4095
    )


def test_floats_are_scaled_from_1_or_from_the_white_that_is_named(tmp_path: Path) -> None:
    assert (pixels(saved(tmp_path / "a.tif", (RAMP / 255).astype(np.float32))) == RAMP[..., None]).all()
    assert (pixels(saved(tmp_path / "b.tif", RAMP.astype(np.float32)), white=255) == RAMP[..., None]).all()
    assert traits(tmp_path / "a.tif") == ("scaled",)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (RAMP.astype(np.float32), "floats from 0 to 255 are not within 0 and 1; name another value for white"),
        ((RAMP / 255 - 0.5).astype(np.float32), "floats from -0.5 to 0.5 are not within 0 and 1; scale them"),
        (np.full((SIDE, SIDE), np.nan, np.float32), "floats from nan to nan are not within 0 and 1"),
        (np.full((SIDE, SIDE), np.inf, np.float32), "floats from inf to inf are not within 0 and 1"),
        (RAMP.astype(np.int32), "integers from 0 to 255 do not say what is white; name it with --data.white"),
        ((RAMP - 9).astype(np.int32), "integers from -9 to 246 do not say"),
    ],
)
def test_values_without_a_known_range_are_refused(tmp_path: Path, values: NDArray[np.generic], why: str) -> None:
    assert why in why_unreadable(saved(tmp_path / "a.tif", values))


def test_integers_of_32_bits_are_read_by_the_white_that_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", (RAMP * 1000).astype(np.int32))
    assert (pixels(path, white=255_000) == RAMP[..., None]).all()


def test_colours_of_16_bits_are_read_by_their_upper_8_and_no_other_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    values = np.stack([RAMP * 257, 65535 - RAMP * 257, RAMP * 0], axis=2).astype(">u2")
    path.write_bytes(png(b"".join(b"\0" + row.tobytes() for row in values), bits=16, colour=2))
    assert (pixels(path) == np.stack([RAMP, 255 - RAMP, RAMP * 0], axis=2)).all()
    assert traits(path) == ("reduced",)
    assert "only the upper 8" in why_unreadable(path, white=4095)


def png(rows: bytes, bits: int, colour: int) -> bytes:
    """A PNG of depths that Pillow itself does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", SIDE, SIDE, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fewer_than_8_bits_reach_from_black_to_white(tmp_path: Path, bits: int) -> None:
    rows = (b"\0" + b"\0" * bits + b"\xff" * bits) * SIDE  # a black half and a white one
    (tmp_path / "a.png").write_bytes(png(rows, bits, colour=0))
    assert (pixels(tmp_path / "a.png") == np.repeat([0, 255], SIDE // 2)[:, None]).all()
    assert traits(tmp_path / "a.png") == ()


def corner() -> Image.Image:
    """An image with another colour in each quarter: no two orientations of it are alike."""
    values = np.zeros((SIDE, SIDE, 3), np.uint8)
    half = SIDE // 2
    values[:half, :half], values[:half, half:], values[half:, :half] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(values)


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_an_image_is_turned_upright_as_its_orientation_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"a{suffix}"
    corner().save(path, exif=oriented(orientation), quality=100)
    with Image.open(path) as image:
        want = square(ImageOps.exif_transpose(image), SIDE)
    assert (pixels(path) == want).all()
    near = np.asarray(corner()).astype(int) - pixels(path)
    assert (np.abs(near).mean() < 10) == (orientation == 1)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_an_image_is_left_as_torchvision_reads_it_where_that_is_asked_for(tmp_path: Path, suffix: str) -> None:
    from torchvision.datasets.folder import pil_loader

    path = tmp_path / f"a{suffix}"
    corner().save(path, exif=oriented(6))
    assert (pixels(path, upright=False) == np.asarray(pil_loader(str(path)))).all()
    assert traits(path, upright=False) == ()


def test_the_orientation_of_an_oblong_image_counts_before_it_is_cut(tmp_path: Path) -> None:
    values = np.zeros((SIDE, 3 * SIDE, 3), np.uint8)
    values[:, SIDE : 2 * SIDE] = np.asarray(corner())
    Image.fromarray(values).save(tmp_path / "a.png", exif=oriented(8))
    assert (pixels(tmp_path / "a.png") == np.rot90(np.asarray(corner()))).all()
    assert traits(tmp_path / "a.png") == ("turned",)


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", oriented(9)])
def test_an_orientation_that_is_none_leaves_the_image_as_it_is(tmp_path: Path, exif: object) -> None:
    corner().save(tmp_path / "a.png")
    corner().save(tmp_path / "a.webp", lossless=True, exif=exif)
    assert (pixels(tmp_path / "a.webp") == pixels(tmp_path / "a.png")).all()


def palette(alpha: bytes | int | None) -> Image.Image:
    image = Image.fromarray((RAMP % 7).astype(np.uint8), "P")
    image.putpalette([value for i in range(7) for value in (30 * i, 255 - 30 * i, 7 * i)])
    if alpha is not None:
        image.info["transparency"] = alpha
    return image


@pytest.mark.parametrize("alpha", [bytes([0, 80, 255]), 3])
def test_transparency_is_left_out_and_nothing_is_warned_of(tmp_path: Path, alpha: bytes | int) -> None:
    palette(None).save(tmp_path / "opaque.png")
    palette(alpha).save(tmp_path / "a.png", transparency=alpha)
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "opaque.png")).all()  # warnings are errors here
    assert (traits(tmp_path / "a.png"), traits(tmp_path / "opaque.png")) == (("opaque",), ())


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_an_alpha_channel_is_left_out(tmp_path: Path, mode: str) -> None:
    image = corner().convert(mode)
    image.putalpha(Image.fromarray(RAMP.astype(np.uint8)))
    image.save(tmp_path / "a.png")
    want = corner().convert(mode[:-1]).convert("RGB")
    assert (pixels(tmp_path / "a.png") == np.asarray(want)).all()
    assert traits(tmp_path / "a.png") == ("opaque",)


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp", ".png"])
def test_of_several_pictures_the_first_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("white", "black", "red")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert (pixels(path) == 255).all()
    assert traits(path) == ("first",)


def test_what_pillow_warns_of_is_read_in_silence_and_later_warnings_are_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corner().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE - 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open(tmp_path / "a.png").close()
        assert [each.category for each in caught] == [Image.DecompressionBombWarning]  # so it does warn
        pixels(tmp_path / "a.png")
        assert len(caught) == 1
        Image.open(tmp_path / "a.png").close()
        assert len(caught) == 2


def test_an_image_of_more_pixels_than_pillow_takes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corner().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE // 2 - 1)
    assert "256 pixels" in why_unreadable(tmp_path / "a.png")


BLOCK = np.kron(np.array([[0, 60, 120], [60, 120, 180]]), np.ones((8, 8))).astype(np.uint8)
"""16 x 24 pixels."""


@pytest.mark.parametrize(
    ("fit", "want"),
    [
        ("crop", lambda: BLOCK[:, 4:20]),
        ("stretch", lambda: np.asarray(Image.fromarray(BLOCK).resize((16, 16), Image.Resampling.BILINEAR))),
        (
            "pad",
            lambda: np.pad(
                np.asarray(Image.fromarray(BLOCK).resize((16, 11), Image.Resampling.BILINEAR)), ((3, 2), (0, 0))
            ),
        ),
    ],
)
def test_an_oblong_image_is_cut_stretched_or_padded_with_black(fit: Fit, want: Callable[[], NDArray[np.uint8]]) -> None:
    wide = Image.fromarray(BLOCK)
    assert (square(wide, SIDE, fit) == want()[..., None]).all()


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (1, 1), (16, 16), (3, 5)])
def test_every_shape_becomes_a_square(fit: Fit, shape: tuple[int, int]) -> None:
    found = square(Image.new("RGB", shape, "white"), SIDE, fit)
    assert (found.shape, found.dtype) == ((SIDE, SIDE, 3), np.uint8)
    assert found.max() == 255
    if fit != "pad" or shape[0] == shape[1]:
        assert found.min() == 255


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"no image", "it is no image that Pillow knows"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "it is no image that Pillow knows"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_is_no_image_is_refused_with_the_reason(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "a (1).png"
    if content is not None:
        path.write_bytes(content)
    assert why_unreadable(path) == f"image {path} cannot be read ({why}); replace it or remove it"


def test_a_file_cut_short_is_refused_at_every_length_in_one_line(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    noise = Image.fromarray(draws.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    path, refused = tmp_path / "image", set()
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "TGA", "PCX", "SGI", "ICO", "QOI"):
        whole = io.BytesIO()
        noise.save(whole, kind)
        for length in draws.integers(0, len(whole.getvalue()) * 3 // 4, 12):
            path.write_bytes(whole.getvalue()[:length])
            with contextlib.suppress(UnreadableError):  # some formats do not say how long they are
                pixels(path)
                continue
            assert len(why_unreadable(path).splitlines()) == 1
            refused.add(kind)
    assert len(refused) >= 12


def test_names_are_known_by_the_endings_of_all_formats_that_have_pixels() -> None:
    assert {".jpg", ".jfif", ".png", ".tif", ".tiff", ".gif", ".pgm", ".pbm", ".pnm", ".jp2", ".mpo"} <= suffixes()
    assert {".webp", ".avif", ".bmp", ".tga", ".ico", ".psd", ".pcx", ".ras", ".fits"} <= suffixes()
    assert not {".pdf", ".h5", ".grib", ".eps", ".mpg", ".txt", ".npy", ""} & suffixes()
