"""A moving average of the fp32 weights, kept on each rank for the part of them that the rank's optimizer holds.

An update is a few elementwise operations and no communication; only exporting and loading gather or spread weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ShardedEMA:
    """EMA of an engine's master weights.

    After n steps of G images the decay is min(exp(-G / length), n / (n + 9)): an average over ``length`` images that
    does not depend on the batch size, shorter while the run is young.

    Args:
        engine: DeepSpeed's, at any ZeRO stage, with fp32 master weights.
        length: of the average, in images.
    """

    def __init__(self, engine: Any, length: float) -> None:
        self.engine = engine
        self.length = length
        self.masters = _masters(engine)
        self.shadow = [master.detach().clone() for master in self.masters]

    @torch.no_grad()
    def update(self, images: int, batch: int) -> None:
        """After an optimizer step of ``batch`` images, which brought the run to ``images`` seen."""
        step = images / batch
        decay = min(math.exp(-batch / self.length), step / (step + 9))
        torch._foreach_lerp_(self.shadow, [master.detach() for master in self.masters], 1 - decay)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The whole average by parameter name, fp32 on the CPU. Collective: every rank calls it and gets it."""
        from deepspeed.utils import safe_get_full_fp32_param

        with self._swapped():
            return {
                name: (parameter if full is None else full).detach().cpu().clone()
                for name, parameter in self.engine.module.named_parameters()
                for full in [safe_get_full_fp32_param(parameter)]
            }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a whole average, at whatever world size it was saved. Every rank calls it."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param

        with self._swapped():
            for name, parameter in self.engine.module.named_parameters():
                value = state[name].to(self.engine.device)
                if hasattr(parameter, "ds_id"):  # DeepSpeed's own setter forgets that partitions are padded
                    partition = safe_get_local_fp32_param(parameter)
                    padded = value.new_zeros(partition.numel() * dist.get_world_size())
                    padded[: value.numel()] = value.flatten()
                    partition.copy_(padded.view(dist.get_world_size(), -1)[dist.get_rank()].view_as(partition))
                elif hasattr(parameter, "_hp_mapping"):
                    safe_set_full_fp32_param(parameter, value)
                else:
                    parameter.copy_(value)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        """The average in the place of the masters, where DeepSpeed's accessors find it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for master, shadow in zip(self.masters, self.shadow, strict=True):
            weights = master.detach().clone()
            master.data.copy_(shadow)
            shadow.copy_(weights)


def _masters(engine: Any) -> list[Tensor]:
    """This rank's fp32 weights: the partitions that the optimizer steps, or at stage 0 the parameters themselves."""
    if engine.zero_optimization_stage() == 0:
        return list(engine.module.parameters())
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)
