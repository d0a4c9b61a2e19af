"""What the benchmarks share: timing by turns, memory in fresh processes, profiles, goals and the report.

Candidates run by turns, A B A B ..., so that whatever slows the machine meanwhile slows them alike, and a figure is the
ratio of two medians of wall time: wall, not CPU time, since how well threads are used is part of what is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from diffussm.commands.common import Parser, emit_json

Result = TypeVar("Result")
OTHER_WORK = 0.03  # of the machine's time, from which figures are doubtful: one thread that waits holds up the rest
TURN_SECONDS = 0.05  # a faster candidate is called again and again in its turn
OPERATORS = {  # kinds in a profile, by how an operator's name begins; the first that fits
    "GEMM": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm", "aten::mkldnn_linear"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::_efficient"),
    "FFT": ("aten::_fft",),
    "copies": (
        "aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::zero_", "aten::flip", "aten::constant_pad",
        "aten::slice_backward", "aten::index", "aten::resolve_conj", "aten::contiguous",
    ),
    "exp": ("aten::exp", "aten::sin", "aten::cos"),
    "elementwise and sums": ("aten::",),
}  # fmt: skip


def make_parser(name: str, description: str) -> Parser:
    """For ``python -m benchmarks.NAME``: ``--quick`` and ``--json``."""
    parser = Parser(description, f"python -m benchmarks.{name} --quick")
    parser.add_argument("--quick", action="store_true", help="fewer rounds of fewer shapes: within 60 s on 2 cores")
    parser.add_json_option()
    return parser


def add_device_option(parser: Parser) -> None:
    """``--device``, by default a GPU where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, default=default, help="cpu or cuda (default here: %(default)s)")


def usable_device(name: str) -> torch.device:
    if name == "cpu" or (name == "cuda" and torch.cuda.is_available()):
        return torch.device(name)
    raise argparse.ArgumentTypeError(f"{name!r} is not a device of this machine")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What figures hold for: processor, cores that this process may use, torch's threads, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


class OtherWork:
    """How much of the machine's cores other processes take from now on. Known on Linux only."""

    def __init__(self) -> None:
        self.start = self._now()

    def share(self) -> float:
        elapsed, everything, own = (now - start for now, start in zip(self._now(), self.start, strict=True))
        return max(0.0, (everything - own) / (elapsed * os.cpu_count()))

    def _now(self) -> tuple[float, float, float]:
        """Seconds: the time, the cores' in use, and what of that is this process's and its children's."""
        own = sum(os.times()[:4])
        if sys.platform != "linux":
            return time.perf_counter(), own, own
        user, nice, system, _, _, *interrupts_and_stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
        used = user + nice + system + sum(interrupts_and_stolen)
        return time.perf_counter(), used / os.sysconf("SC_CLK_TCK"), own


def synchronize(device: torch.device) -> None:
    """Wait for the work that has been given to ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, title: str = ""
) -> dict[str, float]:
    """Median wall seconds of a call of each candidate, over ``rounds`` turns each, after a warm-up.

    A turn is one call, or as many as make 50 ms of a fast candidate, whose mean then counts.
    """
    calls, times = {}, {name: [] for name in candidates}
    for name, candidate in candidates.items():
        seconds = _seconds(candidate, 1, device)
        if seconds < 1:  # the first call also chose backends and started threads
            seconds = _seconds(candidate, 1, device)
        calls[name] = max(1, round(TURN_SECONDS / seconds))
    for _ in tqdm(range(rounds), desc=title, leave=False, disable=None):
        for name, candidate in candidates.items():
            times[name].append(_seconds(candidate, calls[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(candidate: Callable[[], object], calls: int, device: torch.device) -> float:
    """Of a call, as the mean of ``calls``."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        candidate()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def without_gradients(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A forward pass alone."""
    return torch.no_grad()(function)


def with_gradients(function: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; the gradients are handed out, not accumulated."""

    def train() -> tuple[Tensor, ...]:
        out = function()
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return train


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)`` in a new Python process: its memory owes nothing to what ran before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Bytes by which ``function`` at its peak exceeds what is held before it; to be asked in a fresh process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed: it would hide a part of the peak
    before = _process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    function()
    return _process_memory("VmHWM") - before


def _process_memory(key: str) -> int:
    """Bytes. Not ru_maxrss: a process inherits its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def profile_shares(function: Callable[[], object], device: torch.device, calls: int = 3) -> dict[str, float]:
    """Shares of the time that kinds of operators take in ``function``, by torch.profiler, the largest first."""
    function()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as recorded:
        for _ in range(calls):
            function()
        synchronize(device)
    spent: dict[str, float] = {}
    for event in recorded.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a GPU's kernel, which the operator that started it counts as its own
        kind = "Python and dispatch"
        if event.key.startswith("aten::"):
            kind = next(kind for kind, names in OPERATORS.items() if event.key.startswith(names))
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[kind] = spent.get(kind, 0.0) + own
    total = sum(spent.values())
    return {kind: round(value / total, 3) for kind, value in sorted(spent.items(), key=lambda item: -item[1])}


@dataclass(frozen=True)
class Goal:
    """A figure that the project has promised.

    Attributes:
        name: of the figure.
        value: what was measured; None: it could not be.
        goal: what was promised.
        at_most: a smaller value is better.
        note: why there is no value.
    """

    name: str
    value: float | None
    goal: float
    at_most: bool = False
    note: str = ""

    @property
    def ok(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def line(self, width: int) -> str:
        """``name value goal ok|short``."""
        value = "–" if self.value is None else f"{self.value:.3g}"
        verdict = {True: "ok", False: "short", None: f"not measured: {self.note}"}[self.ok]
        return f"{self.name:{width}}  {value:>7}  {'≤' if self.at_most else '≥'} {self.goal:<5g} {verdict}"

    def as_json(self) -> dict[str, Any]:
        value = {"name": self.name, "value": self.value, "goal": self.goal, "ok": self.ok}
        return value if self.value is not None else value | {"note": f"not measured: {self.note}"}


@dataclass
class Report:
    """What a benchmark found. Rows are dicts of figures with a ``name``; those with a ``ratio`` are shown first.

    Attributes:
        title: what the ratios are of.
        device: on which it was measured.
    """

    title: str
    device: torch.device
    goals: list[Goal] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    other_work: OtherWork = field(default_factory=OtherWork)

    def finish(self, json_target: str | None) -> None:
        """Print ratios, goals and rows, and write the JSON that ``--json`` asked for."""
        machine = describe_machine(self.device)
        machine["other_work"] = others = round(self.other_work.share(), 3)
        if others > OTHER_WORK:
            self.notes.append(f"other processes took {others:.0%} of this machine: measure again when it is idle")
        if json_target != "-":
            self._print(machine)
        goals = [goal.as_json() for goal in self.goals]
        emit_json(json_target, {"machine": machine, "goals": goals, "rows": self.rows, "notes": self.notes})

    def _print(self, machine: dict[str, Any]) -> None:
        width = max(len(item) for item in [*(row["name"] for row in self.rows), *(goal.name for goal in self.goals)])
        print(self.title)
        for row in self.rows:
            if "ratio" in row:
                print(f"  {row['name']:{width}}  {row['ratio']:7.3g}×")
        print("goals")
        for goal in self.goals:
            print(f"  {goal.line(width)}")
        print("figures")
        for row in self.rows:
            figures = [f"{key} {_number(value)}" for key, value in row.items() if key not in ("name", "ratio")]
            if figures:
                print(f"  {row['name']:{width}}  {'  '.join(figures)}")
        for note in self.notes:
            print(note)
        print(", ".join(f"{key} {value}" for key, value in machine.items()))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def say(line: str) -> None:
    """A line of progress, on stderr."""
    print(line, file=sys.stderr, flush=True)
