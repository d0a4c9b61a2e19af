"""Pixels to whole numbers."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Rounding = Literal["nearest", "down"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


def to_uint8(pixels: Tensor, rounding: Rounding) -> Tensor:
    """Values of 0..255, and some outside, as uint8.

    ``nearest`` is what DiT's samples are rounded by (127.5 x + 128, cut), ``down`` ADM's (127.5 (x + 1), cut).
    """
    return (pixels.round() if rounding == "nearest" else pixels).clamp(0, 255).to(torch.uint8)
