"""Images to the features that the metrics compare. Figures of different extractors cannot be compared."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffussm.determinism import same_bits_each_time

BATCH_ON_GPU = 64  # images

_turn = threading.Lock()


@dataclass(frozen=True)
class Features:
    """Features of N images, all float32, on the CPU."""

    pool: Tensor  # [N, D]: one vector an image, for FID and precision/recall
    spatial: Tensor  # [N, S]: where in the image things are, for sFID
    probabilities: Tensor  # [N, K]: of the classes, for IS

    def __len__(self) -> int:
        return len(self.pool)

    @classmethod
    def join(cls, parts: Sequence[Features]) -> Features:
        """Those of all parts, in their order."""
        names = [f.name for f in fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


class Extractor(Protocol):
    """A frozen network. Every figure computed from its features bears its name.

    Attributes:
        name: of the network.
        identity: name and weights.
        pool_size, spatial_size: D and S of :class:`Features`.
        batch_size: images that one thread takes fastest at once.
        device: where it computes.
    """

    name: str
    identity: str
    pool_size: int
    spatial_size: int
    batch_size: int
    device: torch.device

    def __call__(self, images: np.ndarray) -> Features:
        """Features of uint8 images [N, H, W, 1 or 3]. May be called by several threads at once."""
        ...


@contextlib.contextmanager
def extracting(device: torch.device) -> Iterator[None]:
    """Around a network's call: without gradients; on a GPU one thread at a time, in full fp32."""
    with torch.inference_mode():
        if device.type == "cpu":
            yield
            return
        with _turn, same_bits_each_time():
            yield
