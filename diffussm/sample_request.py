"""What images are asked for: of which checkpoint, with which weights, of which classes, and drawn how."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml

from diffussm.autoencoders.rounding import Rounding
from diffussm.config import SampleConfig
from diffussm.data.store import open_store
from diffussm.data.workers import Workers, from_first
from diffussm.errors import UserError
from diffussm.models.diffussm import DiffuSSM
from diffussm.training import checkpoint
from diffussm.training.checkpoint import MANIFEST, META, Checkpoint, name_of

RANDOM = "random"  # of --classes: a class at random for each image
RUNS = "runs/*/checkpoints/latest"


@dataclass(frozen=True)
class Request:
    """Images to draw. Image i is a function of (seed, i), its label, the weights and the settings.

    Its latents have the same bits in any batch on a CPU in fp32; on a GPU they may differ by a rounding between sizes
    of the batch, not between numbers of processes.

    Attributes:
        checkpoint: whose model draws.
        weights: their kind; None: those that the run began with.
        settings: sampler, steps and guidance.
        classes: ids, which take turns; none for an unconditional model.
        random_classes: each image's class is one of them at random, by the seed and the image's number.
        precision: of the network: fp32, or bf16 by autocast. The sampler's own arithmetic is fp32.
        rounding: of the pixels.
        count: images.
        batch: images at once.
        seed: of the noise.
        guidance_channels: guide only the first so many; None guides all.

    Raises:
        UserError: more steps than the model has, or channels than the latent.
    """

    checkpoint: Checkpoint
    weights: str | None
    settings: SampleConfig
    classes: list[int]
    count: int
    batch: int
    seed: int
    guidance_channels: int | None = None
    random_classes: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        steps, channels = self.checkpoint.meta["config"]["diffusion"]["steps"], self.checkpoint.meta["channels"]
        if not 1 <= self.settings.steps <= steps:
            raise UserError(f"--steps {self.settings.steps} is not in 1..{steps}, the model's")
        if self.guidance_channels is not None and not 1 <= self.guidance_channels <= channels:
            raise UserError(f"--guidance-channels {self.guidance_channels} is not in 1..{channels}, the latent's")

    def labels(self, indices: range) -> list[int] | None:
        """Of images by their numbers; None for an unconditional model."""
        if not self.classes:
            return None
        picks = range(self.count)
        if self.random_classes:
            picks = np.random.default_rng(self.seed).integers(len(self.classes), size=self.count)
        return [self.classes[picks[i] % len(self.classes)] for i in indices]

    def model(self) -> DiffuSSM:
        """The network, on the CPU, in eval mode. UserError where the checkpoint has no such weights."""
        if self.weights:
            return checkpoint.load_model(self.checkpoint, self.weights)
        torch.manual_seed(self.checkpoint.meta["config"]["train"]["seed"])
        return checkpoint.make_model(self.checkpoint.meta).eval()

    def identity(self, device: torch.device, untrained: bool) -> str:
        """Differs between requests for different images."""
        what = {**self.description(), "device": device.type, "untrained": untrained}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """How the images are drawn, for samples.json."""
        settings = {key: getattr(self.settings, key) for key in ("sampler", "steps", "guidance")}
        keys = "guidance_channels", "random_classes", "seed", "precision", "rounding"
        drawn = {"count": self.count, **settings, **{key: getattr(self, key) for key in keys}}
        return {"manifest": self.checkpoint.digest, **drawn}

    def description(self) -> dict[str, Any]:
        """All that the images depend on, as JSON, wherever the checkpoint lies: its manifest tells what it is."""
        values = {key: value for key, value in vars(self).items() if key not in ("checkpoint", "settings")}
        known = {"checkpoint": self.checkpoint.name, "manifest": self.checkpoint.digest}
        return {**known, **values, "settings": asdict(self.settings)}


def find_checkpoint(source: str | None, workers: Workers) -> Checkpoint:
    """The checkpoint that ``source`` is, or the newest complete one of the run that it is, or of the newest run.

    Rank 0 reads and verifies it; the others take the same one, even if training has published another meanwhile.

    Raises:
        UserError: there is none, or the one that was named is torn.
    """
    if source is None:
        runs = sorted(Path().glob(RUNS), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError(f"no checkpoint: no {RUNS} here: train first, or name a run or a checkpoint")
        source = str(runs[-1].parent)
    store, named = open_store(source), None
    if store.exists(MANIFEST) or store.exists(META):
        named = Checkpoint.at(source)
    elif store.exists("config.yaml"):
        try:
            places = yaml.safe_load(bytes(store.read("config.yaml")))["train"]
            store = open_store(places.get("checkpoints") or f"{source}/checkpoints")
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError):
            raise UserError(f"{source}/config.yaml is damaged: name a checkpoint in {source}/checkpoints") from None

    def verified_images() -> int:
        if named:
            named.verify()
        found = named or checkpoint.find(store)
        if found is None:
            raise UserError(
                f"{source} holds no complete checkpoint: it is neither a checkpoint nor a run that has saved one"
            )
        return found.meta["images"]

    images = from_first(workers, "images seen", verified_images)
    return named or Checkpoint(store, name_of(images))


def samples_folder(source: str | None, found: Checkpoint) -> Path:
    """Where samples go by default: samples/ in the run's folder; here, where only a checkpoint elsewhere was named."""
    for run in (Path(str(found.store)).parent, Path(source or "")):
        if (run / "config.yaml").is_file():
            return run / "samples"
    return Path("samples")


def chosen_classes(text: str | None, names: list[str]) -> list[int]:
    """Ids of the classes asked for, as ids or names; of all if ``text`` is None or RANDOM.

    Raises:
        UserError: for one that is none.
    """
    if text is not None and not names:
        raise UserError("--classes: the model is unconditional, it has none")
    if text in (None, RANDOM):
        return list(range(len(names)))
    chosen = []
    for item in text.split(","):
        if item.strip() in names:
            chosen.append(names.index(item.strip()))
        elif item.strip().isdecimal() and int(item) < len(names):
            chosen.append(int(item))
        else:
            known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise UserError(f"--classes {item!r} is not one of 0..{len(names) - 1} or a name ({known})")
    return chosen
