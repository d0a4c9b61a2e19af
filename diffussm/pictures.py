"""Images side by side in one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from diffussm.files import atomic_path


def grid(images_NHWC: np.ndarray, columns: int, zoom: int = 1) -> np.ndarray:
    """uint8 images [N, H, W, 1 or 3] in rows of ``columns`` with a line between them, as one uint8 [H', W', 3]."""
    images = images_NHWC.repeat(zoom, axis=1).repeat(zoom, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cells = np.full((rows * columns, height + 1, width + 1, 3), 255, np.uint8)
    cells[:count, :height, :width] = images if channels == 3 else images.repeat(3, axis=3)
    picture = cells.reshape(rows, columns, height + 1, width + 1, 3).transpose(0, 2, 1, 3, 4)
    return picture.reshape(rows * (height + 1), columns * (width + 1), 3)[:-1, :-1]


def save_png(path: str | Path, picture_HWC: np.ndarray) -> None:
    """Write a picture, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture_HWC).save(temporary, format="png")
