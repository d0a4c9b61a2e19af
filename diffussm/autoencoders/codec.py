"""What turns images into latents and back, and how one is named in an index or a checkpoint."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from diffussm.autoencoders.kl import AutoencoderKLCodec
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.autoencoders.rounding import Rounding
from diffussm.errors import UserError


class Codec(Protocol):
    """Image ↔ latent. The model trains on and samples normalised latents: ``(stored mean - shift) * scale``."""

    @property
    def name(self) -> str: ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of one latent."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of the stored moments."""
        ...

    @property
    def posterior(self) -> bool:
        """True: moments are mean and log-variance, [2C, h, w]; False: they are the latent, [C, h, w]."""
        ...

    @property
    def scale(self) -> float: ...

    @property
    def shift(self) -> float: ...

    @property
    def device_kind(self) -> str | None:
        """The kind of processor that the last bits of its moments depend on, if they do."""
        ...

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 images [N, H, W, channels] → moments [N, C or 2C, h, w], not normalised."""
        ...

    def decode(self, latents: torch.Tensor, rounding: Rounding = "nearest") -> np.ndarray:
        """Normalised latents [N, C, h, w] → uint8 images [N, H, W, channels]."""
        ...

    def spec(self) -> dict[str, Any]:
        """The name and configuration as JSON: its identity, and all that :func:`codec_from_spec` needs."""
        ...

    def load(self) -> None:
        """Load the weights now rather than when they are first needed.

        Raises:
            UserError: they are not to be had, or are others than those that encoded.
        """
        ...


def codec_from_spec(spec: dict[str, Any], location: str | None = None) -> Codec:
    """The codec whose :meth:`Codec.spec` gave ``spec``. No weights are loaded yet.

    Args:
        location: where the weights are now, if not where the spec says.

    Raises:
        UserError: the name is unknown, or the configuration is not one of that codec.
    """
    name = spec.get("name")
    try:
        if name == PixelCodec.name:
            return PixelCodec(**{key: value for key, value in spec.items() if key != "name"})
        if name == AutoencoderKLCodec.name:
            return AutoencoderKLCodec.from_spec(spec, location)
    except TypeError:
        raise UserError(f"codec {name!r} does not take the configuration {spec}") from None
    raise UserError(f"unknown codec {name!r}: this version knows {PixelCodec.name}, {AutoencoderKLCodec.name}")
