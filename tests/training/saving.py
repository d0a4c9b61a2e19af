"""Checkpoints by one rank, for the tests of what is saved and of how."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import torch

from diffussm.config import Config, to_dict
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.training import checkpoint, saver
from diffussm.training.partition import Fragment

SIZE = ModelConfig("custom", 16, 1, 2, 4)


def model(seed: int = 0) -> DiffuSSM:
    torch.manual_seed(seed)
    return DiffuSSM(SIZE, channels=4, num_classes=3)


def partition(network: DiffuSSM) -> SimpleNamespace:
    """All of a network on one rank."""
    fragments = [
        Fragment(name, "dense", 0, p.numel(), number, 0) for number, (name, p) in enumerate(network.named_parameters())
    ]
    return SimpleNamespace(
        masters=list(network.parameters()),
        fragments=fragments,
        shapes={name: p.shape for name, p in network.named_parameters()},
    )


def make_saver(store, cluster, keep=2, every=0, best=None):
    def surplus(there):
        return checkpoint.surplus(there, keep, every, best)

    return saver.Saver(store, cluster, partition(model()), surplus, best)


def save(store, cluster, *images, metrics=None, make=None, wait=True, score=None, **keep) -> DiffuSSM:
    """Checkpoints by one rank, whose average is the weights times 2."""
    network = model()
    made = make or make_saver(store, cluster, **keep)
    for number, seen in enumerate(images):
        meta = {
            "format": checkpoint.FORMAT, "images": seen, "config": to_dict(Config(model=SIZE)), "channels": 4,
            "num_classes": 3, "ema_images": [40.0], "metrics": {"loss/total": metrics[number]} if metrics else {},
        }  # fmt: skip
        weights = [p.detach() for p in network.parameters()]
        kinds = {"weight": weights, "exp_avg": weights, "exp_avg_sq": weights, "ema-40": [2 * p for p in weights]}
        made.save(meta, kinds, wait, score)
    return network


def names(store) -> list[str]:
    return [found.name for found in reversed(checkpoint.complete(store))]


def name(images: int) -> str:
    return f"images-{images:012d}"


def files(store) -> set[str]:
    root = Path(str(store))
    there = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - {".owner.lock"}
    return {re.sub(r"rank-00000-[0-9a-f]{8}\.", "rank-00000-x.", file) for file in there}


def whole_path(place: Path) -> Path:
    """``place``, with the writer's name for "x"."""
    (found,) = place.parent.glob(place.name.replace("-x.", "-*."))
    return found
