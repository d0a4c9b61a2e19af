"""The training loop. Progress is counted in images seen, and everything that chance decides is a function of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from diffussm.autoencoders.codec import codec_from_spec
from diffussm.config import Config, SampleConfig, to_dict
from diffussm.data.cache import ShardCache
from diffussm.data.index import Index
from diffussm.data.order import SampleOrder
from diffussm.data.reader import SampleReader
from diffussm.data.store import open_store
from diffussm.data.stream import LatentStream
from diffussm.diffusion.generate import generate
from diffussm.diffusion.losses import hybrid_loss
from diffussm.diffusion.schedule import Schedule
from diffussm.errors import UserError
from diffussm.files import write_atomically, write_json
from diffussm.models.diffussm import DiffuSSM, choose_ssm_backend
from diffussm.models.macs import forward_macs
from diffussm.pictures import grid
from diffussm.training import checkpoint
from diffussm.training.batches import Batch, BatchMaker
from diffussm.training.cluster import Cluster
from diffussm.training.ema import ShardedEMA
from diffussm.training.engine import complete_ds_config, make_engine, set_rates
from diffussm.training.hardware import peak_flops
from diffussm.training.monitor import Monitor, duration


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
        store = open_store(config.data.path)
        self.index = index = Index.load(store)
        self.codec = codec_from_spec(index.codec, config.data.autoencoder)
        if train.sample_images:
            self.codec.load()  # what it lacks is not to show hours from now
        self.shape, self.num_classes = index.latent_shape, len(index.class_names)
        if math.prod(self.shape[1:]) % config.model.hourglass:
            raise UserError(
                f"model.hourglass {config.model.hourglass} does not divide the {self.shape[1:]} positions: 1 does"
            )
        ds_config = complete_ds_config(ds_config, train, cluster)
        data = config.data
        cache = ShardCache(store, data.cache, round(data.cache_gib * 2**30)) if data.cache else None
        share = train.global_batch // cluster.world_size
        self.stream = LatentStream(
            SampleReader(store, index, cache),
            SampleOrder.of_index(index, train.global_batch, train.seed),
            start_step=0,
            positions=slice(cluster.rank * share, (cluster.rank + 1) * share),
            collate=BatchMaker(config, index),
        )
        found = cluster.from_main(self._find_checkpoint)
        self.images = checkpoint.load_meta(found)["images"] if found else 0
        if found:
            self.stream.load_state_dict(checkpoint.load_meta(found)["stream"])
            self._check_fit(found, int(ds_config.get("zero_optimization", {}).get("stage", 0)))
        precision = torch.bfloat16 if ds_config["torch_autocast"]["enabled"] else torch.float32
        if train.ssm_backend == "auto":
            train.ssm_backend = self._choose_ssm_backend(found, ds_config["train_micro_batch_size_per_gpu"], precision)
        if cluster.is_main:
            write_atomically(self.run / "config.yaml", config.to_yaml())
            write_json(self.run / "ds_config.json", ds_config)

        torch.manual_seed(train.seed)  # the initial weights, alike on every rank
        model = DiffuSSM(config.model, self.shape[0], self.num_classes, train.activation_checkpointing)
        model.set_ssm_backend(train.ssm_backend)
        model.to(cluster.device)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.engine = make_engine(model, ds_config, train)
        self.micro_batch = self.engine.train_micro_batch_size_per_gpu()
        self.accumulation = self.engine.gradient_accumulation_steps()
        self.schedule = Schedule.linear(config.diffusion.steps)
        if found:
            self.engine.load_checkpoint(str(found), tag=checkpoint.ENGINE)
        self.ema = ShardedEMA(self.engine, train.ema_images)
        if found:
            self.ema.load_state_dict(checkpoint.load_ema(found))

        self.losses: list[Tensor] = []  # of the micro-batches since the last record
        # an image costs its forward pass, and twice that for the backward; 2 FLOPs a MAC
        self.image_flops = 3 * 2 * sum(forward_macs(config.model, self.shape[0], math.prod(self.shape[1:])).values())
        self.peak = cluster.world_size * peak_flops(cluster.device, precision)
        self.monitor = Monitor(self.run, self.images, train.total_images) if cluster.is_main else None
        self.say(
            f"{self.run}: {self.parameters / 1e6:.1f}M parameters, {len(index):,} samples of "
            f"{'×'.join(map(str, self.shape))}; {cluster.world_size} ranks × {self.micro_batch} images × "
            f"{self.accumulation} a step, ZeRO {self.engine.zero_optimization_stage()}, {str(precision)[6:]}, "
            f"S4D by {train.ssm_backend}; "
            + (f"going on at {self.images:,} images from {found}" if found else "from the start")
        )

    def fit(self) -> None:
        """Train until total_images are seen."""
        train = self.config.train
        if self.images >= train.total_images:
            self.say(f"{self.run} is complete; to go on, raise train.total_images above {self.images}")
        self.logged_at, self.logged_images = time.perf_counter(), self.images
        with self.stream:
            while self.images < train.total_images:
                self.train_step()
                if self.monitor:
                    self.monitor.progress(self.images)
                save = self.due(train.checkpoint_images) or self.images >= train.total_images
                if self.due(train.log_images) or save:  # a checkpoint holds no losses that wait for their record
                    self.log()
                if self.due(train.sample_images):
                    self.draw_samples()
                if save:
                    self.save()
        if self.monitor:
            self.monitor.close()

    def train_step(self) -> None:
        """One optimizer step on the next global batch."""
        batch = next(self.stream)
        set_rates(self.engine, self.config.train, self.lr_factor())
        for number in range(self.accumulation):
            losses = self.loss(batch.part(number, self.micro_batch))
            self.engine.backward(losses[0])
            self.engine.step()
            self.losses.append(losses.detach())
        self.images += self.config.train.global_batch
        self.ema.update(self.images, self.config.train.global_batch)

    def loss(self, batch: Batch) -> Tensor:
        """Means of total, mse and vlb over a micro-batch, [3]."""
        device = self.cluster.device
        x0, noise, t, y = (v.to(device, non_blocking=True) for v in (batch.x0, batch.noise, batch.t, batch.y))
        x_t = self.schedule.q_sample(x0, t, noise)
        output = self.engine(x_t, t, y if self.num_classes else None)
        return torch.stack([loss.mean() for loss in hybrid_loss(output, x0, x_t, noise, t, self.schedule)])

    def lr_factor(self) -> float:
        """Of the next step: linear warm-up, constant, linear decay to the end."""
        train = self.config.train
        end = self.images + train.global_batch
        warmup = min(1.0, end / train.warmup_images) if train.warmup_images else 1.0
        decay = min(1.0, (train.total_images - self.images) / train.decay_images) if train.decay_images else 1.0
        return warmup * decay

    def due(self, interval: int) -> bool:
        """Whether the last step passed a multiple of ``interval`` images."""
        return interval > 0 and self.images // interval > (self.images - self.config.train.global_batch) // interval

    def log(self) -> None:
        """Record the means since the last record. Collective."""
        means = torch.stack(self.losses).mean(0)
        dist.all_reduce(means)
        total, mse, vlb = (means / self.cluster.world_size).tolist()
        now = time.perf_counter()
        rate = (self.images - self.logged_images) / (now - self.logged_at)
        self.losses, self.logged_images, self.logged_at = [], self.images, now
        norm = self.engine.get_global_grad_norm()  # None at stage 0
        if not math.isfinite(total) or (norm is not None and not math.isfinite(norm)):
            raise UserError(
                f"the loss or its gradient is not finite at {self.images:,} images; checkpoints of before are intact:"
                " lower train.lr, and start again to go on from the newest"
            )
        if self.monitor:
            values = {"loss/total": total, "loss/mse": mse, "loss/vlb": vlb}
            if norm is not None:
                values["grad_norm"] = float(norm)
            for group in self.engine.optimizer.param_groups:
                values[f"lr/{group['name']}"] = group["lr"]
            values |= {"images_per_second": rate, "mfu": rate * self.image_flops / self.peak}
            self.monitor.scalars(self.images, values)
            left = duration((self.config.train.total_images - self.images) / rate)
            self.monitor.report(
                self.images, loss=f"{total:.4f}", rate=f"{rate:.1f} images/s", mfu=f"{values['mfu']:.0%}", ETA=left
            )

    @torch.no_grad()
    def draw_samples(self) -> None:
        """A grid of samples with the averaged weights, from the same noise each time. Collective."""
        with self.off_the_clock():
            self._draw_samples(self.config.sample)

    def _draw_samples(self, sample: SampleConfig) -> None:
        model = DiffuSSM(self.config.model, self.shape[0], self.num_classes)
        model.load_state_dict(self.ema.state_dict())
        model.to(self.cluster.device).eval()
        mine = range(self.cluster.rank, sample.grid, self.cluster.world_size)
        images = np.empty((0,), np.uint8)
        if mine:
            with torch.autocast(self.cluster.device.type, torch.bfloat16, enabled=self.engine.torch_autocast_enabled()):
                latents = generate(
                    model,
                    self.schedule.respace(sample.steps),
                    self.shape,
                    mine,
                    [i * self.num_classes // sample.grid for i in mine],
                    num_classes=self.num_classes,
                    sampler=sample.sampler,
                    guidance=sample.guidance,
                    seed=self.config.train.seed,
                    device=self.cluster.device,
                )
            images = self.codec.decode(latents)
        parts: list[Any] = [None] * self.cluster.world_size
        dist.gather_object(images, parts if self.cluster.is_main else None)
        if self.monitor:
            whole = np.empty((sample.grid, *parts[0].shape[1:]), np.uint8)
            for rank, part in enumerate(parts):
                if len(part):
                    whole[rank :: self.cluster.world_size] = part
            columns = sample.grid // self.num_classes if self.num_classes else 0
            self.monitor.picture("samples", self.images, grid(whole, columns or math.ceil(sample.grid**0.5), zoom=2))

    def save(self) -> None:
        """Publish a checkpoint. Collective."""
        with self.off_the_clock():
            meta = {
                "format": checkpoint.FORMAT,
                "images": self.images,
                "stream": self.stream.state_dict(),
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
            checkpoint.save(
                self.run / "checkpoints",
                meta,
                self.ema.state_dict(),
                save_engine=lambda folder: self.engine.save_checkpoint(
                    str(folder), checkpoint.ENGINE, save_latest=False
                ),
                is_main=self.cluster.is_main,
                barrier=self.cluster.barrier,
                keep=self.config.train.keep_checkpoints,
            )

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """What happens inside does not count in images per second."""
        start = time.perf_counter()
        yield
        self.logged_at += time.perf_counter() - start

    def say(self, line: str) -> None:
        if self.monitor:
            self.monitor.say(line)

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from. It is read as a whole to verify it: by one rank."""
        resume, folder = self.config.train.resume, self.run / "checkpoints"
        newest = checkpoint.find(folder)
        if resume == "auto":
            return newest
        if newest and (resume == "none" or Path(resume).resolve() != newest.resolve()):
            raise UserError(f"train.resume {resume}, but {newest} exists: say auto, or choose another --run_dir")
        if resume == "none":
            return None
        checkpoint.verify(Path(resume))
        return Path(resume)

    def _choose_ssm_backend(self, found: Path | None, micro_batch: int, precision: torch.dtype) -> str:
        """The checkpoint's, or the faster one here. Chosen once a run: the other rounds otherwise. Collective."""
        if found:
            return checkpoint.load_meta(found)["config"]["train"]["ssm_backend"]
        model, positions, device = self.config.model, math.prod(self.shape[1:]), self.cluster.device
        return self.cluster.from_main(lambda: choose_ssm_backend(model, micro_batch, positions, precision, device))

    def _check_fit(self, found: Path, zero_stage: int) -> None:
        """Raise UserError unless this run continues the checkpoint's exactly."""
        meta = checkpoint.load_meta(found)
        saved = meta["config"]
        now = to_dict(self.config)
        for name, there, here in (
            ("model", saved["model"], now["model"]),
            ("diffusion", saved["diffusion"], now["diffusion"]),
            ("world size", meta["world_size"], self.cluster.world_size),
            ("ZeRO stage", meta["zero_stage"], zero_stage),
        ):
            if there != here:
                raise UserError(
                    f"{found} was saved with {name} {there}, this run has {here}: restore that, or change --run_dir"
                )
