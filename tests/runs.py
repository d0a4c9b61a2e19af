"""Real runs of the real entry point on a small data set, for the tests that need ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "diffussm/train.py")
IMAGES, BATCH = 96, 8


def arguments(data: Path, run: Path, **overrides: object) -> list[str]:
    """Twelve steps of eight images, two micro-batches a rank at two ranks, a checkpoint each four steps."""
    keys = {
        "run_dir": run,
        "data.path": data / "train",
        "data.reference": data / "test",
        "data.prepare": "null",
        "data.flip": "true",
        "model.width": 16,
        "model.depth": 2,
        "model.state": 4,
        "sample.steps": 3,
        "sample.grid": 6,
        "train.total_images": IMAGES,
        "train.global_batch": BATCH,
        "train.micro_batch": 2,
        "train.lr": 1e-2,
        "train.ssm_lr": 5e-3,
        "train.warmup_images": 32,
        "train.decay_images": 32,
        "train.log_images": BATCH,
        "train.checkpoint_images": 4 * BATCH,
        "train.sample_images": 0,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    zero2 = ["--deepspeed", str(ROOT / "ds_configs/zero2.json")]
    return [*zero2, *(f"--{key}={value}" for key, value in keys.items())]


def command(launcher: str, ranks: int, args: list[str], port: int = 29517) -> list[str]:
    """How a user starts ``ranks`` ranks with ``launcher``."""
    bin = Path(sys.executable).parent
    return {
        "deepspeed": [str(bin / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(port), TRAIN, *args],
        "torchrun": [str(bin / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", str(port), TRAIN, *args],
        "python": [sys.executable, TRAIN, *args],
    }[launcher]


def environment() -> dict[str, str]:
    """One thread a rank; and the launchers find the interpreter that runs the tests."""
    bin = str(Path(sys.executable).parent)
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": bin + os.pathsep + os.environ["PATH"]}


def run(command: list[str], cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run to the end, and leave no process behind whatever happens."""
    process = start(command, cwd)
    try:
        out, error = process.communicate(timeout=timeout)
    finally:
        kill(process)
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def start(command: list[str], cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start in a process group of its own."""
    return subprocess.Popen(
        command, cwd=cwd, env=environment(), start_new_session=True, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 everything that the command has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
