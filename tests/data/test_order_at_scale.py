"""The order's contract on data sets and worlds of the size that it is for, simulated: no sample is stored."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.index import SAMPLE_DTYPE, Index, Shard, publish_index, shard_name
from diffussm.data.order import WINDOW_BYTES, SampleOrder
from diffussm.data.reader import RANGE_BYTES, SampleReader
from diffussm.data.store import open_store

pytestmark = pytest.mark.unit

SAMPLE_BYTES, STRIDE = 16 << 10, 18_432  # moments [8, 32, 32] of float16; with their headers and label in a tar
SHARD = 4096
GLOBAL_BATCH = 21_504  # 1, 7, 24, 64 and 1024 divide it
WORLDS = (1, 7, 24, 64, 1024)
SIZES = (1_281_167, 100_000_000)


def shard_rows() -> np.ndarray:
    rows = np.zeros(SHARD, SAMPLE_DTYPE)
    rows["offset"] = 1024 + 640 + STRIDE * np.arange(SHARD, dtype=np.uint64)
    rows["length"] = SAMPLE_BYTES
    return rows


@dataclass
class Rows:
    """A table of samples that are alike in every shard: 100M of them would take 2 GB."""

    count: int
    rows: np.ndarray

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        return self.rows[ids % SHARD]


def make_index(count: int) -> Index:
    counts = [SHARD] * (count // SHARD) + [count % SHARD] * bool(count % SHARD)
    return Index(
        source={}, codec={}, latent_shape=(4, 32, 32), dtype=np.dtype("<f2"), posterior=True, scale=1.0, shift=0.0,
        class_names=[], samples=Rows(count, shard_rows()), hash="",
        shards=[Shard(shard_name(i), n * STRIDE + 10_240, n, "0" * 64) for i, n in enumerate(counts)],
    )  # fmt: skip


@pytest.fixture(scope="module", params=SIZES)
def index(request: pytest.FixtureRequest) -> Index:
    return make_index(request.param)


@pytest.fixture(scope="module")
def order(index: Index) -> SampleOrder:
    return SampleOrder.of_index(index, GLOBAL_BATCH, seed=7)


def parts(world: int) -> list[tuple[int, int]]:
    share = GLOBAL_BATCH // world
    return [(rank * share, (rank + 1) * share) for rank in range(world)]


def test_each_sample_at_most_once_an_epoch_and_all_but_a_batch(index: Index, order: SampleOrder) -> None:
    seen = np.zeros(len(index), bool)
    for window in range(order.windows_per_epoch):
        seen[order.window_ids(window, 0, GLOBAL_BATCH)] = True
    assert seen.sum() == order.steps_per_epoch * GLOBAL_BATCH > len(index) - GLOBAL_BATCH


def test_a_step_is_the_same_at_every_world(index: Index, order: SampleOrder) -> None:
    for step in (0, order.steps_per_epoch - 1, 10**6 + 17, 10**9):
        whole = order.step_ids(step)
        assert len(np.unique(whole)) == GLOBAL_BATCH
        for world in WORLDS:
            other = SampleOrder.of_index(index, GLOBAL_BATCH, seed=7)
            np.testing.assert_array_equal(np.concatenate([other.step_ids(step, *part) for part in parts(world)]), whole)


def test_all_ranks_together_read_hardly_more_than_the_data_set(index: Index, order: SampleOrder) -> None:
    """Without a cache. Of the larger set, the reads of every 24th rank in one window."""
    reader = SampleReader(open_store("nowhere"), index)
    whole_epoch = order.windows_per_epoch == 1
    for world in WORLDS[1:]:
        ranges, samples = [], 0
        for part in parts(world)[:: 1 if whole_epoch else 24]:
            ids = order.window_ids(order.windows_per_epoch // 2, *part)
            samples += ids.size
            for run in reader.plan(np.unique(ids)):
                rows = index.samples[run.ids]
                ranges.append(int(rows["offset"][-1] - rows["offset"][0]) + SAMPLE_BYTES)
        assert sum(ranges) <= 1.01 * samples * STRIDE
        assert np.mean(ranges) > 3 * 2**20 and max(ranges) <= RANGE_BYTES + STRIDE
        if whole_epoch:
            assert sum(ranges) <= 1.01 * sum(shard.size for shard in index.shards)


def test_windows_are_as_large_as_the_run_or_what_a_store_serves_well(index: Index, order: SampleOrder) -> None:
    steps = order.window_ids(0, 0, 1).shape[1]
    assert steps == order.steps_per_epoch or WINDOW_BYTES <= (steps + 1) * STRIDE <= 2 * WINDOW_BYTES


def test_a_million_ranks_and_steps_away_costs_nothing_more() -> None:
    """Drawing one rank's share of one step touches its own streams and the table of shards, whatever comes before."""
    order = SampleOrder.of_index(make_index(SIZES[1]), GLOBAL_BATCH, seed=7)
    order.step_ids(0, 0, 21)
    tracemalloc.start()
    try:
        order.step_ids(10**12, 21, 42)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    shards = SIZES[1] // SHARD
    assert peak < 8 * (8 * shards + 21 * 256)  # a few arrays of one number a shard, and of one a stream and step


def test_an_index_takes_at_most_40_bytes_a_sample(tmp_path: Path) -> None:
    count = SIZES[0]
    store = open_store(tmp_path)
    shards = make_index(count).shards
    samples = np.concatenate([shard_rows()[: shard.count] for shard in shards])
    for shard in shards:
        with (tmp_path / shard.name).open("wb") as file:
            file.truncate(shard.size)  # takes no room on the disk
    codec = PixelCodec(64, 64, 2, size=64)  # whose latents [8, 32, 32] are stored as bytes
    samples["length"] = 8 * 32 * 32
    publish_index(store, {}, [], codec, shards, samples)
    del samples
    tracemalloc.start()
    try:
        index = Index.load(store)
        order = SampleOrder.of_index(index, GLOBAL_BATCH, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(index) == count and len(order.step_ids(5, 0, 21)) == 21
    assert peak < 40 * count
