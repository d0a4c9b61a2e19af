"""The Fréchet distance between two sets of features, each taken for a Gaussian (Heusel et al., arXiv 1706.08500).

    |μ1 - μ2|² + tr Σ1 + tr Σ2 - 2 tr (Σ1 Σ2)^½

With factors Σ = FᵀF, the eigenvalues of Σ1 Σ2 are the squared singular values of F1 F2ᵀ, so tr (Σ1 Σ2)^½ is the sum of
the latter. That holds for singular covariances too, and is cheap for fewer samples than dimensions: F is then the
centred samples themselves. All of it in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffussm.errors import UserError

BLOCK = 4096  # samples turned into float64 at once


class Moments:
    """Mean and covariance of features that come in parts, in float64.

    Parts are joined by their centred sums (Chan, Golub and LeVeque 1979), which does not cancel as raw sums do.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)  # [D]
        self._scatter = torch.zeros(size, size, dtype=torch.float64)  # [D, D]: sum of centred outer products

    def update(self, features: Tensor) -> None:
        """Take in more samples [N, D]."""
        for block in features.split(BLOCK):
            block = block.double()
            part = Moments(len(self.mean))
            part.count = len(block)
            part.mean = block.mean(0)
            centred = block - part.mean
            part._scatter = centred.T @ centred
            self.combine(part)

    def combine(self, other: Moments) -> None:
        """Take in all samples that ``other`` has seen."""
        total = self.count + other.count
        if total == 0:
            return
        shift = other.mean - self.mean
        self.mean += shift * (other.count / total)
        self._scatter += other._scatter + torch.outer(shift, shift) * (self.count * other.count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """[D, D], divided by N - 1.

        Raises:
            UserError: fewer than two samples.
        """
        return self._scatter / _degrees_of_freedom(self.count)


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and a factor [R, D] of the covariance: Σ = factorᵀ · factor. R is the smaller of N and D."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def of_samples(cls, features: Tensor) -> Gaussian:
        """Fitted to samples [N, D], covariance with N - 1.

        Raises:
            UserError: fewer than two samples.
        """
        count, size = features.shape
        if count > size:
            moments = Moments(size)
            moments.update(features)
            return cls.of_moments(moments.mean, moments.covariance)
        features = features.double()
        mean = features.mean(0)
        return cls(mean, (features - mean) / math.sqrt(_degrees_of_freedom(count)))

    @classmethod
    def of_moments(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """With a mean [D] and a covariance [D, D]; what rounding made negative of its eigenvalues counts as zero."""
        mean, covariance = mean.double(), covariance.double()
        lower, failure = torch.linalg.cholesky_ex(covariance)
        if not failure:  # of full rank; many times as fast
            return cls(mean, lower.T)
        values, vectors = torch.linalg.eigh(covariance)
        return cls(mean, values.clamp(min=0).sqrt()[:, None] * vectors.T)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Fréchet distance of two Gaussians of the same dimension; what is called FID."""
    overlap = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    distance = (a.mean - b.mean).square().sum() + a.factor.square().sum() + b.factor.square().sum() - 2 * overlap
    return max(0.0, distance.item())  # rounding can bring equal ones just below zero


def _degrees_of_freedom(count: int) -> int:
    if count < 2:
        raise UserError(f"a covariance needs at least 2 images, got {count}")
    return count - 1
