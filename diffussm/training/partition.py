"""What this rank's optimizer holds, and which pieces of which parameters that is: one table for every ZeRO stage.

DeepSpeed lays the fp32 weights that a rank steps out as a few flat tensors. Stages 1 and 2 cut a group of joined
parameters into one piece a rank; stage 3 cuts each parameter; stage 0 keeps all of them on every rank. Checkpoints,
averages and norms read and write those pieces by parameter name, and need neither a gather nor DeepSpeed's formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


@dataclass(frozen=True)
class Fragment:
    """Elements ``start`` to ``start + size`` of a flattened parameter, at ``offset`` of the flat tensor ``flat``.

    Of all ranks together, each element of each parameter is in exactly one fragment.
    """

    name: str  # of the parameter
    group: str  # of the optimizer: dense or ssm
    start: int
    size: int
    flat: int
    offset: int

    def of(self, flats: list[Tensor]) -> Tensor:
        """The view of the fragment [size] in tensors that are laid out as :attr:`Partition.masters`."""
        return flats[self.flat].detach().view(-1)[self.offset : self.offset + self.size]


class Partition:
    """This rank's share of an engine's optimizer.

    Attributes:
        masters: the flat fp32 weights that it steps; at stage 0 the parameters themselves.
        fragments: what of them counts as this rank's; padding is in none.
        shapes: of the parameters, by name.
    """

    def __init__(self, engine: Any) -> None:
        self.optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self.device = engine.device  # where collectives work; with offloading the masters are elsewhere
        self._replicated = engine.zero_optimization_stage() == 0
        locate, self.masters = _layout(engine)
        self.fragments: list[Fragment] = []
        self.shapes: dict[str, torch.Size] = {}
        for number, (name, parameter) in enumerate(engine.module.named_parameters()):
            group = "ssm" if getattr(parameter, "is_ssm", False) else "dense"
            self.shapes[name] = getattr(parameter, "ds_shape", parameter.shape)  # stage 3 leaves nothing in its place
            place = locate(number, parameter)
            if place is not None:
                self.fragments.append(Fragment(name, group, *place))

    @torch.no_grad()
    def gather(self, flats: list[Tensor]) -> dict[str, Tensor]:
        """Whole tensors, by parameter name, of what all ranks hold in their ``flats``. Collective: all get them."""
        mine: dict[str, list[Fragment]] = {}
        for fragment in self.fragments:
            mine.setdefault(fragment.name, []).append(fragment)
        whole = {}
        for name, shape in self.shapes.items():
            flat = torch.zeros(shape.numel(), device=self.device)
            for fragment in mine.get(name, ()):
                flat[fragment.start : fragment.start + fragment.size] = fragment.of(flats)
            dist.all_reduce(flat)  # each element is in one fragment, and 0 elsewhere
            whole[name] = flat.view(shape)
        return whole

    def complete(self, flats: list[Tensor]) -> None:
        """Stage 0 keeps all on every rank: there each rank takes the others' fragments over. Collective."""
        for number, flat in enumerate(flats if self._replicated else ()):
            dist.broadcast(flat.detach(), number % dist.get_world_size())

    def moments(self, key: str) -> list[Tensor]:
        """One of Adam's moments, laid out as the masters: zeros before the first step, which takes what is written."""
        return [self._state(master)[key] for master in self.masters]

    @property
    def steps(self) -> int:
        """Steps that Adam has taken, by which it corrects its moments."""
        states = [self.optimizer.state.get(master) for master in self.masters]
        return max((int(state["step"]) for state in states if state), default=0)

    @steps.setter
    def steps(self, count: int) -> None:
        for master in self.masters:
            self._state(master)["step"].fill_(count)

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state[master]
        if not state:  # as torch's AdamW begins
            fused = self.optimizer.defaults.get("fused")
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if fused else "cpu")
            for key in MOMENTS:
                state[key] = torch.zeros_like(master, memory_format=torch.preserve_format)
        return state


Place = tuple[int, int, int, int]  # start, size, flat, offset
Locate = Callable[[int, Any], Place | None]


def _layout(engine: Any) -> tuple[Locate, list[Tensor]]:
    """Where a parameter, given with its number, lies on this rank; and the flat tensors."""
    rank, ranks, stage = dist.get_rank(), dist.get_world_size(), engine.zero_optimization_stage()
    optimizer = engine.optimizer

    def whole(number: int, parameter: Any) -> Place | None:
        return (0, parameter.numel(), number, 0) if number % ranks == rank else None

    def joined(number: int, parameter: Any) -> Place | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        return lp.start, lp.numel, mapping.param_group_index, hp.start

    def cut(number: int, parameter: Any) -> Place | None:
        flat, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = rank * padded
        size = min(padded, parameter.ds_numel - start)
        return (start, size, flat, offset) if size > 0 else None

    if stage == 0:
        return whole, list(engine.module.parameters())
    if stage == 3:
        return cut, list(optimizer.fp32_partitioned_groups_flat)
    return joined, list(optimizer.single_partition_of_fp32_groups)
