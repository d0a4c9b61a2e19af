"""Grids of samples that training draws at intervals: with the averaged weights, from the same noise each time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from diffussm.autoencoders.codec import Codec
from diffussm.config import Config
from diffussm.diffusion.generate import generate
from diffussm.diffusion.schedule import Schedule
from diffussm.models.diffussm import DiffuSSM
from diffussm.pictures import grid
from diffussm.training.cluster import Cluster


@torch.no_grad()
def draw_grid(
    config: Config,
    weights: dict[str, torch.Tensor],
    codec: Codec,
    shape: tuple[int, int, int],
    num_classes: int,
    cluster: Cluster,
    bf16: bool,
) -> np.ndarray | None:
    """uint8 [H, W, channels], on rank 0; None on others. Collective.

    Args:
        weights: by parameter name.
        shape: C, H, W of a latent.
        bf16: under autocast.
    """
    sample = config.sample
    model = DiffuSSM(config.model, shape[0], num_classes)
    model.load_state_dict(weights)
    model.to(cluster.device).freeze()
    mine = range(cluster.rank, sample.grid, cluster.world_size)
    images = np.empty((0,), np.uint8)
    if mine:
        with torch.autocast(cluster.device.type, torch.bfloat16, enabled=bf16):
            latents = generate(
                model,
                Schedule.linear(config.diffusion.steps).respace(sample.steps),
                shape,
                mine,
                [i * num_classes // sample.grid for i in mine],
                num_classes=num_classes,
                sampler=sample.sampler,
                guidance=sample.guidance,
                seed=config.train.seed,
                device=cluster.device,
            )
        images = codec.decode(latents)
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
