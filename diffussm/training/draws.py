"""Every random number of training, as a function of (seed, progress): a resumed run needs no generator's state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffussm.data.order import philox

TRAINING = 2**64 - 1  # the purpose of these streams; a stream of noise for samples has its image's number there


@dataclass(frozen=True)
class Draws:
    """What chance decides for B images.

    Attributes:
        t: int64 [B], timesteps, uniform in 0..T-1.
        drop: bool [B], whether the label is dropped.
        posterior: standard normal [B, C, H, W], of the autoencoder's posterior.
        noise: standard normal [B, C, H, W], of the diffusion.
    """

    t: Tensor
    drop: Tensor
    posterior: Tensor
    noise: Tensor


def draw(seed: int, progress: Sequence[int], shape: Sequence[int], timesteps: int, label_drop: float) -> Draws:
    """Draw for the images that the run sees as its ``progress[i]``-th, each from a Philox stream of its own.

    Args:
        seed: of the run, 0..2^63 - 1.
        progress: for each image, how many the run saw before it.
        shape: C, H, W of a latent.
        timesteps: T.
        label_drop: probability that a label is dropped.
    """
    count = len(progress)
    uniform = np.empty((count, 2))
    normal = np.empty((count, 2, *shape), np.float32)
    for row, position in enumerate(progress):
        generator = np.random.Generator(philox(seed, TRAINING, position))
        generator.random(out=uniform[row])
        generator.standard_normal(out=normal[row], dtype=np.float32)
    normal = torch.from_numpy(normal)
    return Draws(
        t=torch.from_numpy((uniform[:, 0] * timesteps).astype(np.int64)),
        drop=torch.from_numpy(uniform[:, 1] < label_drop),
        posterior=normal[:, 0],
        noise=normal[:, 1],
    )
