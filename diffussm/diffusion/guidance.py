"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffussm.errors import UserError


@dataclass(frozen=True)
class Guided:
    """A class-conditional model and the labels to guide it to, as the model of (x, t) that a sampler takes.

    The noise is uncond + scale (cond - uncond): (6) of the paper with scale = 1 + w. The covariance is the conditional
    model's. Both halves share one call of twice the batch; scale 1 needs only the conditional half, and makes no other.

    Attributes:
        model: (x [B, C, ...], t int64 [B], labels int64 [B]) -> [B, 2C, ...].
        labels: int64 [B].
        null_label: the label that stands for none.
        scale: 0 is unconditional, 1 conditional, more is guided.
        channels: guide only the first so many noise channels and leave the rest conditional; None guides all.
            Published DiT samples were made with 3 of 4.
    """

    model: Callable[[Tensor, Tensor, Tensor], Tensor]
    labels: Tensor
    null_label: int
    scale: float
    channels: int | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, 2C, ...] for ``x`` [B, C, ...] at ``t``. UserError if ``channels`` is not in 1..C."""
        guided = x.shape[1] if self.channels is None else self.channels
        if not 1 <= guided <= x.shape[1]:
            raise UserError(f"cannot guide {guided} channels of {x.shape[1]}: ask for 1..{x.shape[1]}")
        if self.scale == 1:
            return self.model(x, t, self.labels)
        labels = torch.cat([self.labels, torch.full_like(self.labels, self.null_label)])
        output = self.model(torch.cat([x, x]), torch.cat([t, t]), labels).float()
        conditional, unconditional = output.chunk(2)
        eps = torch.lerp(unconditional[:, :guided], conditional[:, :guided], self.scale)
        return torch.cat([eps, conditional[:, guided:]], dim=1)
