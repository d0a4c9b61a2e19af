"""Kill -9 at random moments of a real run, again and again: is what comes out what an undisturbed run gives?

    python -m benchmarks.chaos --kills 20                     about 6 minutes on 2 cores
    python -m benchmarks.chaos --kills 20 --store s3          checkpoints in a real S3 server (SeaweedFS)
    python -m benchmarks.chaos --quick                        2 kills

Two ranks under torchrun train a tiny model through diffussm/train.py, with a checkpoint every few steps. A kill takes
one rank, or all ranks and the launcher, at one of these moments:

    start      before the first step, or while a checkpoint is being read
    step       some time after the first step
    save       when a rank's file is there, or on its way, and the manifest is not
    publish    when the manifest is there, or on its way, and `latest` names another checkpoint

After each kill every published checkpoint must be whole. At the end the loss curve and every tensor of the last
checkpoint must be those of the undisturbed run, bit for bit, and the same files must lie there.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.common import Goal, Report, make_parser, say
from benchmarks.seaweed import Seaweed, free_ports
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.encode import encode
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.errors import UserError, run_command
from diffussm.files import hold_lock
from diffussm.training import checkpoint
from diffussm.training.monitor import log_of

ROOT = Path(__file__).parent.parent
BATCH, STEPS_PER_SAVE, STEPS_PER_KILL = 8, 8, 64
TAIL = 8192  # bytes: some records
LONGEST = 1.0  # seconds after the first step, of a kill in a step
PATIENCE = 120.0  # seconds to wait for a moment or an end
MOMENTS = ("start", "step", "save", "publish")
EXACT = ("images", "loss/total", "loss/mse", "loss/vlb", "grad_norm", "lr/dense", "lr/ssm")


def main() -> None:
    parser = make_parser("chaos", "Kill -9 a run again and again, and compare it with an undisturbed one.")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: %(default)s)")
    parser.add_argument("--store", choices=["disk", "s3"], default="disk", help="for checkpoints (default: disk)")
    arguments = parser.parse_args()
    kills = 2 if arguments.quick else arguments.kills
    if kills < 1:
        raise UserError(f"--kills {kills}: at least 1")
    report = Report(f"{kills} kills -9 of a run of two ranks, checkpoints on {arguments.store}", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        if arguments.store == "s3":
            server = stack.enter_context(Seaweed(folder / "server"))
            os.environ |= server.environment
            make_bucket()
        make_data(folder / "data")
        chaos = Chaos(folder, arguments.store, kills, random.Random(arguments.seed))
        found = chaos.compare()
    for (moment, victims), count in sorted(chaos.hits.items()):
        report.rows.append({"name": f"{moment}, {victims}", "kills": count})
    report.rows.append({"name": "steps", "of the run": chaos.steps, "made again": chaos.again})
    for goal, (value, bound, at_most) in found.items():
        report.goals.append(Goal(goal, value, bound, at_most))
    report.finish(arguments.json)
    if not all(goal.ok for goal in report.goals):
        sys.exit(1)


def make_bucket() -> None:
    from diffussm.data.s3_requests import make_client

    make_client().create_bucket(Bucket="chaos")


def make_data(folder: Path) -> None:
    source = ArrayImages(
        "random",
        ["even", "odd"],
        np.random.default_rng(0).integers(0, 256, (130, 16, 16, 1), dtype=np.uint8),
        np.arange(130) % 2,
    )
    encode(source, PixelCodec(16, 16, 1, size=16), open_store(folder), 40)


@dataclass
class Run:
    """A run's places."""

    folder: Path
    checkpoints: str

    @property
    def seen(self) -> int:
        """Images of the last record, by the end of the log."""
        with contextlib.suppress(FileNotFoundError), open(self.folder / "log.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            for line in reversed(file.read().splitlines(keepends=True)):
                if line.endswith(b"\n") and line.startswith(b"{"):
                    return json.loads(line)["images"]
        return 0

    def published(self) -> list[checkpoint.Checkpoint]:
        return checkpoint.complete(open_store(self.checkpoints))


class Chaos:
    """An undisturbed run and one that is killed.

    Attributes:
        hits: (moment, who was killed) → kills.
        again: steps that were made more than once.
    """

    def __init__(self, folder: Path, store: str, kills: int, chance: random.Random) -> None:
        self.folder, self.kills, self.chance = folder, kills, chance
        self.steps = STEPS_PER_KILL * kills // STEPS_PER_SAVE * STEPS_PER_SAVE
        self.hits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.again, self.torn = 0, 0
        self.calm, self.killed = (
            Run(folder / name, f"s3://chaos/{name}" if store == "s3" else str(folder / name / "checkpoints"))
            for name in ("calm", "killed")
        )

    def compare(self) -> dict[str, tuple[float, float, bool]]:
        """goal → (value, bound, whether it is the most)."""
        say("chaos: the undisturbed run")
        with self.started(self.calm, "calm.log") as life:
            self.finish(life, "calm.log")
        for number in range(self.kills):
            if self.killed.seen >= self.steps * BATCH:
                break
            self.kill_once(number)
        say("chaos: to the end")
        with self.started(self.killed, "last.log") as life:
            self.finish(life, "last.log")
        same_curve = curve(self.calm) == curve(self.killed)
        same_tensors = tensors(self.calm) == tensors(self.killed)
        litter = files(self.calm) ^ files(self.killed)
        for name in sorted(litter):
            say(f"chaos: {name} is of one run only")
        return {
            "kills done": (sum(self.hits.values()), self.kills, False),
            "loss curve identical": (float(same_curve), 1, False),
            "last checkpoint identical": (float(same_tensors), 1, False),
            "torn checkpoints": (self.torn, 0, True),
            "files of one run only": (len(litter), 0, True),
        }

    def kill_once(self, number: int) -> None:
        moment, alone = self.chance.choice(MOMENTS), self.chance.random() < 0.5
        log = f"life-{number}.log"
        with self.started(self.killed, log) as life:
            self.wait_for(moment, life, log)
            seen = self.killed.seen
            family = psutil.Process(life.pid).children(recursive=True)
            ranks = [process for process in family if is_rank(process)]
            ended = life.poll() is not None
            for process in [self.chance.choice(ranks)] if alone and ranks else [*family, psutil.Process(life.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if not ended:
                self.hits[moment, "one rank" if alone and ranks else "all"] += 1
            for process in psutil.wait_procs([*family, psutil.Process(life.pid)], timeout=PATIENCE)[1]:
                raise UserError(f"process {process.pid} outlived a killed rank for {PATIENCE:.0f} s: {log}")
        self.wait_for_lock()
        newest = 0
        for found in self.killed.published():
            try:
                found.verify()
                newest = max(newest, found.meta["images"])
            except UserError as error:
                say(f"chaos: {error}")
                self.torn += 1
        self.again += max(0, seen - newest) // BATCH
        who = "one rank" if alone else "all"
        say(f"chaos: kill {number + 1} of {self.kills}: {moment}, {who}, at {seen:,} of {self.steps * BATCH:,} images")

    def wait_for(self, moment: str, life: subprocess.Popen[bytes], log: str) -> None:
        """Return at such a moment, or when the run has ended."""
        if moment == "start":
            time.sleep(self.chance.uniform(0, 9))
            return
        before = self.killed.seen

        def stepped() -> bool:
            return self.killed.seen > before

        self.until(stepped, life, log)
        time.sleep(self.chance.uniform(0, LONGEST))
        if moment != "step":
            self.until(self.saving if moment == "save" else self.publishing, life, log)

    def saving(self) -> bool:
        if self.killed.checkpoints.startswith("s3:"):
            names = open_store(self.killed.checkpoints).list("images-")
            folders = {name.split("/")[0] for name in names}
            return any(f"{folder}/manifest.json" not in names for folder in folders)
        found = Path(self.killed.checkpoints).glob("images-*")
        return any(not (path / "manifest.json").exists() for path in found)

    def publishing(self) -> bool:
        store = open_store(self.killed.checkpoints)
        with contextlib.suppress(FileNotFoundError):
            latest = bytes(store.read("latest")).decode().strip()
            if self.killed.checkpoints.startswith("s3:"):
                return any(name.endswith("meta.json") and name.split("/")[0] > latest for name in store.list("images-"))
            newer = [path for path in Path(self.killed.checkpoints).glob("images-*") if path.name > latest]
            return any((path / "meta.json").exists() for path in newer)
        return False

    def until(self, condition: Callable[[], bool], life: subprocess.Popen[bytes], log: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while life.poll() is None and not condition():
            if time.monotonic() > deadline:
                raise UserError(f"nothing came in {PATIENCE:.0f} s: {(self.folder / log).read_text()[-2000:]}")
            time.sleep(0.002)

    def wait_for_lock(self) -> None:
        """Until no rank of a killed launcher holds the run."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                hold_lock(self.killed.folder / "lock").close()
                return
            except UserError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def finish(self, life: subprocess.Popen[bytes], log: str) -> None:
        if life.wait() != 0:
            raise UserError(f"a run failed: {(self.folder / log).read_text()[-3000:]}")

    @contextlib.contextmanager
    def started(self, run: Run, log: str) -> Iterator[subprocess.Popen[bytes]]:
        port = free_ports(1)[0]
        keys = {
            "run_dir": run.folder, "data.path": self.folder / "data", "data.prepare": "null", "train.checkpoints":
            run.checkpoints, "model.width": 16, "model.depth": 1, "model.state": 4, "train.global_batch": BATCH,
            "train.total_images": self.steps * BATCH, "train.ssm_backend": "fft", "train.log_images": BATCH,
            "train.checkpoint_images": STEPS_PER_SAVE * BATCH, "train.sample_images": 0, "train.decay_images": 0,
            "train.keep_checkpoints": 2, "train.keep_every_images": self.steps * BATCH // 4, "train.hang_minutes": 1,
        }  # fmt: skip
        command = [
            str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2", f"--master_port={port}",
            str(ROOT / "diffussm/train.py"), f"--deepspeed={ROOT / 'ds_configs/zero2.json'}",
            *(f"--{key}={value}" for key, value in keys.items()),
        ]  # fmt: skip
        with open(self.folder / log, "w") as file:
            life = subprocess.Popen(
                command, env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        try:
            yield life
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(life.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(life.pid, signal.SIGKILL)
            life.wait()


def is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return any(word.endswith("diffussm/train.py") for word in process.cmdline())
    return False


def curve(run: Run) -> list[tuple[float, ...]]:
    return [tuple(record[key] for key in EXACT) for record in log_of(run.folder)]


def tensors(run: Run) -> dict[str, bytes]:
    """All of the last checkpoint, as bytes: bit for bit."""
    found = run.published()[0]
    return {f"{kind}:{k}": t.numpy().tobytes() for kind in found.kinds for k, t in found.tensors(kind).items()}


def files(run: Run) -> set[str]:
    """Names in the run's folder and of the checkpoints; TensorBoard's, which bear their time, without them."""
    local = {p.relative_to(run.folder).as_posix() for p in run.folder.rglob("*") if p.parent.name != "tensorboard"}
    return local | {f"checkpoints: {name}" for name in open_store(run.checkpoints).list()}


if __name__ == "__main__":
    run_command(main)
