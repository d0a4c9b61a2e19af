"""AdamW that tells the size of the gradients it is given, and can refuse those that are not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 2**22  # elements that are float64 at a time


def sum_of_squares(values: Tensor) -> Tensor:
    """||values||² in float64 [], at no more than 32 MiB of memory: torch converts a whole tensor before it sums."""
    norms = [torch.linalg.vector_norm(chunk, dtype=torch.float64) for chunk in values.flatten().split(CHUNK)]
    return torch.stack(norms).square().sum()


class NormedAdamW(torch.optim.AdamW):
    """torch's AdamW, to the bit, for a DeepSpeed engine at any ZeRO stage.

    DeepSpeed trusts torch's own class only: its config needs ``"zero_allow_untested_optimizer": true``.

    Args:
        params: groups, each with a ``name``.
        guard: see ``overflow``; for ZeRO stage 0, where every rank has whole gradients and DeepSpeed does not look.
        options: AdamW's.

    Attributes:
        recording: whether steps add to ``squares``.
        squares: by group, the sum of squares of this rank's gradients, float64 [], over the calls of :meth:`step` since
            the dict was last cleared: DeepSpeed makes one for each group or part of one.
        overflow: with ``guard``, whether the last step did nothing since a gradient was not finite, or too large for
            its norm to be. The engine reads it, and then reports that no step was applied.
    """

    def __init__(self, params: list[dict[str, Any]], guard: bool = False, **options: Any) -> None:
        super().__init__(params, **options)
        self.guard = guard
        self.recording = False
        self.squares: dict[str, Tensor] = {}
        self.overflow = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        gradients = {
            group["name"]: [p.grad for p in group["params"] if p.grad is not None] for group in self.param_groups
        }
        if self.guard:
            norms = torch._foreach_norm([gradient for each in gradients.values() for gradient in each])
            self.overflow = not bool(torch.stack(norms).isfinite().all())
            if self.overflow:
                return
        if self.recording:
            for name, each in gradients.items():
                for gradient in each:
                    self.squares[name] = self.squares.get(name, 0) + sum_of_squares(gradient)
        super().step()
