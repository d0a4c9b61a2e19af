"""Image files as square RGB arrays, by the resizing that published results used."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from diffussm.data.sources.base import BadImage
from diffussm.errors import UserError

PILLOW_OUT_OF_MEMORY = "out of memory"  # in the OSError that its decoders raise then
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")  # of image files, in any case


def read_image(file: Path | bytes, size: int, resize: str) -> np.ndarray:
    """An image file, or its content, as uint8 [size, size, 3]: resized by :data:`RESIZES`, its centre cut out.

    Colours become RGB; transparency is dropped. A camera's note of which way was up (EXIF) is not followed, as nobody
    has who published figures.

    Raises:
        BadImage: it cannot be decoded, or is a link to nothing.
        UserError: it cannot be read: that says nothing about the image.
        MemoryError: the same.
    """
    content = file if isinstance(file, bytes) else _read(file)
    try:
        with Image.open(io.BytesIO(content)) as image:
            image = _as_rgb(image)
            return _cut_centre(np.asarray(RESIZES[resize](image, size)), size)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
        if isinstance(error, OSError) and PILLOW_OUT_OF_MEMORY in str(error):
            raise MemoryError from error
        if isinstance(error, OSError) and error.errno is not None:  # the system's: a decoder could not be imported
            raise UserError(f"images cannot be decoded: {error}: run the command again") from error
        raise BadImage(" ".join(f"{type(error).__name__}: {error}".split())) from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and file.is_symlink():
            raise BadImage("it is a link to a file that is not there") from error
        raise UserError(f"{file} cannot be read: {error.strerror}: mend that and run the command again") from error


def resize_adm(image: Image.Image, size: int) -> Image.Image:
    """As ADM does ImageNet: halved by averages while the short side is at least twice as long, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return _scale(image, size, Image.Resampling.BICUBIC)


def resize_box(image: Image.Image, size: int) -> Image.Image:
    """As ADM does LSUN: by averages, at once."""
    return _scale(image, size, Image.Resampling.BOX)


def resize_lanczos(image: Image.Image, size: int) -> Image.Image:
    """By Lanczos' window of 3, at once: the sharpest."""
    return _scale(image, size, Image.Resampling.LANCZOS)


RESIZES: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "adm": resize_adm,
    "box": resize_box,
    "lanczos": resize_lanczos,
}


def _scale(image: Image.Image, size: int, filter: Image.Resampling) -> Image.Image:
    """Such that the short side is ``size``."""
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), filter)


def _cut_centre(pixels: np.ndarray, size: int) -> np.ndarray:
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16 bits of grey: the high 8 count
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, which are no colours")
    return image.convert("RGB")
