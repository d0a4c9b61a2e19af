"""Samplers: functions from noise x_T to data.

Each takes (model, x, schedule, noise, ...) and returns a float32 sample of x's shape [B, C, ...]:

    model      (x, t) -> [B, C or 2C, ...]: predicted noise, then the covariance's v where the sampler uses one.
               t, int64 [B], are the steps that the model was trained on, whatever the schedule's spacing.
    x          x_T, standard normal
    schedule   already respaced to the number of steps to take
    noise      step -> standard normal of x's shape, on any device. step counts the transitions from 1; 0 is left for
               x_T. The last transition adds no noise and asks for none.
    clip       clamp each prediction of the data to [-1, 1]: for pixels, not for latents
    progress   wraps the loop's steps, as tqdm does
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from diffussm.diffusion.schedule import Schedule
from diffussm.errors import UserError

Model = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]
Progress = Callable[[range], Iterable[int]]


@torch.no_grad()
def ancestral(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    noise: Noise,
    *,
    clip: bool = False,
    progress: Progress = iter,
) -> Tensor:
    """DDPM's sampler, algorithm 2 of arXiv 2006.11239, with the covariance that the model predicts (iDDPM)."""
    x = x.float()
    for i in progress(range(schedule.steps - 1, -1, -1)):
        t = torch.full((len(x),), i, device=x.device)
        eps, v = _call(model, x, schedule, i).split(x.shape[1], dim=1)
        x0 = schedule.predict_x0(x, t, eps)
        if clip:
            x0 = x0.clamp(-1, 1)
        x, _, _ = schedule.posterior(x0, x, t)
        if i > 0:
            x = x + torch.exp(0.5 * schedule.log_variance_from(v, t)) * noise(schedule.steps - i).to(x)
    return x


@torch.no_grad()
def ddim(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    noise: Noise | None = None,
    *,
    eta: float = 0.0,
    clip: bool = False,
    progress: Progress = iter,
) -> Tensor:
    """DDIM, (12) and (16) of arXiv 2010.02502: deterministic at ``eta`` 0, DDPM with covariance β̃ at 1.

    ``noise`` is asked for only if ``eta`` > 0. UserError if ``eta`` is not in 0..1.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"ddim takes eta from 0 to 1, not {eta}")
    x = x.float()
    for i in progress(range(schedule.steps - 1, -1, -1)):
        t = torch.full((len(x),), i, device=x.device)
        eps = _call(model, x, schedule, i)[:, : x.shape[1]]
        x0 = schedule.predict_x0(x, t, eps)
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = schedule.predict_eps(x, t, x0)
        previous = schedule.alphas_cumprod_prev[i].item()
        variance = eta**2 * schedule.posterior_variance[i].item()
        x = previous**0.5 * x0 + (1 - previous - variance) ** 0.5 * eps
        if variance > 0:
            x = x + variance**0.5 * noise(schedule.steps - i).to(x)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ancestral": ancestral, "ddim": ddim}


def _call(model: Model, x: Tensor, schedule: Schedule, i: int) -> Tensor:
    return model(x, torch.full((len(x),), int(schedule.timesteps[i]), device=x.device)).float()
