"""The training loop. Progress is counted in images seen, and everything that chance decides is a function of it.

A step either counts on all ranks or on none: a loss that is not finite makes its gradient so, the norm of the gradient
is the same on every rank, and with one that is not finite no rank's optimizer moves.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffussm.autoencoders.codec import codec_from_spec
from diffussm.config import Config, to_dict
from diffussm.data.cache import ShardCache
from diffussm.data.index import Index
from diffussm.data.order import SampleOrder
from diffussm.data.reader import SampleReader
from diffussm.data.store import open_store
from diffussm.data.stream import LatentStream
from diffussm.diffusion.losses import hybrid_loss
from diffussm.diffusion.schedule import Schedule
from diffussm.errors import Stopped, UserError
from diffussm.files import remove_temporaries_of, write_atomically, write_json
from diffussm.models.diffussm import DiffuSSM, choose_ssm_backend
from diffussm.models.macs import forward_macs
from diffussm.training import checkpoint
from diffussm.training.batches import Batch, BatchMaker
from diffussm.training.checkpoint import Checkpoint, ema_kind
from diffussm.training.cluster import Cluster
from diffussm.training.ema import ShardedEMA
from diffussm.training.engine import complete_ds_config, make_engine, set_rates
from diffussm.training.handshake import check_agreement
from diffussm.training.hardware import peak_flops
from diffussm.training.monitor import Monitor, duration
from diffussm.training.partition import MOMENTS, Partition
from diffussm.training.preemption import StopRequest
from diffussm.training.previews import Painter, draw_grid
from diffussm.training.resume import check_fit, find_checkpoint, load_weights, restore, weights_from
from diffussm.training.saver import Saver
from diffussm.training.scorer import Scorer
from diffussm.training.skipped import Skipped
from diffussm.training.telemetry import LossMeter, StepClock, gradient_norms, memory_figures, weight_figures
from diffussm.training.watchdog import Watchdog

RECORDS = "config.yaml", "ds_config.json", "log.jsonl", "skipped.jsonl"  # rewritten at the start of a run


class Trainer:
    """A run on this rank: `Trainer(config, ds_config, cluster).fit()`.

    Args:
        config: checked.
        ds_config: DeepSpeed's, from :func:`read_ds_config`.
        cluster: connected.

    Raises:
        UserError: the data, the launch and the configuration do not fit together, or the checkpoint does not fit them.
    """

    def __init__(self, config: Config, ds_config: dict[str, Any], cluster: Cluster) -> None:
        self.config, self.cluster = config, cluster
        train = config.train
        self.run = Path(config.run_dir)
        self.describe = f"rank {cluster.rank} on {cluster.host}"
        with Watchdog(train.hang_minutes, self.describe) as dog:
            self.dog = dog
            dog.beat("the data set's index")
            self._open_data()
            ds_config = complete_ds_config(ds_config, train, cluster)
            digest = hashlib.sha256(repr((to_dict(config), ds_config)).encode()).hexdigest()
            check_agreement(cluster, {"configuration": digest[:16], "data index": self.index.hash[:16]})
            dog.beat("the search for a checkpoint")
            checkpoints = open_store(train.checkpoints or self.run / "checkpoints")
            found = find_checkpoint(checkpoints, train.resume, cluster)
            if found:
                check_fit(found, config)
                self.stream.load_state_dict(found.meta["stream"])
            self.images = found.meta["images"] if found else 0
            precision = torch.bfloat16 if ds_config["torch_autocast"]["enabled"] else torch.float32
            if train.ssm_backend == "auto":
                micro_batch = ds_config["train_micro_batch_size_per_gpu"]
                train.ssm_backend = self._choose_ssm_backend(found, micro_batch, precision)
            dog.beat("the model")
            self._build(ds_config, found)
            self.painter = Painter(
                config,
                self.codec,
                self.shape,
                self.num_classes,
                cluster.device,
                self.engine.torch_autocast_enabled(),
            )
            self.scorer = None
            if config.score.every_images:
                self.scorer = Scorer(config, self.painter, cluster, lambda what: self.dog.beat(what))
            self.saver = Saver(
                checkpoints,
                cluster,
                self.partition,
                partial(
                    checkpoint.surplus,
                    last=train.keep_checkpoints,
                    every_images=train.keep_every_images,
                    best=train.keep_best,
                ),
                train.keep_best,
            )
            if cluster.is_main:  # from here on the run is this process's
                for name in RECORDS:
                    remove_temporaries_of(self.run / name)
                write_atomically(self.run / "config.yaml", config.to_yaml())
                write_json(self.run / "ds_config.json", ds_config)
        self.record: dict[str, float] = found.meta["metrics"] if found else {}  # the last of the log
        self.meter = LossMeter(config.diffusion.steps, cluster.device)
        # an image costs its forward pass, and twice that for the backward; 2 FLOPs a MAC
        self.image_flops = 3 * 2 * sum(forward_macs(config.model, self.shape[0], math.prod(self.shape[1:])).values())
        self.peak = cluster.world_size * peak_flops(cluster.device, precision)
        self.monitor = Monitor(self.run, self.images, train.total_images) if cluster.is_main else None
        skipped = found.meta["skipped"] if found else {}
        self.skipped = Skipped(
            self.run, self.images, skipped, train.max_skipped, cluster, self.order, self.reader, self.mine
        )
        self._announce(found, precision)

    def _open_data(self) -> None:
        """index, codec, shape, num_classes, reader, order, stream."""
        config, cluster = self.config, self.cluster
        train, data = config.train, config.data
        store = open_store(data.path)
        self.index = index = Index.load(store)
        self.codec = codec_from_spec(index.codec, data.autoencoder)
        if train.sample_images or config.score.every_images:
            self.codec.load()  # what it lacks is not to show hours from now
        self.shape, self.num_classes = index.latent_shape, len(index.class_names)
        if math.prod(self.shape[1:]) % config.model.hourglass:
            raise UserError(
                f"model.hourglass {config.model.hourglass} does not divide the {self.shape[1:]} positions: 1 does"
            )
        cache = ShardCache(store, data.cache, round(data.cache_gib * 2**30)) if data.cache else None
        share = train.global_batch // cluster.world_size
        self.mine = slice(cluster.rank * share, (cluster.rank + 1) * share)  # of a global batch
        self.reader = SampleReader(store, index, cache)
        self.order = SampleOrder.of_index(index, train.global_batch, train.seed)
        self.stream = LatentStream(self.reader, self.order, 0, self.mine, BatchMaker(config, index))

    def _build(self, ds_config: dict[str, Any], found: Checkpoint | None) -> None:
        """engine, partition, ema, and what they hold."""
        config, cluster = self.config, self.cluster
        train = config.train
        torch.manual_seed(train.seed)  # the initial weights, alike on every rank
        model = DiffuSSM(config.model, self.shape[0], self.num_classes, train.activation_checkpointing)
        model.set_ssm_backend(train.ssm_backend)
        model.to(cluster.device)
        if found:
            load_weights(model, lambda: found.tensors("weight"), str(found), cluster)
        elif train.init_from:
            load_weights(model, lambda: weights_from(train.init_from), train.init_from, cluster)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.engine = make_engine(model, ds_config, train)
        self.micro_batch = self.engine.train_micro_batch_size_per_gpu()
        self.accumulation = self.engine.gradient_accumulation_steps()
        self.schedule = Schedule.linear(config.diffusion.steps)
        self.partition = Partition(self.engine)
        self.optimizer = self.partition.optimizer
        self.ema = ShardedEMA(self.partition, train.ema_lengths)
        if found:
            for length in restore(found, self.partition, self.ema):
                self._warn(f"{found} has no average over {length:g} images: it begins with the weights")

    def fit(self) -> None:
        """Train until total_images are seen.

        Raises:
            Stopped: a signal or the time limit has asked for it; everything is saved.
            UserError: nothing can be saved any more.
        """
        train = self.config.train
        if self.images >= train.total_images:
            self.say(f"{self.run} is complete; to go on, raise train.total_images above {self.images}")
        self.clock, self.logged_images = StepClock(self.cluster.device), self.images
        with ExitStack() as stack:
            self.stop = stack.enter_context(StopRequest(train.max_hours, self.describe))
            self.dog = stack.enter_context(Watchdog(train.hang_minutes, self.describe))
            stack.enter_context(self.stream)
            while self.images < train.total_images:
                self.dog.beat(f"the step after {self.images:,} images")
                stopping = self.train_step()
                if self.monitor:
                    self.monitor.progress(self.images)
                end = self.images >= train.total_images or bool(stopping)
                scored = self.due(self.config.score.every_images)
                save = self.due(train.checkpoint_images) or scored or end
                if self.due(train.log_images) or save:  # a checkpoint holds no losses that wait for their record
                    self.log()
                if self.due(train.sample_images):
                    self.draw_samples()
                if save:
                    self.save(wait=end, score=self.score() if scored else None)
                if stopping and self.images < train.total_images:
                    if self.monitor:
                        self.monitor.close()
                    raise Stopped(
                        f"stopped at {self.images:,} images by {stopping}; all is saved, the same command goes on"
                    )
        if self.monitor:
            self.monitor.close()

    def train_step(self) -> str:
        """One optimizer step on the next global batch.

        Returns:
            What asks to stop, if any rank was asked before this step; "" on every rank otherwise.
        """
        is_asked = self.stop.requested or self.saver.lost != ""
        asked = torch.tensor([is_asked * (self.cluster.world_size - self.cluster.rank)])
        agreed = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.cluster.control, async_op=True)
        with self.clock.part("data"):
            batch = next(self.stream)
        set_rates(self.engine, self.config.train, self.lr_factor())
        self.optimizer.recording = self.will_log()
        self.optimizer.squares.clear()
        finite = torch.ones(len(batch.t), dtype=torch.bool, device=self.cluster.device)
        for number in range(self.accumulation):
            rows = slice(number * self.micro_batch, (number + 1) * self.micro_batch)
            with self.clock.part("forward"):
                loss = self.loss(batch.part(number, self.micro_batch), finite[rows])
            with self.clock.part("backward"):
                self.engine.backward(loss)
            with self.clock.part("optimizer"):
                self.engine.step()
        self.images += self.config.train.global_batch
        if self.engine.was_step_applied():
            self.meter.commit()
            self.skipped.none()
        else:
            self.meter.drop()
            self.skipped.one(self.images - self.config.train.global_batch, finite)
        self.ema.update(self.images, self.config.train.global_batch)
        agreed.wait()
        return self._reason(int(asked))

    def loss(self, batch: Batch, finite: torch.Tensor) -> torch.Tensor:
        """The mean loss [] of a micro-batch; ``finite`` [B] is set to which of its images have one that is finite."""
        device = self.cluster.device
        x0, noise, t, y = (v.to(device, non_blocking=True) for v in (batch.x0, batch.noise, batch.t, batch.y))
        x_t = self.schedule.q_sample(x0, t, noise)
        output = self.engine(x_t, t, y if self.num_classes else None)
        losses = hybrid_loss(output, x0, x_t, noise, t, self.schedule)
        self.meter.add(type(losses)(*(loss.detach() for loss in losses)), t)
        finite.copy_(losses.total.detach().isfinite())
        total = losses.total.mean()
        # times 1; or NaN, which then reaches every gradient: an infinite loss alone may have a finite one
        return total * torch.where(total.detach().isfinite(), 1.0, torch.nan)

    def lr_factor(self) -> float:
        """Of the next step: linear warm-up, constant, linear decay to the end."""
        train = self.config.train
        end = self.images + train.global_batch
        warmup = min(1.0, end / train.warmup_images) if train.warmup_images else 1.0
        decay = min(1.0, (train.total_images - self.images) / train.decay_images) if train.decay_images else 1.0
        return warmup * decay

    def due(self, interval: int, images: int | None = None) -> bool:
        """Whether the step that led to ``images``, by default the last one, passed a multiple of ``interval``."""
        images = self.images if images is None else images
        return interval > 0 and images // interval > (images - self.config.train.global_batch) // interval

    def will_log(self) -> bool:
        """Whether a record follows the next step, unless it is stopped."""
        train = self.config.train
        after = self.images + train.global_batch
        return (
            any(self.due(n, after) for n in (train.log_images, train.checkpoint_images)) or after >= train.total_images
        )

    def log(self) -> None:
        """Record the means since the last record. Collective."""
        steps = (self.images - self.logged_images) // self.config.train.global_batch
        if not steps:
            return
        times = self.clock.means(steps)
        rate = self.config.train.global_batch / times["time/step_ms"] * 1e3
        self.logged_images = self.images
        values = self.meter.means()
        norm = self.engine.get_global_grad_norm()  # None at stage 0
        whole = self.engine.zero_optimization_stage() == 0
        applied = self.engine.was_step_applied()
        if norm is not None and applied:
            values["grad_norm"] = float(norm)
        values |= gradient_norms(self.optimizer.squares, norm if applied else None, self.cluster.device, whole)
        values |= weight_figures(self.partition, self.ema.shadows)
        for group in self.engine.optimizer.param_groups:
            values[f"lr/{group['name']}"] = group["lr"]
        values |= {"images_per_second": rate, "mfu": rate * self.image_flops / self.peak}
        values |= times | memory_figures(self.cluster.device) | {"skipped_steps": self.skipped.total}
        self.record = values
        if self.monitor:
            threading.Thread(target=self.saver.look, name="look", daemon=True).start()
            self.monitor.scalars(self.images, values)
            self.monitor.report(
                self.images,
                loss=f"{values.get('loss/total', math.nan):.4f}",
                rate=f"{rate:.1f} images/s",
                mfu=f"{values['mfu']:.0%}",
                ETA=duration((self.config.train.total_images - self.images) / rate),
            )

    def draw_samples(self) -> None:
        """A grid of samples with the first average. Collective."""
        self.dog.beat("samples")
        with self.clock.part("samples"):
            weights = self.ema.gather(self.config.train.ema_lengths[0])
            picture = draw_grid(self.painter, weights, self.cluster)
            if self.monitor:
                self.monitor.picture("samples", self.images, picture)

    def score(self) -> Callable[[], dict[str, float]] | None:
        """Draw images with the first average and measure them. Collective; on rank 0 returns what computes the FID."""
        with self.clock.part("score"):
            distance = self.scorer.measure(self.ema.gather(self.config.train.ema_lengths[0]))
        if distance is None:
            return None
        images, score = self.images, self.config.score

        def finish() -> dict[str, float]:
            value = distance()
            self.monitor.scalars(images, {score.metric: value})
            self.say(f"{images:,} images: {score.metric} {value:.2f}, of {score.images:,} samples")
            return {score.metric: value}

        return finish

    def save(self, wait: bool, score: Callable[[], dict[str, float]] | None = None) -> None:
        """Begin to publish a checkpoint, and with ``wait`` end that. Collective.

        Args:
            score: computes further metrics of it, in the background.
        """
        self.dog.beat("a checkpoint")
        with self.clock.part("save"):
            meta = {
                "format": checkpoint.FORMAT,
                "images": self.images,
                "stream": self.stream.state_dict(),
                "adam_steps": self.partition.steps,
                "ema_images": self.config.train.ema_lengths,
                "skipped": self.skipped.state(),
                "metrics": {name: value for name, value in self.record.items() if math.isfinite(value)},
                "time": time.time(),
                "world_size": self.cluster.world_size,
                "zero_stage": self.engine.zero_optimization_stage(),
                "config": to_dict(self.config),
                "channels": self.shape[0],
                "num_classes": self.num_classes,
                "class_names": self.index.class_names,
                "codec": self.index.codec,
                "latent_shape": list(self.shape),
                "scale": self.index.scale,
                "shift": self.index.shift,
            }
            kinds = {"weight": self.partition.masters} | {key: self.partition.moments(key) for key in MOMENTS}
            kinds |= {ema_kind(length): shadow for length, shadow in self.ema.shadows.items()}
            self.saver.save(meta, kinds, wait, score)

    def say(self, line: str) -> None:
        if self.monitor:
            self.monitor.say(line)

    def _warn(self, line: str) -> None:
        if self.cluster.is_main:
            print(f"warning: {line}", flush=True)

    def _reason(self, asked: int) -> str:
        """Why to stop, told by the first rank that was asked. Collective where one was.

        Raises:
            UserError: nothing can be saved any more.
        """
        if not asked:
            return ""
        told = [self.stop.reason, self.saver.lost]
        dist.broadcast_object_list(told, self.cluster.world_size - asked, group=self.cluster.control)
        if told[1]:
            raise UserError(told[1])
        return told[0]

    def _choose_ssm_backend(self, found: Checkpoint | None, micro_batch: int, precision: torch.dtype) -> str:
        """The checkpoint's, or the faster one here. Chosen once a run: the other rounds otherwise. Collective."""
        if found:
            return found.meta["config"]["train"]["ssm_backend"]
        model, positions, device = self.config.model, math.prod(self.shape[1:]), self.cluster.device
        return self.cluster.from_main(lambda: choose_ssm_backend(model, micro_batch, positions, precision, device))

    def _announce(self, found: Checkpoint | None, precision: torch.dtype) -> None:
        stage = self.engine.zero_optimization_stage()
        self.say(
            f"{self.run}: {self.parameters / 1e6:.1f}M parameters, {len(self.index):,} samples of "
            f"{'×'.join(map(str, self.shape))}; {self.cluster.world_size} ranks × {self.micro_batch} images × "
            f"{self.accumulation} a step, ZeRO {stage}, {str(precision)[6:]}, "
            f"S4D by {self.config.train.ssm_backend}; "
            + (f"going on at {self.images:,} images from {found}" if found else "from the start")
        )
        if self.cluster.world_size > 1:
            minutes = self.config.train.hang_minutes
            patience = f"without progress for {minutes:g} min they end" if minutes else "they wait for ever"
            self.say(f"ranks talk by {self.cluster.network}; {patience} (train.hang_minutes)")
        if found:
            saved = found.meta["world_size"], found.meta["zero_stage"]
            if saved != (self.cluster.world_size, stage):
                self.say(
                    f"saved by {saved[0]} ranks at ZeRO {saved[1]}: the same images and weights go on, but sums have "
                    "another order: losses agree to rounding, not bit for bit"
                )
