"""Memory of real training runs on a CPU against the estimate of `tools/plan_run.py`.

    python -m benchmarks.memory                    about 3 minutes on 2 cores
    python -m benchmarks.memory --quick            smaller models

A run is the real entry point, diffussm/train.py: two steps and a checkpoint, in fp32. Its memory is the largest peak of
resident memory among its processes, less the baseline: the peak of the same run of a model of next to no parameters,
which is that of interpreter, libraries, communication and data. In one run activations dominate, in the other
parameters, their gradients and the optimizer, which ZeRO 2 shares between two ranks.

The estimate is of what tensors hold. glibc's heap keeps some of what they have given back; runs that have it take large
tensors from the system and return them at once (MALLOC_MMAP_THRESHOLD_) tell how much. They have no goal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.common import Goal, Report, make_parser, say
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.config import parse
from diffussm.data.encode import encode
from diffussm.data.index import Index
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.errors import UserError, run_command
from diffussm.training.plan import Plan

ROOT = Path(__file__).parent.parent
GOAL = 0.2  # most by which the estimate may miss
ZERO_STAGE = 2
IMAGES, CLASSES = 64, 2
POLL_SECONDS = 0.05
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}  # bytes; otherwise glibc raises it as it goes, to 32 MiB
MB = 1e6


class Case(NamedTuple):
    """A run.

    Attributes:
        name: of what dominates.
        ranks: processes.
        size: of the images; latents are 4 × size/2 × size/2.
        width: D.
        depth: blocks.
        batch: images a rank and step.
        checkpointing: of activations.
    """

    name: str
    ranks: int
    size: int
    width: int
    depth: int
    batch: int
    checkpointing: bool = False


CASES = [Case("activations", 1, 64, 256, 8, 8), Case("parameters", 2, 16, 768, 5, 2)]
QUICK = [case._replace(depth=3 * case.depth // 4) for case in CASES]


def main() -> None:
    arguments = make_parser("memory", "Memory of training runs on a CPU against the plan's estimate.").parse_args()
    if sys.platform != "linux":
        raise UserError("the peaks of processes are read from /proc: this benchmark needs Linux")
    report = Report("estimated memory ÷ measured", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        for case in QUICK if arguments.quick else CASES:
            encode_noise(Path(folder), case.size)
            baseline = peak_memory(case._replace(width=8, depth=1, batch=1), Path(folder))
            row = compare(case, Path(folder), baseline)
            report.rows.append(row)
            report.goals.append(Goal(f"miss, {row['name']}", abs(row["ratio"] - 1), GOAL, at_most=True))
            if not arguments.quick:
                checkpointed = case._replace(name="with checkpointing", checkpointing=True)
                for other in [case] + [checkpointed] * (case.name == "activations"):
                    report.rows.append(compare(other, Path(folder), baseline, AT_ONCE))
    report.finish(arguments.json)


def compare(case: Case, folder: Path, baseline: int, environment: dict[str, str] | None = None) -> dict:
    """A row: the estimate over what is measured."""
    config = parse(options(case, folder)).config
    index = Index.load(open_store(config.data.path))
    plan = Plan(config, index.latent_shape, CLASSES, case.ranks, ZERO_STAGE, "cpu")
    moment = max(plan.memory(), key=lambda name: sum(plan.memory()[name].values()))
    measured = peak_memory(case, folder, environment) - baseline
    size = f"D {case.width} depth {case.depth} L {plan.length}, {case.ranks} × {case.batch} images"
    return {
        "name": f"{case.name}: {size}{', returned at once' if environment else ''}",
        "ratio": plan.peak() / measured,
        "estimated_MB": plan.peak() / MB,
        "measured_MB": measured / MB,
        "baseline_MB": baseline / MB,
        "parameters": plan.parameters,
        "worst": moment,
    }


def encode_noise(folder: Path, size: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, size, size, 1), dtype=np.uint8)
    names = [str(label) for label in range(CLASSES)]
    source = ArrayImages("noise", names, images, np.arange(IMAGES) % CLASSES)
    encode(source, PixelCodec(size, size, 1, size), open_store(folder / f"data{size}"))


def options(case: Case, folder: Path) -> list[str]:
    """Two steps of the default configuration, with another model."""
    batch = case.ranks * case.batch
    keys = {
        "run_dir": folder / "run",
        "data.path": folder / f"data{case.size}",
        "data.prepare": "null",
        "model.width": case.width,
        "model.depth": case.depth,
        "train.activation_checkpointing": str(case.checkpointing).lower(),
        "train.precision": "fp32",
        "train.global_batch": batch,
        "train.total_images": 2 * batch,
        "train.warmup_images": 0,
        "train.decay_images": 0,
        "train.sample_images": 0,
    }
    deepspeed = f"--deepspeed={ROOT / f'ds_configs/zero{ZERO_STAGE}.json'}"
    return [deepspeed, *(f"--{key}={value}" for key, value in keys.items())]


def peak_memory(case: Case, folder: Path, environment: dict[str, str] | None = None) -> int:
    """Bytes: of the run's process that takes the most."""
    say(f"training {case.name}: D {case.width} depth {case.depth}")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={case.ranks}"]
    launcher = torchrun if case.ranks > 1 else [sys.executable]
    command = [*launcher, str(ROOT / "diffussm/train.py"), *options(case, folder), "--train.resume=none"]
    with tempfile.TemporaryDirectory(dir=folder) as run, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, f"--run_dir={run}"],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, *(high_water(pid) for pid in family(process.pid)))
                time.sleep(POLL_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read()[-2000:]}")
    return peak


def family(pid: int) -> Iterator[int]:
    """A process, and all that it and its children have started."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # ended meanwhile
            for child in children.read_text().split():
                yield from family(int(child))


def high_water(pid: int) -> int:
    """Bytes of resident memory that a process has had at most; 0 once it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


if __name__ == "__main__":
    run_command(main)
