"""What the variational bound is made of. Everything is per element, in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_BIN = 1 / 255  # 8-bit data scaled to [-1, 1] lie 2/255 apart


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))); the arguments broadcast."""
    log_ratio = log_variance1 - log_variance2
    distance = (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + distance)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the mass that N(mean, exp(log_scale)²) has in the bin of ``x``: DDPM (13).

    Bins are 2/255 wide and centred on the 256 values of 8-bit data scaled to [-1, 1]; the first and the last reach to
    infinity. Mass is floored at 1e-12, which bounds the loss where a prediction is far off.
    """
    # The normal is symmetric, so measure from the mean outwards: both edges then lie in the lower tail, where the
    # difference of two values of the CDF keeps its digits.
    distance = (x - mean).abs()
    mass = _cdf(HALF_BIN - distance, log_scale) - _cdf(-HALF_BIN - distance, log_scale)
    mass = torch.where(x < -0.999, _cdf(x - mean + HALF_BIN, log_scale), mass)
    mass = torch.where(x > 0.999, _cdf(mean - x + HALF_BIN, log_scale), mass)
    return mass.clamp(min=1e-12).log()


def _cdf(x: Tensor, log_scale: Tensor) -> Tensor:
    """P(X < x) of N(0, exp(log_scale)²); by erfc, since ``torch.special.ndtr`` rounds the lower tail to 0 at -6."""
    return 0.5 * torch.erfc(-math.sqrt(0.5) * x * torch.exp(-log_scale))
