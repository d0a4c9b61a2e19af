"""The figures of a run beyond its loss: what the weights, the gradients, the clock and the memory tell.

Each is a dict from a scalar's name to its value, at one record. Those that are collective are the same on every rank.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from diffussm.diffusion.losses import Losses
from diffussm.training.optimizer import sum_of_squares
from diffussm.training.partition import Partition

GROUPS = ("dense", "ssm")  # of the optimizer
RANGES = {"log_dt": "ssm/dt", "log_A_real": "ssm/decay"}  # SSM parameters that are logarithms, and their figures' names
QUARTERS = 4  # of the timesteps
ASIDE = ("save", "samples", "score")  # parts that belong to no step


class LossMeter:
    """Means of the losses since the last record. Nothing but a record waits for the device.

    The overall losses are means of micro-batches' means; those by quarter of the timesteps are means of samples, which
    differ in number from quarter to quarter. Sums are float64 and in a fixed order: equal runs have equal means.

    Args:
        steps: T, of the diffusion.
        device: of the losses.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps = steps
        self._quarters = torch.arange(QUARTERS, device=device).unsqueeze(1)
        # means of total, mse and vlb; micro-batches; by quarter the sum of mse; by quarter the samples
        self._kept = torch.zeros(len(Losses._fields) + 1 + 2 * QUARTERS, dtype=torch.float64, device=device)
        self._new = torch.zeros_like(self._kept)

    @torch.no_grad()
    def add(self, losses: Losses, t: Tensor) -> None:
        """A micro-batch's losses [B] and timesteps [B], all on the device; they wait for :meth:`commit`."""
        means = torch.stack([loss.mean() for loss in losses])
        member = t * QUARTERS // self.steps == self._quarters  # [4, B]; adding by index has no fixed order on a GPU
        mse = torch.where(member, losses.mse, 0.0).sum(1)
        self._new += torch.cat([means, means.new_ones(1), mse, member.sum(1)])

    def commit(self) -> None:
        """Count what was added since: its step was taken."""
        self._kept += self._new
        self._new.zero_()

    def drop(self) -> None:
        """Forget what was added since the last :meth:`commit`: its step was not taken."""
        self._new.zero_()

    def means(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """loss/total, loss/mse, loss/vlb and loss/mse_q1 to _q4 over all ranks. Collective; begins anew.

        What no sample fell into since the last record is left out.
        """
        dist.all_reduce(self._kept, group=group)
        *losses, count = self._kept[: -2 * QUARTERS].tolist()
        mse, samples = self._kept[-2 * QUARTERS :].view(2, QUARTERS).tolist()
        self._kept.zero_()
        means = {f"loss/{name}": loss / count for name, loss in zip(Losses._fields, losses, strict=True) if count}
        return means | {f"loss/mse_q{q + 1}": mse[q] / samples[q] for q in range(QUARTERS) if samples[q]}


class StepClock:
    """Where this rank's time goes: ``with clock.part("forward"): ...``; it starts when it is made.

    On a GPU, parts take the time between two events on its stream, which only the record reads. The part "data" takes
    the time that the host waits; so do "save", "samples" and "score", which let the device finish its steps first.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begin()

    def _begin(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside counts as ``name``."""
        if self.device.type == "cuda" and name not in ("data", *ASIDE):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            if name in ASIDE:
                self._finish()
            begun = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begun

    def means(self, steps: int) -> dict[str, float]:
        """time/PART_ms for each part, and time/step_ms, over the ``steps`` since the last record; begins anew.

        The latter is the time that has passed, but for :data:`ASIDE`.
        """
        self._finish()
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1e3
        step = time.perf_counter() - self._start - sum(self._seconds[name] for name in ASIDE if name in self._seconds)
        means = {f"time/{name}_ms": 1e3 * seconds / steps for name, seconds in (*self._seconds.items(), ("step", step))}
        self._begin()
        return means

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.no_grad()
def weight_figures(partition: Partition, shadows: Mapping[float, list[Tensor]]) -> dict[str, float]:
    """Norms of the weights, ranges of the SSM's Δ and |Re A|, and each average's distance. Collective, in two calls.

    Args:
        partition: of the fp32 weights.
        shadows: averages by their length in images, laid out as the masters: :attr:`ShardedEMA.shadows`.

    Returns:
        norm/dense and norm/ssm; ssm/dt_min, _max (S4D's Δ) and ssm/decay_min, _max (|Re A| = exp(log_A_real)); and
        ema/distance_LENGTH = ||average - w|| / ||w||.
    """
    home = partition.masters[0].device
    squares = {key: [torch.zeros((), dtype=torch.float64, device=home)] for key in (*GROUPS, *shadows)}
    lows = {name: [torch.full((2,), torch.inf, device=home)] for name in RANGES}  # of values, of negatives
    for fragment in partition.fragments:
        weight = fragment.of(partition.masters)
        squares[fragment.group].append(sum_of_squares(weight))
        for length, shadow in shadows.items():
            squares[length].append(sum_of_squares(fragment.of(shadow) - weight))
        if (name := fragment.name.rpartition(".")[2]) in RANGES:
            lows[name].append(torch.stack([weight.amin(), (-weight).amin()]))
    sums = torch.stack([torch.stack(each).sum() for each in squares.values()]).to(partition.device)
    bounds = torch.stack([torch.stack(each).amin(0) for each in lows.values()]).to(partition.device)
    dist.all_reduce(sums)
    dist.all_reduce(bounds, dist.ReduceOp.MIN)
    norms = dict(zip(squares, sums.sqrt().tolist(), strict=True))
    figures = {f"norm/{group}": norms[group] for group in GROUPS}
    for name, (low, negative_high) in zip(RANGES.values(), bounds, strict=True):
        figures |= {f"{name}_min": low.exp().item(), f"{name}_max": (-negative_high).exp().item()}
    whole = sum(norms[group] ** 2 for group in GROUPS) ** 0.5
    return figures | {f"ema/distance_{length:.0f}": norms[length] / whole for length in shadows}


def gradient_norms(
    squares: Mapping[str, float | Tensor], global_norm: float | Tensor | None, device: torch.device, whole: bool = False
) -> dict[str, float]:
    """grad_norm/GROUP before clipping. Collective unless ``whole``.

    Args:
        squares: :attr:`NormedAdamW.squares` of one step, after clipping; empty if it was not taken, which gives {}.
        global_norm: of all gradients before clipping, as the engine tells it; None if they were not clipped.
        device: where collectives work.
        whole: every rank has all gradients, as at ZeRO stage 0.
    """
    if not squares:
        return {}
    sums = torch.tensor([float(square) for square in squares.values()], dtype=torch.float64, device=device)
    if not whole:
        dist.all_reduce(sums)
    norms = sums.sqrt()
    if global_norm is not None and norms.any():
        norms *= float(global_norm) / sums.sum().sqrt()  # clipping scales all groups alike
    return {f"grad_norm/{group}": norm for group, norm in zip(squares, norms.tolist(), strict=True)}


def memory_figures(device: torch.device) -> dict[str, float]:
    """GiB of the rank that has most. Collective.

    On a GPU memory/allocated_gib and memory/reserved_gib, the highest since the last call; on a CPU memory/rss_gib, the
    process's now.
    """
    if device.type == "cuda":
        used = {
            "memory/allocated_gib": torch.cuda.max_memory_allocated(device),
            "memory/reserved_gib": torch.cuda.max_memory_reserved(device),
        }
        torch.cuda.reset_peak_memory_stats(device)
    else:
        import psutil  # DeepSpeed needs it too: whoever trains has it

        used = {"memory/rss_gib": psutil.Process().memory_info().rss}
    most = torch.tensor(list(used.values()), dtype=torch.float64, device=device) / 2**30
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return dict(zip(used, most.tolist(), strict=True))
