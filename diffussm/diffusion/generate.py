"""Latents from a model: noise, guidance and sampler put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffussm.diffusion.guidance import Guided
from diffussm.diffusion.noise import sample_noise
from diffussm.diffusion.samplers import SAMPLERS, Progress
from diffussm.diffusion.schedule import Schedule


def generate(
    model: Callable[..., Tensor],
    schedule: Schedule,
    shape: Sequence[int],
    indices: Sequence[int],
    labels: Sequence[int] | None,
    *,
    num_classes: int,
    sampler: str,
    guidance: float,
    guidance_channels: int | None = None,
    seed: int,
    device: torch.device,
    progress: Progress = iter,
) -> Tensor:
    """Sample latents, float32 [len(indices), C, H, W]. The noise of image i is a function of (seed, i) alone.

    Args:
        model: (x, t, labels) -> [B, 2C, H, W].
        schedule: respaced to the number of sampling steps.
        shape: C, H, W.
        indices: the images' numbers.
        labels: the images' classes; None where the model has none.
        num_classes: 0 for an unconditional model, whose guidance does not count.
        sampler: a key of SAMPLERS.
        guidance: scale; 1 is none.
        guidance_channels: see :class:`Guided`.
        seed: of the noise.
        device: where the model is.
        progress: wraps the loop's steps, as tqdm does.
    """

    def noise(step: int) -> Tensor:
        return sample_noise(seed, indices, shape, step).to(device)

    if num_classes:
        labels = torch.as_tensor(labels, device=device)
        denoiser = Guided(model, labels, num_classes, guidance, guidance_channels)
    else:
        denoiser = model
    return SAMPLERS[sampler](denoiser, noise(0), schedule, noise, progress=progress)
