"""Mean and spread of a data set's latents, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffussm.data.index import Index

SAMPLES, RUN = 10_000, 250  # samples looked at, and how many of them follow each other: one read each


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over samples of the latents' means, as stored: ``count`` values a channel."""

    count: int
    total: np.ndarray  # float64 [C]
    squares: np.ndarray  # float64 [C]

    @classmethod
    def of(cls, moments: np.ndarray, channels: int) -> Statistics:
        """Of moments [n, C or 2C, h, w], whose first C = ``channels`` channels are the means."""
        values = moments[:, :channels].astype(np.float32 if moments.dtype.itemsize < 4 else np.float64)
        total = values.sum((0, 2, 3), dtype=np.float64)
        squares = np.square(values).sum((0, 2, 3), dtype=np.float64)
        return cls(values[:, 0].size, total, squares)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> np.ndarray:
        """Float64 [C]."""
        return self.total / self.count

    @property
    def std(self) -> np.ndarray:
        """Float64 [C]."""
        return np.sqrt(np.maximum(self.squares / self.count - self.mean**2, 0))


def spread_ids(count: int, samples: int = SAMPLES) -> np.ndarray:
    """Numbers of about ``samples`` of ``count`` samples: runs that lie evenly over them, or all where there are few."""
    if count <= samples:
        return np.arange(count)
    starts = np.linspace(0, count - RUN, samples // RUN).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(RUN))


def scaling_warning(index: Index, statistics: Statistics) -> str | None:
    """One line where an autoencoder's latents, as the model is to see them, are far from mean 0 and deviation 1."""
    if index.dtype == np.uint8:
        return None  # pixels: as dark or bright as the images are
    everything = Statistics(statistics.count * len(statistics.total), statistics.total.sum(), statistics.squares.sum())
    mean, std = (everything.mean - index.shift) * index.scale, everything.std * index.scale
    if 0.5 <= std <= 2 and abs(mean) <= 1:
        return None
    return (
        f"normalised by scale {index.scale:g} and shift {index.shift:g}, latents have mean {mean:.2f} and deviation "
        f"{std:.2f}, where the model expects 0 and 1: is the autoencoder's scaling_factor right? By these latents "
        f"it would be {1 / (everything.std or 1):.4g}"
    )
