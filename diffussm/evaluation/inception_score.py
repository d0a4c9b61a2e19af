"""The inception score (Salimans et al., arXiv 1606.03498), as ADM's evaluator computes it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.special import entr

CHUNK = 5000  # images


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean KL(p(y|x) ‖ p(y)) of class probabilities [N, K], averaged over consecutive chunks of 5000.

    From 1 (every image alike to the classifier) to K (each image surely of one class, all classes equally often).
    """
    scores = []
    for chunk in probabilities.double().split(CHUNK):
        divergence = entr(chunk.mean(0)).sum() - entr(chunk).sum(1).mean()  # H(y) - H(y|x)
        scores.append(divergence.exp())
    return torch.stack(scores).mean().item()
