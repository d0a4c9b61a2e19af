"""Images from a checkpoint's model: drawn in batches, stored as ADM stores them, and laid out to be looked at."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from diffussm.autoencoders.codec import Codec
from diffussm.config import SampleConfig
from diffussm.diffusion.generate import generate
from diffussm.diffusion.schedule import Schedule
from diffussm.files import atomic_path
from diffussm.pictures import grid
from diffussm.threads import map_batches

GRID_PER_CLASS, GRID_UNCONDITIONAL, GRID_CLASSES = 10, 64, 20  # images shown


def draw_images(
    model: nn.Module,
    codec: Codec,
    meta: dict[str, Any],
    labels: list[int] | None,
    settings: SampleConfig,
    *,
    count: int,
    batch: int,
    seed: int,
    guidance_channels: int | None = None,
    title: str = "samples",
) -> np.ndarray:
    """uint8 images [count, H, W, channels]; image i is a function of (seed, i), its label and the settings.

    Args:
        model: on the device where it is to run.
        codec: that decodes its latents.
        meta: of the checkpoint that it comes from.
        labels: [count]; None for an unconditional model.
        settings: sampler, steps and guidance.
        count: images.
        batch: images at once.
        seed: of the noise.
        guidance_channels: guide only the first so many; None guides all.
        title: of the progress bar.

    Raises:
        UserError: more steps than the schedule has, or channels than the latent.
    """
    schedule = Schedule.linear(meta["config"]["diffusion"]["steps"]).respace(settings.steps)
    device = next(model.parameters()).device
    batches = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    with tqdm(
        total=count,
        desc=title,
        unit="image",
        mininterval=0.5 if sys.stderr.isatty() else 10,
        bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]",
    ) as bar:

        def draw_batch(indices: range) -> np.ndarray:
            def count_steps(steps: range) -> Iterator[int]:
                for step in steps:
                    yield step
                    bar.update(len(indices) / len(steps))

            latents = generate(
                model,
                schedule,
                meta["latent_shape"],
                indices,
                [labels[i] for i in indices] if labels else None,
                num_classes=meta["num_classes"],
                sampler=settings.sampler,
                guidance=settings.guidance,
                guidance_channels=guidance_channels,
                seed=seed,
                device=device,
                progress=count_steps,
            )
            return codec.decode(latents)

        return np.concatenate(list((map_batches if device.type == "cpu" else map)(draw_batch, batches)))


def save_npz(path: Path, images: np.ndarray, labels: list[int] | None) -> None:
    """ADM's layout: ``arr_0`` uint8 [N, H, W, 3], and ``arr_1`` the labels where there are some."""
    colour = images if images.shape[3] == 3 else images.repeat(3, axis=3)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, colour, *([np.array(labels)] if labels else []))


def class_rows(images: np.ndarray, labels: list[int] | None, classes: list[int]) -> np.ndarray:
    """A row for each class, in the classes' order; without classes, rows of 8."""
    zoom = max(1, 64 // images.shape[1])
    if labels is None:
        return grid(images[:GRID_UNCONDITIONAL], columns=8, zoom=zoom)
    columns = min(GRID_PER_CLASS, len(images) // len(classes)) or 1
    rows = [np.flatnonzero(np.array(labels) == c)[:columns] for c in classes[:GRID_CLASSES]]
    return grid(images[np.concatenate(rows)], columns=columns, zoom=zoom)
