"""Moving averages of the fp32 weights, kept on each rank for the part of them that the rank's optimizer holds.

An update is a few elementwise operations and no communication.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffussm.training.partition import Partition


class ShardedEMA:
    """Averages of a partition's masters, of one or several lengths.

    After n steps of G images the decay is min(exp(-G / length), n / (n + 9)): an average over ``length`` images that
    does not depend on the batch size, shorter while the run is young.

    Args:
        partition: of an engine with fp32 master weights, at any ZeRO stage.
        lengths: in images.

    Attributes:
        shadows: each length's average, laid out as the masters.
    """

    def __init__(self, partition: Partition, lengths: list[float]) -> None:
        self.partition = partition
        self.shadows: dict[float, list[Tensor]] = {
            length: [master.detach().clone() for master in partition.masters] for length in lengths
        }

    @torch.no_grad()
    def update(self, images: int, batch: int) -> None:
        """After an optimizer step of ``batch`` images, which brought the run to ``images`` seen."""
        step = images / batch
        masters = [master.detach() for master in self.partition.masters]
        for length, shadow in self.shadows.items():
            decay = min(math.exp(-batch / length), step / (step + 9))
            torch._foreach_lerp_(shadow, masters, 1 - decay)

    def gather(self, length: float) -> dict[str, Tensor]:
        """The whole average by parameter name. Collective: every rank calls it and gets it."""
        return self.partition.gather(self.shadows[length])
