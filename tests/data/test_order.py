from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffussm.data.index import Index
from diffussm.data.order import SampleOrder, philox, random_permutation
from diffussm.data.store import open_store
from diffussm.errors import UserError

pytestmark = pytest.mark.unit

LAYOUTS = [
    # shard counts, global batch, window
    ([1000], 24, 256),
    ([100] * 9 + [57], 24, 16),
    ([5, 300, 1, 44, 90, 90], 12, 7),
    ([13], 12, 256),
    ([12], 12, 4),
]


def epoch_ids(order: SampleOrder, epoch: int) -> np.ndarray:
    first = epoch * order.steps_per_epoch
    return np.array([order.step_ids(first + step) for step in range(order.steps_per_epoch)])


@pytest.mark.parametrize(("counts", "batch", "window"), LAYOUTS)
def test_each_sample_at_most_once_an_epoch_and_all_but_a_batch(counts: list[int], batch: int, window: int) -> None:
    order = SampleOrder(counts, batch, seed=5, window=window)
    for epoch in (0, 1, 7):
        ids = epoch_ids(order, epoch)
        assert ids.shape == (sum(counts) // batch, batch)
        assert len(np.unique(ids)) == ids.size > sum(counts) - batch
        assert ids.min() >= 0 and ids.max() < sum(counts)


@pytest.mark.parametrize(("counts", "batch", "window"), LAYOUTS)
def test_ranks_together_take_the_same_batch_at_any_world_size(counts: list[int], batch: int, window: int) -> None:
    whole = SampleOrder(counts, batch, seed=5, window=window)
    steps = range(2 * whole.steps_per_epoch + 1)
    expected = [whole.step_ids(step) for step in steps]
    for world in (1, 2, 3, 4, 6, 12):
        ranks = [SampleOrder(counts, batch, seed=5, window=window) for _ in range(world)]
        share = batch // world
        for step in steps:
            parts = [order.step_ids(step, r * share, (r + 1) * share) for r, order in enumerate(ranks)]
            np.testing.assert_array_equal(np.concatenate(parts), expected[step])


def test_seeking_gives_what_walking_gives() -> None:
    walked = SampleOrder([100] * 9 + [57], 24, seed=5, window=16)
    expected = [walked.step_ids(step) for step in range(200)]
    for step in (199, 0, 57, 40, 38, 15, 16):
        np.testing.assert_array_equal(
            SampleOrder([100] * 9 + [57], 24, seed=5, window=16).step_ids(step), expected[step]
        )


def batchmates(ids: np.ndarray, count: int) -> np.ndarray:
    """The step at which each sample comes; -1 for what the epoch leaves out."""
    step = np.full(count, -1)
    step[ids] = np.arange(len(ids))[:, None]
    return step


@pytest.mark.parametrize("counts", [[2000], [500] * 4, [50] * 40])
def test_epochs_and_seeds_differ(counts: list[int]) -> None:
    a = SampleOrder(counts, 32, seed=1)
    b = SampleOrder(counts, 32, seed=2)
    tables = [batchmates(epoch_ids(order, epoch), 2000) for order, epoch in ((a, 0), (a, 1), (a, 2), (b, 0))]
    for i, one in enumerate(tables):
        for other in tables[:i]:
            assert (one == other).mean() < 0.1  # 62 steps: by chance 0.016
            left_out, left_out_too = np.flatnonzero(one < 0), np.flatnonzero(other < 0)
            assert len(left_out) == 16 and set(left_out) != set(left_out_too)


def test_one_step_takes_samples_from_the_whole_data_set() -> None:
    order = SampleOrder([400] * 10, 40, seed=0)
    for step in range(0, order.steps_per_epoch, 7):
        shares = np.bincount(order.step_ids(step) // 400, minlength=10)
        assert shares.min() >= 1 and shares.max() <= 8


def test_batches_of_a_shuffled_set_hold_all_classes() -> None:
    labels = random_permutation(philox(0, 9), 6000) % 10  # as the encoder shuffles
    order = SampleOrder([1500] * 4, 100, seed=0)
    counts = np.array([np.bincount(labels[order.step_ids(step)], minlength=10) for step in range(60)])
    assert (counts.sum(0) == 600).all()
    # Each count is about binomial(100, 0.1), of deviation 3.
    assert counts.std() == pytest.approx(3, rel=0.2) and counts.max() < 25


def test_a_window_is_shuffled_and_stays_together() -> None:
    order = SampleOrder([4096], 4, seed=0, window=64)
    ids = np.array([order.step_ids(step) for step in range(order.steps_per_epoch)])  # [step, stream]
    shuffles = set()
    for first in range(0, 1024, 64):
        window = ids[first : first + 64]
        for stream in window.T:
            spread = np.ptp(np.sort((stream - stream.min()) % 4096))
            assert spread == 63 or (stream < 64).any()  # consecutive samples, perhaps round the end of the set
            assert (np.diff(stream) != 1).mean() > 0.9
            shuffles.add(tuple(np.argsort(stream)))
    assert len(shuffles) == 16 * 4  # each its own


def test_permutations_are_uniform() -> None:
    draws = [tuple(random_permutation(philox(0, 9, i), 3)) for i in range(6000)]
    counts = np.unique(draws, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # chi-squared, 5 degrees of freedom, p = 0.001


def test_the_order_is_what_it_was() -> None:
    """Checkpoints hold only the number of images seen: a later version must resume in the same order."""
    order = SampleOrder([500, 700, 300], 8, seed=1234, window=40)
    assert order.step_ids(0).tolist() == [472, 1368, 538, 752, 916, 1116, 99, 284]
    assert order.step_ids(1_000_000, 2, 5).tolist() == [752, 924, 1144]


@pytest.mark.parametrize(("counts", "batch", "window"), LAYOUTS)
def test_a_window_is_its_steps_side_by_side(counts: list[int], batch: int, window: int) -> None:
    order = SampleOrder(counts, batch, seed=5, window=window)
    for step in range(2 * order.steps_per_epoch + 1):
        number, place = order.find(step)
        ids = order.window_ids(number, 3, 9)
        np.testing.assert_array_equal(ids[:, place], order.step_ids(step, 3, 9))


@pytest.mark.parametrize("steps", [1, 5, 63, 64, 127, 128, 129, 1000])
def test_the_windows_of_an_epoch_are_equal(steps: int) -> None:
    order = SampleOrder([steps * 4], 4, seed=0, window=64)
    numbers = [order.find(step)[0] for step in range(2 * steps)]
    assert numbers == sorted(numbers) and max(numbers) == 2 * order.windows_per_epoch - 1
    sizes = np.bincount(numbers)
    assert np.ptp(sizes) <= 1 and sizes.min() >= min(steps, 64) and sizes.max() < 128
    assert [order.find(step)[1] for step in range(2 * steps)] == [n for size in sizes for n in range(size)]


def test_windows_are_what_object_stores_serve_well(encoded: Path) -> None:
    index = Index.load(open_store(encoded))  # 230 samples, of less than 4 MiB in all: one window
    assert SampleOrder.of_index(index, 10, seed=0).windows_per_epoch == 1


def test_too_few_samples() -> None:
    with pytest.raises(UserError, match="13 samples, fewer than one global batch of 14"):
        SampleOrder([10, 3], 14, seed=0)
