"""Images that training draws at intervals: with the averaged weights, from the same noise each time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from diffussm.autoencoders.codec import Codec
from diffussm.config import Config, SampleConfig, ScoreConfig
from diffussm.diffusion.generate import generate
from diffussm.diffusion.schedule import Schedule
from diffussm.models.diffussm import DiffuSSM
from diffussm.pictures import grid
from diffussm.training.cluster import Cluster


@dataclass(frozen=True)
class Painter:
    """Draws for a run.

    Attributes:
        codec: decodes what the model draws.
        shape: C, H, W of a latent.
        bf16: the network draws under autocast.
    """

    config: Config
    codec: Codec
    shape: tuple[int, int, int]
    num_classes: int
    device: torch.device
    bf16: bool

    def model(self, weights: dict[str, torch.Tensor]) -> DiffuSSM:
        """A network to draw with, of weights by parameter name."""
        model = DiffuSSM(self.config.model, self.shape[0], self.num_classes)
        model.load_state_dict(weights)
        return model.to(self.device).freeze()

    @torch.no_grad()
    def draw(
        self, model: DiffuSSM, settings: SampleConfig | ScoreConfig, numbers: Sequence[int], labels: Sequence[int]
    ) -> np.ndarray:
        """The images of these numbers, uint8 [n, H, W, channels]; labels count modulo the number of classes."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            latents = generate(
                model,
                Schedule.linear(self.config.diffusion.steps).respace(settings.steps),
                self.shape,
                numbers,
                [label % self.num_classes for label in labels] if self.num_classes else None,
                num_classes=self.num_classes,
                sampler=settings.sampler,
                guidance=settings.guidance,
                seed=self.config.train.seed,
                device=self.device,
            )
        return self.codec.decode(latents)


def draw_grid(painter: Painter, weights: dict[str, torch.Tensor], cluster: Cluster) -> np.ndarray | None:
    """uint8 [H, W, channels], on rank 0; None on others. Collective."""
    sample, num_classes = painter.config.sample, painter.num_classes
    mine = range(cluster.rank, sample.grid, cluster.world_size)
    images = np.empty((0,), np.uint8)
    if mine:
        labels = [i * num_classes // sample.grid for i in mine]
        images = painter.draw(painter.model(weights), sample, mine, labels)
    parts: list[Any] = [None] * cluster.world_size
    dist.gather_object(images, parts if cluster.is_main else None, group=cluster.control)
    if not cluster.is_main:
        return None
    whole = np.empty((sample.grid, *parts[0].shape[1:]), np.uint8)
    for rank, part in enumerate(parts):
        if len(part):
            whole[rank :: cluster.world_size] = part
    columns = sample.grid // num_classes if num_classes else 0
    return grid(whole, columns or math.ceil(sample.grid**0.5), zoom=2)
