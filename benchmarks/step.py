"""One training step of the whole trainer against a bare PyTorch loop on the same model and data: the overhead.

    python -m benchmarks.step                      about 4 minutes on 2 cores
    python -m benchmarks.step --quick              fewer steps

The trainer is the real one, `Trainer.fit` of diffussm/training: one rank, DeepSpeed with ds_configs/zero2.json, model
and batch of the fashion32 configuration, latents read from shards that are made for the occasion. The bare loop makes a
step before each of its steps, so that both see the same machine.

The bare loop is what one writes in a minute: forward, hybrid loss, backward, `clip_grad_norm_`, `torch.optim.AdamW`,
over batches that lie in memory with every draw made. It lacks what the trainer has: reading and checking samples,
random draws, ZeRO's flat partitions, the learning rate's schedule, the moving average of the weights, log, TensorBoard
and progress. Time is counted from log record to log record; checkpoints are in neither's.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import Goal, Report, make_parser, synchronize
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.config import Config, parse
from diffussm.data.encode import encode
from diffussm.data.order import SampleOrder
from diffussm.data.reader import SampleReader
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.data.stream import LatentStream
from diffussm.diffusion.losses import hybrid_loss
from diffussm.errors import run_command
from diffussm.models.diffussm import DiffuSSM
from diffussm.training.batches import Batch, BatchMaker
from diffussm.training.cluster import connect
from diffussm.training.engine import parameter_groups, read_ds_config
from diffussm.training.trainer import Trainer

DS_CONFIG = Path(__file__).parent.parent / "ds_configs/zero2.json"
GOAL = 1.05  # most that a step may take, in steps of the bare loop
IMAGES, CLASSES, SIZE = 2048, 10, 28  # the last two are Fashion-MNIST's
INTERVAL = 20  # steps between two records of the log, as in the configuration; a quick run has 5
WARM_UP = 1  # intervals
WITH_PARTS = 1  # intervals at the end whose steps are timed part by part
IN_MEMORY = 8  # batches that the bare loop goes round


def main() -> None:
    arguments = make_parser("step", "A training step of the trainer against a bare PyTorch loop's.").parse_args()
    interval, intervals = (5, 5) if arguments.quick else (INTERVAL, 9)
    # DeepSpeed talks on stdout, which belongs to the figures
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        config = make_run(Path(folder), interval, WARM_UP + intervals + WITH_PARTS)
        cluster = connect()
        report = Report("time of the trainer ÷ time of a bare PyTorch loop", cluster.device)
        try:
            trainer = PacedTrainer(config, read_ds_config(str(DS_CONFIG)), cluster)
            trainer.fit()
        finally:
            dist.destroy_process_group()
    totals = trainer.interval_seconds(interval)[WARM_UP : WARM_UP + intervals]
    overhead = statistics.median(trained / bare for trained, bare in totals)
    trained, bare = (1e3 * statistics.median(seconds) / interval for seconds in zip(*totals, strict=True))
    model = config.model
    name = f"training step, width {model.width}, depth {model.depth}, batch {config.train.global_batch}"
    report.rows.append({"name": name, "ratio": overhead, "trainer_ms": trained, "bare_ms": bare})
    report.goals.append(Goal(name, overhead, GOAL, at_most=True))
    for part, seconds in trainer.parts.items():
        report.rows.append({"name": part, **{f"{who}_ms": 1e3 * statistics.median(s) for who, s in seconds.items()}})
    report.finish(arguments.json)


def make_run(folder: Path, interval: int, intervals: int) -> Config:
    """The fashion32 configuration, of random images of the same size, for so many steps."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (IMAGES, SIZE, SIZE, 1), dtype=np.uint8)
    names = [str(label) for label in range(CLASSES)]
    source = ArrayImages("random", names, images, random.integers(0, CLASSES, IMAGES))
    encode(source, PixelCodec(SIZE, SIZE, 1), open_store(folder / "data"))
    config = parse(["--config=fashion32", f"--data.path={folder / 'data'}", f"--run_dir={folder / 'run'}"]).config
    train = config.train
    train.log_images = interval * train.global_batch
    train.total_images = train.checkpoint_images = intervals * train.log_images
    train.sample_images = train.decay_images = 0
    return config


class BareLoop:
    """Training, and nothing else.

    Args:
        trainer: whose model, weights, data and hyperparameters it takes.
    """

    def __init__(self, trainer: Trainer) -> None:
        train = trainer.config.train
        self.device, self.schedule, self.clip = trainer.cluster.device, trainer.schedule, train.clip
        self.autocast = trainer.engine.torch_autocast_enabled()
        self.model = DiffuSSM(trainer.config.model, trainer.shape[0], trainer.num_classes).to(self.device)
        self.model.set_ssm_backend(train.ssm_backend)
        self.model.load_state_dict(trainer.engine.module.state_dict())
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, train), betas=train.betas)
        self.batches = itertools.cycle(batches_of(trainer, IN_MEMORY))

    def train_step(self) -> None:
        loss = self.loss(next(self.batches))
        self.backward(loss)
        self.step()

    def loss(self, batch: Batch) -> Tensor:
        x0, noise, t, y = (v.to(self.device, non_blocking=True) for v in (batch.x0, batch.noise, batch.t, batch.y))
        x_t = self.schedule.q_sample(x0, t, noise)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.model(x_t, t, y)
        return hybrid_loss(output, x0, x_t, noise, t, self.schedule).total.mean()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def batches_of(trainer: Trainer, count: int) -> list[Batch]:
    """The batches of a run's first steps."""
    config, index = trainer.config, trainer.index
    batch = config.train.global_batch
    order = SampleOrder(index.shard_counts, batch, config.train.seed)
    reader = SampleReader(open_store(config.data.path), index)
    make = BatchMaker(config, index)
    return [make(step, slice(0, batch), *reader.read(order.step_ids(step, 0, batch))) for step in range(count)]


class TimedStream:
    """A stream whose `next` is another function."""

    def __init__(self, stream: LatentStream[Batch], following: Callable[[], Batch]) -> None:
        self._stream, self._following = stream, following

    def __next__(self) -> Batch:
        return self._following()

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()


class PacedTrainer(Trainer):
    """The trainer, before each of whose steps the bare loop makes one of its own, and the time that each takes.

    Attributes:
        laps: seconds of each step of the trainer and of the bare loop. The trainer's goes from the end of one step of
            the bare loop to the start of the next: all of `fit` is in it.
        parts: part of a step → who → seconds.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.bare = BareLoop(self)
        self.laps: dict[str, list[float]] = {"trainer": [], "bare": []}
        self.parts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.lap_started = time.perf_counter()

    def train_step(self) -> str:
        train = self.config.train
        if self.images == train.total_images - WITH_PARTS * train.log_images:
            self.time_parts()
        self.lap("trainer")
        with self.clock.part("samples"):  # it does not count in images per second
            self.bare.train_step()
        self.lap("bare")
        return super().train_step()

    def lap(self, who: str) -> None:
        synchronize(self.cluster.device)
        now = time.perf_counter()
        self.laps[who].append(now - self.lap_started)
        self.lap_started = now

    def interval_seconds(self, interval: int) -> list[tuple[float, float]]:
        """(trainer, bare loop) in each interval of so many steps."""
        trained = self.laps["trainer"][1:]  # the first lap lies before the first step
        return [
            (sum(trained[start : start + interval]), sum(self.laps["bare"][start : start + interval]))
            for start in range(0, len(trained) - interval + 1, interval)
        ]

    def time_parts(self) -> None:
        """From now on, also time the parts of a step."""
        bare = self.bare
        for part, who, owner, method in (
            ("forward and loss", "trainer", self, "loss"),
            ("forward and loss", "bare", bare, "loss"),
            ("backward", "trainer", self.engine, "backward"),
            ("backward", "bare", bare, "backward"),
            ("clip and optimizer", "trainer", self.engine, "step"),
            ("clip and optimizer", "bare", bare, "step"),
            ("moving average", "trainer", self.ema, "update"),
            ("log", "trainer", self, "log"),
            ("progress", "trainer", self.monitor, "progress"),
        ):
            setattr(owner, method, self.timed(getattr(owner, method), self.parts[part][who]))
        self.stream = TimedStream(self.stream, self.timed(self.stream.__next__, self.parts["wait for data"]["trainer"]))

    def timed(self, function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        """``function``, which adds to ``seconds`` what each call takes."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            synchronize(self.cluster.device)
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            synchronize(self.cluster.device)
            seconds.append(time.perf_counter() - start)
            return result

        return call


if __name__ == "__main__":
    run_command(main)
