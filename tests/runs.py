"""Real runs of the real entry point on a small data set, for the tests that need ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import yaml

from diffussm.config import CONFIGS
from diffussm.data.store import open_store
from diffussm.training import checkpoint

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
        "model.width": 16,
        "model.depth": 2,
        "model.state": 4,
        "sample.steps": 3,
        "sample.grid": 6,
        "train.total_images": IMAGES,
        "train.global_batch": BATCH,
        "train.micro_batch": 2,
        "train.precision": "fp32",  # whatever the processor multiplies
        "train.ssm_backend": "fft",  # runs are compared bit for bit: none may time its own choice
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


def write_config(path: Path, data: Path, **overrides: object) -> Path:
    """Save what :func:`arguments` makes of the default as a YAML file, but for the run's folder."""
    table = yaml.safe_load((CONFIGS / "fashion32.yaml").read_text())
    for argument in arguments(data, Path("unused"), **overrides)[2:]:
        key, value = argument[2:].split("=", 1)
        section, _, name = key.rpartition(".")
        (table.setdefault(section, {}) if section else table)[name] = yaml.safe_load(value)
    path.write_text(yaml.safe_dump(table))
    return path


def newest_checkpoint(run: Path) -> checkpoint.Checkpoint:
    """Of a run, the newest that is whole."""
    return checkpoint.find(open_store(run / "checkpoints"))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def command(launcher: str, ranks: int, args: list[str]) -> list[str]:
    """How a user starts ``ranks`` ranks with ``launcher``."""
    bin, port = Path(sys.executable).parent, f"--master_port={free_port()}"
    return {
        "deepspeed": [str(bin / "deepspeed"), f"--num_gpus={ranks}", port, TRAIN, *args],
        "torchrun": [str(bin / "torchrun"), f"--nproc_per_node={ranks}", port, TRAIN, *args],
        "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks), sys.executable, TRAIN, *args],
        "python": [sys.executable, TRAIN, *args],
    }[launcher]


def environment() -> dict[str, str]:
    """One thread a rank; and the launchers find the interpreter that runs the tests."""
    bin = str(Path(sys.executable).parent)
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": bin + os.pathsep + os.environ["PATH"]}


def run(command: list[str], cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run to the end, and leave no process behind whatever happens."""
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(), start_new_session=True, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, error = process.communicate(timeout=timeout)
    finally:
        kill(process)
    return subprocess.CompletedProcess(command, process.returncode, out, error)


@contextlib.contextmanager
def started(command: list[str], log: Path, until: Callable[[], bool]) -> Iterator[subprocess.Popen[str]]:
    """A command that has come so far that ``until`` holds; killed at the end, with all that it has started."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, env=environment(), start_new_session=True, text=True,
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not until():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        yield process
    finally:
        kill(process)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below a launcher, rank 0 first."""
    found = [p for p in psutil.Process(process.pid).children(recursive=True) if TRAIN in p.cmdline()]
    found = [p for p in found if "RANK" in p.environ() or "OMPI_COMM_WORLD_RANK" in p.environ()]
    return sorted(found, key=lambda p: int(p.environ().get("RANK") or p.environ()["OMPI_COMM_WORLD_RANK"]))


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 everything that the command has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
