"""The inception score (Salimans et al., arXiv 1606.03498), as ADM's evaluator computes it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.special import entr

CHUNK = 5000  # images


class InceptionScore:
    """exp of the mean KL(p(y|x) ‖ p(y)) of class probabilities [N, K], averaged over consecutive chunks of 5000.

    From 1 (every image alike to the classifier) to K (each image surely of one class, all classes equally often). The
    probabilities come in parts, in any order; of each chunk a sum of K and three numbers are kept.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # by chunk, float64 [K + 2]: Σ p, Σ H(p), how many

    def update(self, first: int, probabilities: Tensor) -> None:
        """Take in those of the images from number ``first``."""
        probabilities = probabilities.double()
        done = 0
        while done < len(probabilities):
            chunk, within = divmod(first + done, CHUNK)
            part = probabilities[done : done + CHUNK - within]
            extra = torch.stack([entr(part).sum(), torch.tensor(float(len(part)), dtype=torch.float64)])
            self._add(chunk, torch.cat([part.sum(0), extra]))
            done += len(part)

    def combine(self, other: InceptionScore) -> None:
        """Take in all that ``other`` has seen."""
        for chunk, sums in other._sums.items():
            self._add(chunk, sums)

    def value(self) -> float:
        scores = []
        for sums in self._sums.values():
            *_, entropy, count = sums
            divergence = entr(sums[:-2] / count).sum() - entropy / count  # H(y) - H(y|x)
            scores.append(divergence.exp())
        return torch.stack(scores).mean().item()

    def state(self) -> dict[str, Tensor]:
        """All of it, to be stored."""
        return {str(chunk): sums for chunk, sums in self._sums.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse, of one that has seen none."""
        self._sums = {int(chunk): sums for chunk, sums in state.items()}

    def _add(self, chunk: int, sums: Tensor) -> None:
        self._sums[chunk] = self._sums[chunk] + sums if chunk in self._sums else sums
