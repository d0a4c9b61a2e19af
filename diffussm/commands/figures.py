"""What the commands that make and verify data sets tell of one."""

from __future__ import annotations

from typing import Any

from diffussm.data.index import Index
from diffussm.data.normalisation import Statistics
from diffussm.data.store import Store

FORMS = ("stored", "normalised")  # latents as they lie in the shards, and as the model sees them


def data_figures(store: Store, index: Index, statistics: Statistics | None) -> dict[str, Any]:
    """The figures of a data set; where there are statistics, with mean and deviation per channel."""
    figures = {
        "path": str(store),
        "samples": len(index),
        "skipped": index.source.get("skipped", 0),
        "shards": len(index.shards),
        "bytes": sum(shard.size for shard in index.shards),
        "latent_shape": list(index.latent_shape),
    }
    if statistics:
        mean, std = statistics.mean, statistics.std
        figures["stored"] = {"mean": mean.tolist(), "std": std.tolist()}
        figures["normalised"] = {
            "mean": ((mean - index.shift) * index.scale).tolist(),
            "std": (std * index.scale).tolist(),
        }
    return figures


def print_data_figures(figures: dict[str, Any]) -> None:
    print(figures["path"])
    for name in ("samples", "shards", "bytes"):
        print(f"  {name:13} {figures[name]:,}")
    if figures["skipped"]:
        print(f"  left out      {figures['skipped']:,} images that could not be decoded: bad-images.json")
    print(f"  latent        {'×'.join(map(str, figures['latent_shape']))}, by channel:")
    for form in FORMS:
        for name, values in figures.get(form, {}).items():
            print(f"    {f'{form} {name}':15} {' '.join(f'{value:8.3f}' for value in values)}")
