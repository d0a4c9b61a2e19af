"""What turns images into latents and back, and how one is named in an index or a checkpoint."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.errors import UserError


class Codec(Protocol):
    """Image ↔ latent. The model trains on and samples normalised latents: ``(stored mean - shift) * scale``."""

    latent_shape: tuple[int, int, int]  # [C, h, w] of one latent
    dtype: np.dtype  # of the stored moments
    posterior: bool  # True: moments are mean and log-variance, [2C, h, w]; False: they are the latent, [C, h, w]
    scale: float
    shift: float

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 images [N, H, W, channels] → moments [N, C or 2C, h, w], not normalised."""
        ...

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Normalised latents [N, C, h, w] → uint8 images [N, H, W, channels]."""
        ...

    def spec(self) -> dict[str, Any]:
        """The name and configuration as JSON: its identity, and all that :func:`codec_from_spec` needs."""
        ...


CODECS = {PixelCodec.name: PixelCodec}


def codec_from_spec(spec: dict[str, Any]) -> Codec:
    """The codec whose :meth:`Codec.spec` gave ``spec``.

    Raises:
        UserError: the name is unknown, or the configuration is not one of that codec.
    """
    name = spec.get("name")
    if not isinstance(name, str) or name not in CODECS:
        raise UserError(f"unknown codec {name!r}: this version knows {', '.join(CODECS)}")
    config = {key: value for key, value in spec.items() if key != "name"}
    try:
        return CODECS[name](**config)
    except TypeError:
        raise UserError(f"codec {name!r} does not take the configuration {config}") from None
