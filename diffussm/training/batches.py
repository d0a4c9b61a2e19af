"""From stored moments to what a training step takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffussm.config import Config
from diffussm.data.index import Index
from diffussm.training.draws import draw


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch, on the CPU."""

    x0: Tensor  # normalised latents [B, C, H, W]
    noise: Tensor  # [B, C, H, W]
    t: Tensor  # [B]
    y: Tensor  # [B]; num_classes where the label is dropped

    def part(self, number: int, size: int) -> Batch:
        """Micro-batch ``number`` of ``size`` images."""
        rows = slice(number * size, (number + 1) * size)
        return Batch(self.x0[rows], self.noise[rows], self.t[rows], self.y[rows])


class BatchMaker:
    """``(step, positions, moments, labels) → Batch``, with every random draw made: what the stream's thread does."""

    def __init__(self, config: Config, index: Index) -> None:
        self.config, self.index = config, index

    def __call__(self, step: int, positions: slice, moments: np.ndarray, labels: np.ndarray) -> Batch:
        train, diffusion = self.config.train, self.config.diffusion
        first = step * train.global_batch
        progress = range(first + positions.start, first + positions.stop)
        draws = draw(train.seed, progress, self.index.latent_shape, diffusion.steps, diffusion.label_drop)
        latents = torch.from_numpy(moments).float()
        if self.index.posterior:
            mean, log_variance = latents.chunk(2, dim=1)
            latents = mean + (0.5 * log_variance).exp() * draws.posterior
        return Batch(
            x0=(latents - self.index.shift) * self.index.scale,
            noise=draws.noise,
            t=draws.t,
            y=torch.from_numpy(labels).masked_fill(draws.drop, len(self.index.class_names)),
        )
