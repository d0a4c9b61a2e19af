"""Images to the features that the metrics compare. Figures of different extractors cannot be compared."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffussm.threads import map_batches


@dataclass(frozen=True)
class Features:
    """Features of N images, all float32."""

    pool: Tensor  # [N, D]: one vector an image, for FID and precision/recall
    spatial: Tensor  # [N, S]: where in the image things are, for sFID
    probabilities: Tensor  # [N, K]: of the classes, for IS

    def __len__(self) -> int:
        return len(self.pool)


class Extractor(Protocol):
    """A frozen network. Every figure computed from its features bears its name."""

    name: str
    pool_size: int  # D
    spatial_size: int  # S
    batch_size: int  # images that one thread takes fastest at once

    def __call__(self, images: np.ndarray) -> Features:
        """Features of uint8 images [N, H, W, 1 or 3]. May be called by several threads at once."""
        ...


def extract(extractor: Extractor, images: np.ndarray, what: str) -> Features:
    """Features of uint8 images [N, H, W, 1 or 3]; a progress bar on stderr says of ``what``."""
    parts = [images[start : start + extractor.batch_size] for start in range(0, len(images), extractor.batch_size)]
    features = []
    refresh = 0.5 if sys.stderr.isatty() else 10.0  # seconds
    with tqdm(total=len(images), desc=f"features of {what}", unit="image", mininterval=refresh) as bar:
        for part in map_batches(extractor, parts):
            features.append(part)
            bar.update(len(part))
    return Features(
        pool=torch.cat([part.pool for part in features]),
        spatial=torch.cat([part.spatial for part in features]),
        probabilities=torch.cat([part.probabilities for part in features]),
    )
