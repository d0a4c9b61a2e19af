"""Noise for sampling that depends on which sample it is for, and not on how samples are batched or spread."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffussm.errors import UserError


def sample_noise(seed: int, indices: Sequence[int], shape: Sequence[int], step: int) -> Tensor:
    """Standard normal float32 [len(indices), *shape] on the CPU; row i depends on (seed, indices[i], step) alone.

    Philox, a counter-based generator, is keyed by seed and index; the step is the counter's highest word, so that the
    streams of two steps cannot meet. All three are in 0..2^64 - 1; UserError for a seed outside.
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"a seed is a number from 0 to 2^64 - 1, not {seed}")
    noise = np.empty((len(indices), *shape), np.float32)
    for row, index in zip(noise, indices, strict=True):
        philox = np.random.Philox(key=np.array([seed, index], np.uint64), counter=np.array([0, 0, 0, step], np.uint64))
        np.random.Generator(philox).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise)
