"""The training loss of a model that predicts noise and the reverse process's covariance (iDDPM, arXiv 2102.09672)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffussm.diffusion.gaussian import discretized_gaussian_log_likelihood, normal_kl
from diffussm.diffusion.schedule import Schedule


class Losses(NamedTuple):
    """Float32 [B] each: ``mse`` and ``vlb`` (in bits) are means over dimensions, ``total`` their weighted sum."""

    total: Tensor
    mse: Tensor
    vlb: Tensor


def hybrid_loss(output: Tensor, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Losses:
    """L_hybrid, iDDPM (16): the noise is learned by its squared error, the covariance by the variational bound.

    Args:
        output: [B, 2C, ...], the predicted noise and the covariance's v, of any float type.
        x0: data [B, C, ...].
        x_t: ``schedule.q_sample(x0, t, noise)``.
        noise: standard normal [B, C, ...].
        t: int64 [B].
        schedule: the schedule that ``t`` indexes.

    The bound's term at t is weighted by T/1000: iDDPM's λ = 0.001 times the T terms that one t stands for.
    """
    eps, v = output.float().split(x0.shape[1], dim=1)
    mse = _mean((noise - eps).square())
    vlb = _variational_bound(eps.detach(), v, x0, x_t, t, schedule)  # the bound must not move the mean
    return Losses(mse + schedule.steps / 1000 * vlb, mse, vlb)


def _variational_bound(eps: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """One term of L_vlb, in bits per dimension [B]: iDDPM (4) to (6)."""
    true_mean, _, true_log_variance = schedule.posterior(x0, x_t, t)
    mean, _, _ = schedule.posterior(schedule.predict_x0(x_t, t, eps), x_t, t)
    log_variance = schedule.log_variance_from(v, t)
    kl = _mean(normal_kl(true_mean, true_log_variance, mean, log_variance))
    reconstruction = -_mean(discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance))
    return torch.where(t == 0, reconstruction, kl) / math.log(2)


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
