"""Kill -9 at random moments of a real run, again and again: is what comes out what an undisturbed run gives?

    python -m benchmarks.chaos --kills 20                     about 5 minutes on 2 cores
    python -m benchmarks.chaos --kills 20 --store s3          checkpoints in a real S3 server (SeaweedFS)
    python -m benchmarks.chaos --quick                        2 kills

Two ranks under torchrun train a tiny model through diffussm/train.py, with a checkpoint every few steps. A kill takes
one rank, or the launcher and all ranks. Half of the kills strike at a random time:

    start      before the first step
    step       some steps after the first, whatever is under way then

and half when this can be seen from outside:

    records    a new process rewrites config.yaml, ds_config.json or log.jsonl
    resume     a new process has taken possession of the checkpoints, and removes what the last one left
    save       a rank's file is there, or on its way, and the manifest is not
    publish    the manifest is there, and `latest` still names another checkpoint
    prune      `latest` names the new one, and one that is no longer to be kept is there, whole or not

Such a moment can be shorter than a look from outside: the ranks are stopped (SIGSTOP) when it is seen, looked at again,
and killed if it still is that moment; if not, they go on to the next. What each kill has left is counted, too.

After each kill every published checkpoint must be whole, and `latest` must name one. At the end the loss curve and
every tensor of the last checkpoint must be those of the undisturbed run, bit for bit, and the same files must be there.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.chaos_run import KEEP, PATIENCE, Life, Run, images_of
from benchmarks.common import Goal, Report, make_parser, say
from benchmarks.seaweed import Seaweed, free_ports
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.encode import encode
from diffussm.data.s3_requests import make_client
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.errors import UserError, run_command
from diffussm.files import TEMPORARY_FOLDER, hold_lock
from diffussm.training import checkpoint
from diffussm.training.monitor import log_of

ROOT = Path(__file__).parent.parent
BUCKET = "chaos"
BATCH, STEPS_PER_SAVE, STEPS_PER_KILL = 8, 4, 24
LATER = 12  # steps after a life's first, within which it is killed or the wait for a moment begins
SAVES = 2  # that may pass before a moment is met; then the kill strikes anyway
AT_RANDOM, SEEN = ("start", "step"), ("records", "resume", "save", "publish", "prune")
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
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and leave no process behind
    report = Report(f"{kills} kills -9 of a run of two ranks, checkpoints on {arguments.store}", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        if arguments.store == "s3":
            server = stack.enter_context(Seaweed(folder / "server"))
            os.environ |= server.environment
            make_client().create_bucket(Bucket=BUCKET)
        make_data(folder / "data")
        chaos = Chaos(folder, arguments.store, kills, random.Random(arguments.seed))
        report.goals += chaos.compare()
    for moment in (*AT_RANDOM, *SEEN):
        who = {victims: chaos.hits[moment, victims] for victims in ("one rank", "all")}
        report.rows.append({"name": f"kills: {moment}", **who})
    report.rows += [{"name": f"left: {what}", "kills": count} for what, count in sorted(chaos.left.items())]
    report.rows.append({"name": "steps", "of the run": chaos.steps, "made again": chaos.made - chaos.steps})
    report.finish(arguments.json)
    if not all(goal.ok for goal in report.goals):
        sys.exit(1)


def make_data(folder: Path) -> None:
    source = ArrayImages(
        "random",
        ["even", "odd"],
        np.random.default_rng(0).integers(0, 256, (130, 16, 16, 1), dtype=np.uint8),
        np.arange(130) % 2,
    )
    encode(source, PixelCodec(16, 16, 1, size=16), open_store(folder), 40)


class Chaos:
    """An undisturbed run and one that is killed.

    Attributes:
        hits: (moment, who was killed) → kills.
        left: what lay there after a kill → kills.
        made: steps that were made by the run that is killed.
    """

    def __init__(self, folder: Path, store: str, kills: int, chance: random.Random) -> None:
        self.folder, self.kills, self.chance = folder, kills, chance
        quarter = 4 * STEPS_PER_SAVE
        self.steps = -(-STEPS_PER_KILL * kills // quarter) * quarter
        self.every_images = self.steps // 4 * BATCH
        self.hits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.left: collections.Counter[str] = collections.Counter()
        self.made, self.torn = 0, 0
        self.calm, self.killed = (
            Run(folder / name, f"s3://{BUCKET}/{name}" if store == "s3" else str(folder / name / "checkpoints"))
            for name in ("calm", "killed")
        )

    def compare(self) -> list[Goal]:
        say("chaos: the undisturbed run")
        started = time.monotonic()
        with self.start(self.calm, "calm.log") as life:
            self.until(lambda: self.calm.seen > 0, life)
            self.starting = time.monotonic() - started  # seconds before the first step
            self.finish(life)
        moments: list[str] = []
        for number in range(self.kills):
            if self.killed.seen >= self.steps * BATCH:
                break
            if not moments:  # each comes in its turn, in no order
                moments = [*AT_RANDOM * 2, *SEEN]
                self.chance.shuffle(moments)
            self.kill_once(number, moments.pop())
        say("chaos: to the end")
        before = self.newest_images()
        with self.start(self.killed, "last.log") as life:
            self.finish(life)
        self.check()
        self.made += self.steps - before // BATCH
        litter = files(self.calm) ^ files(self.killed)
        for name in sorted(litter):
            say(f"chaos: {name} is of one run only")
        return [
            Goal("kills done", sum(self.hits.values()), self.kills),
            Goal("curve identical", int(curve(self.calm) == curve(self.killed)), 1),
            Goal("last checkpoint identical", int(tensors(self.calm) == tensors(self.killed)), 1),
            Goal("torn checkpoints", self.torn, 0, at_most=True),
            Goal("litter", len(litter), 0, at_most=True),
        ]

    def kill_once(self, number: int, moment: str) -> None:
        alone = self.chance.random() < 0.5
        before = self.newest_images()
        with self.start(self.killed, f"life-{number}.log") as life:
            moment = self.wait_for(moment, life)
            seen, ranks = self.killed.seen, life.ranks()
            if life.over:  # "kills done" falls short where the run was too fast
                return self.finish(life)
            who = "one rank" if alone and ranks else "all"
            if who == "all":
                for process in [life.launcher, *ranks]:
                    life.kill(process)
            else:
                life.kill(self.chance.choice(ranks))
                life.go_on()
                life.end()
            made = max(seen, self.killed.seen) if life.announced else before
        self.wait_for_lock()
        self.made += (made - before) // BATCH
        self.hits[moment, who] += 1
        left = self.check()
        self.left[left] += 1
        place = f"at {seen:,} of {self.steps * BATCH:,} images"
        say(f"chaos: kill {number + 1} of {self.kills}: {moment}, {who}, {place}; left: {left}")

    def wait_for(self, moment: str, life: Life) -> str:
        """Return at such a moment, which the ranks may be stopped in; or at another, which it names."""
        if moment == "start":
            end = time.monotonic() + self.chance.uniform(0, self.starting)
            self.until(lambda: time.monotonic() > end or life.announced, life)
            return moment
        if moment == "resume":
            owner = self.killed.owner()
            self.until(lambda: self.killed.owner() != owner, life, pause=0.005)
            return moment
        if moment == "records":
            return self.strike(moment, lambda: life.announced, "start", life)
        self.until(lambda: life.announced, life)
        first = self.killed.seen + BATCH * self.chance.randint(1, LATER)
        self.until(lambda: self.killed.seen >= first, life)
        if moment == "step":
            time.sleep(self.chance.uniform(0, 0.1))
            return moment
        last = self.killed.seen + SAVES * STEPS_PER_SAVE * BATCH
        return self.strike(moment, lambda: self.killed.seen > last, "step", life)

    def strike(self, moment: str, too_late: Callable[[], bool], otherwise: str, life: Life) -> str:
        """Stop the ranks at such a moment, or, when it is too late for it, wherever they are: then ``otherwise``."""
        while True:
            self.until(lambda: self.is_moment(moment) or too_late(), life, pause=0.001)
            life.stop()
            if self.is_moment(moment) or life.over:
                return moment
            if too_late():
                return otherwise
            life.go_on()

    def is_moment(self, moment: str) -> bool:
        try:
            if moment == "records":
                return any(TEMPORARY_FOLDER.fullmatch(name) for name in os.listdir(self.killed.folder))
            state = self.killed.state()
        except FileNotFoundError:  # what was listed is gone
            return False
        if moment == "prune":
            return state.pruning(self.every_images)
        return state.publishing() if moment == "publish" else state.saving()

    def check(self) -> str:
        """Look at what lies there after a death: what of a save it has cut off."""
        for found in self.killed.published():
            try:
                found.verify()
            except UserError as error:
                say(f"chaos: {error}")
                self.torn += 1
        state = self.killed.state()
        if state.latest and state.latest not in state.published:
            say(f"chaos: latest names {state.latest}, which is not there")
            self.torn += 1
        newer = [files for name, files in state.folders.items() if name > state.newest]
        if newer:
            return "all files but the manifest" if checkpoint.META in newer[0] else "rank files, no manifest"
        if state.publishing():
            return "manifest, not yet in latest"
        if state.pruning(self.every_images):
            return "surplus checkpoint"
        return "a temporary file" if state.hidden else "nothing"

    def newest_images(self) -> int:
        newest = self.killed.state().newest
        return images_of(newest) if newest else 0

    def until(self, condition: Callable[[], bool], life: Life, pause: float = 0.02) -> None:
        """Return when it holds, or the run has ended; ``pause`` seconds between looks, which cost the ranks time."""
        deadline = time.monotonic() + PATIENCE
        while not life.over and not condition():
            if time.monotonic() > deadline:
                raise UserError(f"nothing came in {PATIENCE:.0f} s: {life.tail()}")
            time.sleep(pause)

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

    def finish(self, life: Life) -> None:
        if life.launcher.wait() != 0:
            raise UserError(f"a run failed: {life.tail()}")

    def start(self, run: Run, log: str) -> Life:
        keys = {
            "run_dir": run.folder, "data.path": self.folder / "data", "data.prepare": "null", "train.checkpoints":
            run.checkpoints, "model.width": 16, "model.depth": 1, "model.state": 4, "train.global_batch": BATCH,
            "train.total_images": self.steps * BATCH, "train.ssm_backend": "fft", "train.log_images": BATCH,
            "train.checkpoint_images": STEPS_PER_SAVE * BATCH, "train.sample_images": 0, "train.decay_images": 0,
            "train.keep_checkpoints": KEEP, "train.keep_every_images": self.every_images, "train.hang_minutes": 1,
        }  # fmt: skip
        command = [
            str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2", f"--master_port={free_ports(1)[0]}",
            str(ROOT / "diffussm/train.py"), f"--deepspeed={ROOT / 'ds_configs/zero2.json'}",
            *(f"--{key}={value}" for key, value in keys.items()),
        ]  # fmt: skip
        return Life(command, self.folder / log)


def curve(run: Run) -> list[tuple[float, ...]]:
    return [tuple(record[key] for key in EXACT) for record in log_of(run.folder)]


def tensors(run: Run) -> dict[str, bytes]:
    """All of the last checkpoint, as bytes: bit for bit."""
    found = run.published()[0]
    return {f"{kind}:{k}": t.numpy().tobytes() for kind in found.kinds for k, t in found.tensors(kind).items()}


def files(run: Run) -> set[str]:
    """Names in the run's folder and of the checkpoints, but for TensorBoard's, which bear their time.

    Files of ranks bear their writer's name, for which x stands here; two writers' in one checkpoint are told.
    """
    local = {p.relative_to(run.folder).as_posix() for p in run.folder.rglob("*") if p.parent.name != "tensorboard"}
    found = local | {f"checkpoints: {name}" for name in open_store(run.checkpoints).list()}
    if run.checkpoints.startswith("s3:"):
        prefix = run.checkpoints.removeprefix(f"s3://{BUCKET}/")
        uploads = make_client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        found |= {f"an upload of {u['Key']}" for u in uploads if u["Key"].startswith(f"{prefix}/")}
    counted = collections.Counter(re.sub(r"(rank-\d+)-[0-9a-f]{8}\.", r"\1-x.", name) for name in found)
    return {name if count == 1 else f"{name}, {count} times" for name, count in counted.items()}


if __name__ == "__main__":
    run_command(main)
