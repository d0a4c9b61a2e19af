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

NEGATIVE = 1e-5  # eigenvalues of a covariance that float32 rounded, over its largest
BLOCK = 4096  # samples turned into float64 at once


class Moments:
    """Mean and covariance of features [N, D] that come in parts, in float64; of whatever many in the memory of D × D.

    The first D samples are kept as they are: of so few the covariance has not full rank, and they are its exact and
    smaller factor. More are joined by their centred sums (Chan, Golub and LeVeque 1979), which do not cancel as raw
    sums do.

    Attributes:
        count: samples seen.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self._size = size
        self._kept: list[Tensor] = []  # [n, D] each, while the samples are kept; then:
        self._mean: Tensor | None = None  # [D]
        self._scatter: Tensor | None = None  # [D, D]: sum of centred outer products

    def update(self, features: Tensor) -> None:
        """Take in more samples [n, D]."""
        if self._scatter is None and self.count + len(features) <= self._size:
            self._kept.append(features)
            self.count += len(features)
            return
        for block in (block for part in (*self._let_go(), features) for block in part.split(BLOCK)):
            block = block.double()
            mean = block.mean(0)
            centred = block - mean
            self._join(len(block), mean, centred.T @ centred)

    def combine(self, other: Moments) -> None:
        """Take in all samples that ``other`` has seen."""
        parts = other._kept
        if other._scatter is not None:
            parts = self._let_go()
            self._join(other.count, other._mean, other._scatter)
        for part in parts:
            self.update(part)

    def gaussian(self) -> Gaussian:
        """The Gaussian of these moments, covariance with N - 1.

        Raises:
            UserError: fewer than two samples.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}")
        if self._scatter is not None:
            return Gaussian.of_moments(self._mean, self._scatter / (self.count - 1))
        samples = torch.cat(self._kept).double()
        mean = samples.mean(0)
        return Gaussian(mean, (samples - mean) / math.sqrt(self.count - 1))

    def state(self) -> dict[str, Tensor]:
        """All of it, to be stored."""
        if self._scatter is None:
            return {"samples": torch.cat(self._kept)} if self._kept else {}
        return {"count": torch.tensor(self.count), "mean": self._mean, "scatter": self._scatter}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse, of moments that have seen none."""
        if "scatter" in state:
            self._join(int(state["count"]), state["mean"], state["scatter"])
        elif "samples" in state:
            self.update(state["samples"])

    def _let_go(self) -> list[Tensor]:
        """The samples that are kept, which do not count any more."""
        kept, self._kept = self._kept, []
        self.count -= sum(map(len, kept))
        return kept

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self._scatter is None:
            self.count, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        total = self.count + count
        shift = mean - self._mean
        self._mean += shift * (count / total)
        self._scatter.addr_(shift, shift, alpha=self.count * count / total).add_(scatter)
        self.count = total


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and a factor [R, D] of the covariance: Σ = factorᵀ · factor. R is the smaller of N and D."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def of_samples(cls, features: Tensor) -> Gaussian:
        """Fitted to samples [N, D]. Raises as :meth:`Moments.gaussian`."""
        moments = Moments(features.shape[1])
        moments.update(features)
        return moments.gaussian()

    @property
    def covariance(self) -> Tensor:
        """[D, D]."""
        return self.factor.T @ self.factor

    @classmethod
    def of_moments(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """With a mean [D] and a covariance [D, D]; what rounding made negative of its eigenvalues counts as zero.

        Raises:
            UserError: one is more negative than that.
        """
        mean, covariance = mean.double(), covariance.double()
        lower, failure = torch.linalg.cholesky_ex(covariance)
        if not failure:  # of full rank; many times as fast
            return cls(mean, lower.T)
        values, vectors = torch.linalg.eigh(covariance)
        if not values.min() >= -NEGATIVE * values.abs().max():
            raise UserError(f"a covariance has the eigenvalue {values.min():g}: it is none")
        return cls(mean, values.clamp(min=0).sqrt()[:, None] * vectors.T)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Fréchet distance of two Gaussians of the same dimension; what is called FID."""
    overlap = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    distance = (a.mean - b.mean).square().sum() + a.factor.square().sum() + b.factor.square().sum() - 2 * overlap
    return max(distance.item(), 0.0)  # rounding can bring equal ones just below zero; NaN stays
