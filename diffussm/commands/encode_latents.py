"""Encode images into latent shards: `tools/encode_latents.py`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.commands.common import Parser, emit_json
from diffussm.data.encode import SAMPLES_PER_SHARD, encode
from diffussm.data.index import INDEX_NAME, Index
from diffussm.data.prepare import raw_folder
from diffussm.data.reader import SampleReader
from diffussm.data.sources import SOURCES, SPLITS
from diffussm.data.store import Store, open_store

CODECS = {"pixel": PixelCodec}
STATISTICS_SAMPLES = 10_000  # read back, and so checked


def main() -> None:
    arguments = parse_arguments()
    raw = arguments.raw or raw_folder(arguments.out, arguments.source)
    reports = []
    for split in [arguments.split] if arguments.split else SPLITS:
        store = open_store(arguments.out if arguments.split else f"{arguments.out}/{split}")
        source = SOURCES[arguments.source](split, raw)
        codec = CODECS[arguments.codec](*source.images.shape[1:])
        there = store.exists(INDEX_NAME)
        began = time.perf_counter()
        index = encode(source, codec, store, arguments.samples_per_shard, arguments.seed)
        speed = None if there else len(source) / (time.perf_counter() - began)
        reports.append(describe(store, index, speed))
        if arguments.json != "-":
            print_report(reports[-1])
    emit_json(arguments.json, reports)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "Encode images into tar shards of latents with an index. A run that was interrupted is run again.",
        "python tools/encode_latents.py --source fashion-mnist --codec pixel --out data/fashion32",
    )
    parser.add_argument("--source", required=True, choices=SOURCES, help="the images")
    parser.add_argument("--split", choices=SPLITS, help="one split, into OUT (default: each, into OUT/SPLIT)")
    parser.add_argument("--codec", default="pixel", choices=CODECS, help="what encodes them (default: pixel)")
    parser.add_argument("--out", required=True, help="folder for the shards and the index")
    parser.add_argument(
        "--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples' order (default: 0)")
    parser.add_argument(
        "--raw", type=Path, metavar="FOLDER", help="where its files are (default: SOURCE-raw beside OUT)"
    )
    parser.add_json_option()
    arguments = parser.parse_args()
    if arguments.samples_per_shard < 1:
        parser.error("--samples-per-shard must be at least 1")
    if not 0 <= arguments.seed < 2**63:
        parser.error("--seed must be from 0 to 2^63 - 1")
    return arguments


def describe(store: Store, index: Index, images_per_second: float | None) -> dict[str, Any]:
    """The figures of an encoded data set; ``mean`` and ``std`` are per channel, of normalised latents."""
    ids = np.linspace(0, len(index) - 1, min(len(index), STATISTICS_SAMPLES)).astype(np.int64)
    moments, _ = SampleReader(store, index).read(ids)
    means = moments[:, : index.latent_shape[0]].astype(np.float64)
    latents = (means - index.shift) * index.scale
    return {
        "path": str(store),
        "samples": len(index),
        "shards": len(index.shards),
        "bytes": sum(shard.size for shard in index.shards),
        "images_per_second": images_per_second,
        "latent_shape": list(index.latent_shape),
        "mean": latents.mean((0, 2, 3)).tolist(),
        "std": latents.std((0, 2, 3)).tolist(),
    }


def print_report(report: dict[str, Any]) -> None:
    speed = report["images_per_second"]
    print(report["path"])
    print(f"  samples       {report['samples']:,}")
    print(f"  shards        {report['shards']:,}")
    print(f"  bytes         {report['bytes']:,}")
    print(f"  images/s      {f'{speed:,.0f}' if speed else 'already encoded'}")
    print(f"  latent        {'×'.join(map(str, report['latent_shape']))}, normalised, by channel:")
    for name in ("mean", "std"):
        print(f"    {name:11} {' '.join(f'{value:7.3f}' for value in report[name])}")
