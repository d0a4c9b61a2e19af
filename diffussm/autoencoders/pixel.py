"""The lossless codec: an image's own pixels as its latent, for small images and for runs without an autoencoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from diffussm.autoencoders.rounding import Rounding, to_uint8
from diffussm.errors import UserError

FACTOR = 2  # of the space-to-depth rearrangement: each 2×2 pixels become 4 channels
FILL = 0  # of the pad


@dataclass(frozen=True)
class PixelCodec:
    """Centres an image on a ``size``×``size`` square and moves each 2×2 pixels into channels.

    28×28×1 becomes 4×16×16. Stored as uint8, so the round trip is exact; normalised to [-1, 1].

    Raises:
        UserError: the image does not fit in the square, or the square's side is odd.
    """

    name: ClassVar[str] = "pixel"
    dtype: ClassVar[np.dtype] = np.dtype(np.uint8)
    posterior: ClassVar[bool] = False
    scale: ClassVar[float] = 1 / 127.5
    shift: ClassVar[float] = 127.5
    device_kind: ClassVar[str | None] = None

    height: int
    width: int
    channels: int
    size: int = 32

    def __post_init__(self) -> None:
        values = asdict(self)
        if any(type(value) is not int or value < 1 for value in values.values()):
            raise UserError(f"the pixel codec needs whole numbers from 1 up, got {values}")
        if self.size % FACTOR or self.size < max(self.height, self.width):
            fitting = -(-max(self.height, self.width) // FACTOR) * FACTOR
            raise UserError(
                f"the pixel codec cannot put {self.height}×{self.width} images on a square of {self.size}: "
                f"the side is even and at least {fitting}"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w]."""
        side = self.size // FACTOR
        return self.channels * FACTOR**2, side, side

    @property
    def _corner(self) -> tuple[int, int]:
        """Row and column of the image's first pixel on the square."""
        return (self.size - self.height) // 2, (self.size - self.width) // 2

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, height, width, channels] → uint8 [N, 4 · channels, size/2, size/2].

        Raises:
            UserError: the images are of another type or shape.
        """
        expected = (self.height, self.width, self.channels)
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            raise UserError(
                f"this pixel codec takes uint8 images of height, width, channels {expected}, "
                f"got {images.dtype} {images.shape[1:]}"
            )
        square = np.full((len(images), self.size, self.size, self.channels), FILL, np.uint8)
        top, left = self._corner
        square[:, top : top + self.height, left : left + self.width] = images
        channels, side, _ = self.latent_shape
        blocks = square.reshape(len(images), side, FACTOR, side, FACTOR, self.channels)
        return np.ascontiguousarray(blocks.transpose(0, 5, 2, 4, 1, 3)).reshape(len(images), channels, side, side)

    def decode(self, latents: torch.Tensor, rounding: Rounding = "nearest") -> np.ndarray:
        """Normalised [N, 4 · channels, size/2, size/2] → uint8 [N, height, width, channels].

        Raises:
            UserError: the latents are of another shape.
        """
        if latents.shape[1:] != self.latent_shape:
            raise UserError(f"this pixel codec decodes {self.latent_shape}, got {tuple(latents.shape[1:])}")
        pixels = to_uint8(latents.float() / self.scale + self.shift, rounding)
        square = functional.pixel_shuffle(pixels, FACTOR).permute(0, 2, 3, 1)
        top, left = self._corner
        return square[:, top : top + self.height, left : left + self.width].contiguous().cpu().numpy()

    def spec(self) -> dict[str, Any]:
        """Name and configuration, for an index or a checkpoint."""
        return {"name": self.name, **asdict(self)}

    def load(self) -> None:
        """There are no weights."""
