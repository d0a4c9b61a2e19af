"""Precision and recall by nearest neighbours (Kynkäänniemi et al., arXiv 1904.06991), as ADM's evaluator has them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from diffussm.errors import UserError

NEIGHBOURS = 3
FEWEST = NEIGHBOURS + 1  # images in a set
MAX_REFERENCE = 10_000  # images that ADM compares with; precision and recall depend on their number
BLOCK_ELEMENTS = 1 << 25  # distances held at once
SHOWN_AFTER = 5.0  # seconds


def precision_recall(reference: Tensor, samples: Tensor) -> tuple[float, float]:
    """Of features [N, D] and [M, D], float32.

    A set's manifold is the union of balls round its points, each up to the point's third-nearest other point.
    Precision is the share of samples on the reference's manifold, recall the share of the reference on the samples'.

    Raises:
        UserError: a set of fewer than 4 images.
    """
    # Distances do not depend on the origin; near it, their expansion cancels least.
    centre = reference.mean(0)
    reference, samples = reference - centre, samples - centre
    reference_radii, sample_radii = _squared_radii(reference), _squared_radii(samples)
    on_reference, on_samples = (
        torch.zeros(len(points), dtype=torch.bool, device=points.device) for points in (samples, reference)
    )
    for rows, distances in _squared_distances(samples, reference):
        on_reference[rows] = (distances <= reference_radii).any(1)
        on_samples |= (distances <= sample_radii[rows, None]).any(0)
    return on_reference.double().mean().item(), on_samples.double().mean().item()


def _squared_radii(points: Tensor) -> Tensor:
    """Squared distance [N] of each point to its third-nearest other one."""
    if len(points) <= NEIGHBOURS:
        raise UserError(f"precision and recall need at least {FEWEST} images in each set, got {len(points)}")
    radii = points.new_empty(len(points))
    for rows, distances in _squared_distances(points, points):
        radii[rows] = distances.topk(NEIGHBOURS + 1, largest=False).values[:, -1]  # the nearest is the point itself
    return radii


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of points [N, D] to points [M, D], by blocks: a slice of N, and its distances [rows, M]."""
    b_norms = b.square().sum(1)
    block = max(1, BLOCK_ELEMENTS // len(b))
    starts = range(0, len(a), block)
    for start in tqdm(starts, "precision and recall", unit="block", delay=SHOWN_AFTER, leave=False):
        rows = slice(start, start + block)
        norms = a[rows].square().sum(1, keepdim=True) + b_norms
        yield rows, torch.addmm(norms, a[rows], b.T, alpha=-2).clamp_(min=0)
