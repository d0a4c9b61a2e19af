from __future__ import annotations

import errno
import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffussm.data.sources.base import BadImage
from diffussm.data.sources.resize import RESIZES, read_image
from diffussm.errors import UserError

pytestmark = pytest.mark.unit


def png(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels, **options).save(file, "PNG")
    return file.getvalue()


def random_pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 91), (91, 64)])
def test_an_image_of_the_size_is_only_cropped(resize: str, height: int, width: int) -> None:
    pixels = random_pixels(height, width)
    top, left = (height - 64) // 2, (width - 64) // 2
    np.testing.assert_array_equal(read_image(png(pixels), 64, resize), pixels[top : top + 64, left : left + 64])


def test_halving_takes_the_mean_of_four() -> None:
    pixels = random_pixels(32, 48) & 0xFC  # multiples of 4: means of four are whole numbers
    means = pixels.reshape(16, 2, 24, 2, 3).astype(int).mean((1, 3))
    for resize in ("adm", "box"):
        np.testing.assert_array_equal(read_image(png(pixels), 16, resize), means[:, 4:20])


def bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5, as Pillow has it."""
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))


def lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


def box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def resample(pixels: np.ndarray, length: int, kernel: object, support: float) -> np.ndarray:
    """The first axis to ``length``, in float64: each output is the kernel's mean, widened when shrinking."""
    scale = len(pixels) / length
    widened = max(scale, 1.0)
    weights = np.zeros((length, len(pixels)))
    for out in range(length):
        centre = (out + 0.5) * scale
        first, end = (
            max(0, int(centre - support * widened + 0.5)),
            min(len(pixels), int(centre + support * widened + 0.5)),
        )
        at = kernel((np.arange(first, end) - centre + 0.5) / widened)
        weights[out, first:end] = at / at.sum()
    return np.tensordot(weights, pixels, 1)


def rounded(values: np.ndarray) -> np.ndarray:
    return np.floor(values + 0.5).clip(0, 255)


def reference(pixels: np.ndarray, size: int, resize: str) -> np.ndarray:
    kernel, support = {"adm": (bicubic, 2), "box": (box, 0.5), "lanczos": (lanczos, 3)}[resize]

    def to(pixels: np.ndarray, height: int, width: int, kernel: object, support: float) -> np.ndarray:
        # Pillow rounds between its two passes, of which the first runs along the rows.
        rows = rounded(resample(pixels.transpose(1, 0, 2).astype(float), width, kernel, support))
        return rounded(resample(rows.transpose(1, 0, 2), height, kernel, support))

    while resize == "adm" and min(pixels.shape[:2]) >= 2 * size:
        pixels = to(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box, 0.5)
    scale = size / min(pixels.shape[:2])
    height, width = (round(side * scale) for side in pixels.shape[:2])
    pixels = to(pixels, height, width, kernel, support)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize(("height", "width"), [(133, 57), (40, 77), (16, 19), (95, 90)])
def test_resizing_is_what_its_formula_says(resize: str, height: int, width: int) -> None:
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 5) + np.cos(y / 7), np.sin((x + y) / 9), np.cos(x * y / 300)], axis=-1)
    pixels = (127.5 + 60 * waves).clip(0, 255).astype(np.uint8)
    got = read_image(png(pixels), 24, resize)
    assert got.shape == (24, 24, 3) and got.dtype == np.uint8
    steps = 2 if resize == "adm" and min(height, width) >= 48 else 1
    assert np.abs(got - reference(pixels, 24, resize)).max() <= steps  # Pillow computes in fixed point


def test_colours_become_rgb() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for content in (png(grey), png((grey.astype(np.uint16) << 8) + 200)):
        np.testing.assert_array_equal(read_image(content, 16, "adm"), np.repeat(grey[..., None], 3, 2))
    rgba = np.dstack([random_pixels(16, 16), grey])
    np.testing.assert_array_equal(read_image(png(rgba), 16, "adm"), rgba[..., :3])
    palette = Image.fromarray(random_pixels(16, 16)).quantize(200)
    for image in (palette, Image.fromarray(rgba[..., :3]).convert("CMYK")):
        file = io.BytesIO()
        image.save(file, "TIFF")
        np.testing.assert_array_equal(read_image(file.getvalue(), 16, "adm"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_files_as_they_are_and_not_turned_by_exif(kind: str, tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    path = tmp_path / "image"
    Image.fromarray(pixels).save(path, kind, **{} if kind == "BMP" else {"exif": exif})
    got = read_image(path, 32, "lanczos")
    assert got[:12].min() > 240 and got[20:].max() < 15


def test_what_is_no_image_is_a_bad_image(tmp_path: Path) -> None:
    whole = png(random_pixels(50, 50))
    file = io.BytesIO()
    Image.fromarray(random_pixels(50, 50)).save(file, "JPEG")
    bad = [b"", b"text", whole[: len(whole) // 2], whole[:20], file.getvalue()[:400], whole.replace(b"IDAT", b"IDAX")]
    bad.append(whole[:16] + b"\x00\x10\x00\x00" * 2 + whole[24:])  # 2^20 pixels wide and high
    for content in bad:
        with pytest.raises(BadImage, match=r"^\w+: .+") as failure:
            read_image(content, 32, "adm")
        assert "\n" not in str(failure.value)
    with pytest.raises(BadImage, match="no colours"):
        read_image(_tiff(np.full((40, 40), math.pi, np.float32)), 32, "adm")


def _tiff(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOENT])
def test_a_file_that_cannot_be_read_is_no_bad_image(number: int, tmp_path: Path, monkeypatch) -> None:
    """It may be a sound one: it is not to be left out for good."""
    path = tmp_path / "a.png"
    path.write_bytes(png(random_pixels(8, 8)))

    def fail(_: Path) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match=rf"a\.png cannot be read: {os.strerror(number)}: .*run the command again"):
        read_image(path, 8, "box")


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
def test_a_lack_of_memory_is_no_bad_image(error: Exception, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setitem(RESIZES, "box", fail)
    with pytest.raises(MemoryError):
        read_image(png(random_pixels(8, 8)), 8, "box")


def test_a_decoder_that_cannot_be_loaded_is_no_bad_image(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match="Too many open files"):
        read_image(png(random_pixels(8, 8)), 8, "box")
