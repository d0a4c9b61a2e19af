"""Samples a second of the stream that training reads, against stock webdataset and against a memory-mapped array.

    python -m benchmarks.stream                    about 4 minutes on 2 cores
    python -m benchmarks.stream --quick            fewer samples and rounds

A real S3 server (SeaweedFS) on this machine holds 20,000 samples of a 4 × 32 × 32 latent's moments, 16 KB each, in
shards of 500. Each candidate reads an epoch of them in batches of 256, by turns, in one process:

- ours from S3, and ours from a node's cache that is filled: whole, checked, in the order of training;
- webdataset over a boto3 body, and over `pipe:aws s3 cp`, as its users write it: decoded, batched, unchecked;
- local mmap: torch's DataLoader over one memory-mapped array in shuffled order; and, of that array, `batches at once`:
  one call of numpy gathers a batch, which is no more than a copy.

The server and the client share the cores, as they do in no cluster; the ratios hold for that. The AWS command line
needs a botocore of its own, so it is installed into a folder of its own, build/aws.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from webdataset.gopen import gopen_schemes

from benchmarks.common import Goal, Report, make_parser, say
from benchmarks.seaweed import Seaweed
from diffussm.data.cache import ShardCache
from diffussm.data.index import Index, Shard, publish_index, shard_name
from diffussm.data.order import SampleOrder
from diffussm.data.reader import SampleReader
from diffussm.data.shards import ShardBuilder
from diffussm.data.store import Store, open_store
from diffussm.data.stream import LatentStream
from diffussm.errors import UserError, run_command

ROOT = Path(__file__).parent.parent
BATCH, CLASSES, SAMPLES_PER_SHARD = 256, 1000, 500
SHAPE = (8, 32, 32)
SEEK_SAMPLES, SEEK_BATCH = 100_000_000, 21_504
Reading = tuple[float, float]  # samples a second, microseconds of CPU a sample


class Moments:
    """In place of an autoencoder: what the index says of the samples."""

    latent_shape, dtype, posterior, scale, shift = (4, 32, 32), np.dtype("<f2"), True, 0.18215, 0.0

    def spec(self) -> dict[str, str]:
        return {"name": "random numbers"}


class Packed(Dataset):
    """All samples in one memory-mapped array."""

    def __init__(self, path: Path, labels: np.ndarray) -> None:
        self.moments, self.labels = np.load(path, mmap_mode="r"), labels

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        return self.moments[number], int(self.labels[number])


def main() -> None:
    parser = make_parser("stream", __doc__)
    arguments = parser.parse_args()
    count, rounds = (4_000, 2) if arguments.quick else (20_000, 5)
    torch.set_num_threads(1)
    report = Report("samples a second, ours / theirs", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, Seaweed(Path(folder, "server")) as server:
        os.environ.update(server.environment)
        boto3.client("s3").create_bucket(Bucket="bench")
        say(f"stream: writing {count:,} samples")
        store = open_store("s3://bench/train")
        index = write(store, count, Path(folder, "packed.npy"))
        measure(report, store, index, Path(folder), rounds)
    seek(report)
    report.finish(arguments.json)


def write(store: Store, count: int, packed: Path) -> Index:
    """The data set, and the same samples in one array."""
    random = np.random.default_rng(0)
    array = np.lib.format.open_memmap(packed, "w+", np.float16, (count, *SHAPE))
    shards, rows = [], []
    for number in tqdm(range(count // SAMPLES_PER_SHARD), desc="writing", leave=False, disable=None):
        moments = random.standard_normal((SAMPLES_PER_SHARD, *SHAPE), np.float32).astype(np.float16)
        first = number * SAMPLES_PER_SHARD
        array[first : first + SAMPLES_PER_SHARD] = moments
        builder = ShardBuilder(number)
        for place, sample in enumerate(moments):
            builder.add(sample, (first + place) % CLASSES)
        content, table = builder.finish()
        stat = store.put(shard_name(number), content)
        sha256 = hashlib.sha256(content).hexdigest()
        shards.append(Shard(shard_name(number), len(content), SAMPLES_PER_SHARD, sha256, stat.etag))
        rows.append(table)
    array.flush()
    names = [str(label) for label in range(CLASSES)]
    publish_index(store, {"name": "benchmark"}, names, Moments(), shards, np.concatenate(rows))
    return Index.load(store)


def measure(report: Report, store: Store, index: Index, folder: Path, rounds: int) -> None:
    order = SampleOrder.of_index(index, BATCH, seed=0)
    packed = Packed(folder / "packed.npy", index.samples["label"])
    urls = [f"{store}/{shard.name}" for shard in index.shards]
    aws = install_aws()
    cache = ShardCache(store, folder / "cache", 1 << 36)
    candidates: dict[str, Callable[[], Iterator[int]]] = {
        "ours, S3": lambda: ours(SampleReader(store, index), order),
        "ours, cache": lambda: ours(SampleReader(store, index, cache), order),
        "webdataset, boto3": lambda: over_webdataset(urls),
        "webdataset, pipe": lambda: over_webdataset([f"pipe:{aws} s3 cp --quiet {url} -" for url in urls]),
        "local mmap": lambda: by_loader(packed, order),
        "local mmap, batches at once": lambda: by_batches(packed, order),
    }
    gopen_schemes["s3"] = open_body
    readings: dict[str, list[Reading]] = {name: [] for name in candidates}
    for turn in tqdm(range(1 + rounds), desc="reading", leave=False, disable=None):
        for name, candidate in candidates.items():
            if name == "webdataset, pipe" and turn > 2:
                continue  # it is slow
            reading = read_epoch(candidate(), order)
            if turn:  # the first fills caches
                readings[name].append(reading)
    rate = {name: statistics.median(rate for rate, _ in values) for name, values in readings.items()}
    cpu = {name: statistics.median(cpu for _, cpu in values) for name, values in readings.items()}
    for name in candidates:
        report.rows.append({"name": name, "samples_per_second": rate[name], "cpu_us_per_sample": cpu[name]})
    for ours_, theirs, goal in (
        ("ours, S3", "webdataset, boto3", 5.0),
        ("ours, S3", "webdataset, pipe", 50.0),
        ("ours, cache", "local mmap", 0.6),
        ("ours, cache", "local mmap, batches at once", None),
    ):
        name, value = f"{ours_} / {theirs}", rate[ours_] / rate[theirs]
        report.rows.append({"name": name, "ratio": value})
        if goal:
            report.goals.append(Goal(name, value, goal))
    report.goals.append(Goal("CPU µs a sample, S3", cpu["ours, S3"], 40.0, at_most=True))


def read_epoch(batches: Iterator[int], order: SampleOrder) -> Reading:
    """An epoch's batches, all of which must come."""
    started, used = time.perf_counter(), cpu_seconds()
    samples = sum(batches)
    seconds, used = time.perf_counter() - started, cpu_seconds() - used
    if samples < order.steps_per_epoch * BATCH:
        raise RuntimeError(f"an epoch of {samples} samples, not {order.steps_per_epoch * BATCH}")
    return samples / seconds, used / samples * 1e6


def cpu_seconds() -> float:
    """Of this process and of those that it has started and seen end."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ours(reader: SampleReader, order: SampleOrder) -> Iterator[int]:
    stream = LatentStream(reader, order, 0, slice(0, BATCH), lambda step, positions, moments, labels: (moments, labels))
    with stream:
        for _ in range(order.steps_per_epoch):
            moments, _ = next(stream)
            yield len(moments)


def over_webdataset(urls: list[str]) -> Iterator[int]:
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("latent.npy", "cls").batched(BATCH)
    for moments, _ in dataset:
        yield len(moments)


def open_body(url: str, mode: str = "rb", bufsize: int = 0) -> object:
    """An object's body as boto3 streams it."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return boto3_client().get_object(Bucket=bucket, Key=key)["Body"]


_clients: list[object] = []


def boto3_client() -> object:
    if not _clients:
        _clients.append(boto3.client("s3"))
    return _clients[0]


def by_loader(packed: Packed, order: SampleOrder) -> Iterator[int]:
    steps = [order.step_ids(step).tolist() for step in range(order.steps_per_epoch)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the array is read-only
        for moments, _ in DataLoader(packed, batch_sampler=steps):
            yield len(moments)


def by_batches(packed: Packed, order: SampleOrder) -> Iterator[int]:
    for step in range(order.steps_per_epoch):
        ids = order.step_ids(step)
        moments, _ = packed.moments[ids], packed.labels[ids].astype(np.int64)
        yield len(moments)


def install_aws() -> Path:
    """The AWS command line, in a virtual environment of its own."""
    aws = ROOT / "build" / "aws" / "bin" / "aws"
    if not aws.exists():
        say("stream: installing the AWS command line")
        folder = aws.parent.parent
        pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", "awscli"]
        for command in ([sys.executable, "-m", "venv", "--clear", folder], pip):
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                raise UserError(f"cannot install the AWS command line into {folder}: is the package index there?")
    return aws


def seek(report: Report) -> None:
    """How long a new process needs to find the samples of a step far in, of the whole global batch."""
    counts = np.full(SEEK_SAMPLES // 4096, 4096)
    times = []
    for step in range(10**9, 10**9 + 5):
        started = time.perf_counter()
        SampleOrder(counts, SEEK_BATCH, seed=0, window=228).step_ids(step)
        times.append(time.perf_counter() - started)
    report.rows.append({"name": "seek", "ms": 1e3 * statistics.median(times)})
    report.goals.append(Goal("seek in 100M samples, ms", 1e3 * statistics.median(times), 100.0, at_most=True))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        run_command(main)
