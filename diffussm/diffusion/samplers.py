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

import math
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

    ``noise`` is asked for only if ``eta`` > 0. UserError if ``eta`` is not in 0..1, or is above 0 without ``noise``.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"ddim takes eta from 0 to 1, not {eta}")
    if eta > 0 and noise is None:
        raise UserError(f"ddim draws noise at eta {eta}: give it noise, or eta 0")
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


@torch.no_grad()
def dpm_solver(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    noise: Noise | None = None,
    *,
    clip: bool = False,
    progress: Progress = iter,
) -> Tensor:
    """DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095: deterministic, of second order in the log-SNR's steps.

    Each step extrapolates the prediction of the data from the one before. The first has none before it; the one to
    t = 0 is of first order too, since of evenly spaced steps it is by far the longest in log-SNR: to extrapolate there
    makes errors 3 to 5 times as large. The last takes the data that is predicted at t = 0. ``noise`` is not asked for.
    """
    bars = schedule.alphas_cumprod
    alpha, sigma, log_snr = bars.sqrt().tolist(), (1 - bars).sqrt().tolist(), (0.5 * torch.logit(bars)).tolist()
    x = x.float()
    before, h_before = None, math.inf
    for i in progress(range(schedule.steps - 1, -1, -1)):
        t = torch.full((len(x),), i, device=x.device)
        x0 = schedule.predict_x0(x, t, _call(model, x, schedule, i)[:, : x.shape[1]])
        if clip:
            x0 = x0.clamp(-1, 1)
        if i == 0:
            x = x0
        else:
            h = log_snr[i - 1] - log_snr[i]
            data = x0 if before is None or i == 1 else x0 + h / (2 * h_before) * (x0 - before)
            x = sigma[i - 1] / sigma[i] * x - alpha[i - 1] * math.expm1(-h) * data
            before, h_before = x0, h
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ancestral": ancestral, "ddim": ddim, "dpm++": dpm_solver}


def _call(model: Model, x: Tensor, schedule: Schedule, i: int) -> Tensor:
    return model(x, torch.full((len(x),), int(schedule.timesteps[i]), device=x.device)).float()
