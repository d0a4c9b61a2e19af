from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from diffussm.data.index import Index
from diffussm.data.order import SampleOrder
from diffussm.data.reader import Run, SampleReader
from diffussm.data.store import open_store
from diffussm.data.stream import DEPTH, LatentStream
from diffussm.errors import UserError

pytestmark = pytest.mark.unit

HALF = slice(10, 20)


@pytest.fixture
def parts(encoded: Path) -> tuple[SampleReader, SampleOrder]:
    store = open_store(encoded)
    index = Index.load(store)
    return SampleReader(store, index), SampleOrder(index.shard_counts, 20, seed=0)


def keep(*arguments: object) -> tuple[object, ...]:
    return arguments


def test_steps_come_in_turn_from_the_first_asked_for(parts: tuple[SampleReader, SampleOrder]) -> None:
    reader, order = parts
    with LatentStream(reader, order, start_step=9, positions=HALF, collate=keep) as stream:
        for expected_step in range(9, 40):  # through the ends of epochs of 11
            step, positions, moments, labels = next(stream)
            assert (step, positions) == (expected_step, HALF)
            expected_moments, expected_labels = reader.read(order.step_ids(step, 10, 20))
            np.testing.assert_array_equal(moments, expected_moments)
            np.testing.assert_array_equal(labels, expected_labels)


def test_reads_ahead_in_its_own_thread(parts: tuple[SampleReader, SampleOrder]) -> None:
    seen, enough = [], threading.Event()

    def collate(step: int, *_: object) -> int:
        seen.append((step, threading.current_thread()))
        if step == DEPTH - 1:
            enough.set()
        return step

    with LatentStream(*parts, 0, HALF, collate) as stream:
        assert enough.wait(10)
        assert [step for step, _ in seen] == list(range(DEPTH))  # that far, and no farther
        assert threading.current_thread() not in [thread for _, thread in seen]
        assert next(stream) == 0


def test_an_error_comes_at_its_step_and_stays(parts: tuple[SampleReader, SampleOrder], encoded: Path) -> None:
    def collate(step: int, *_: object) -> int:
        if step == 2:
            raise ZeroDivisionError("in the thread")
        return step

    with LatentStream(*parts, 0, HALF, collate) as stream:
        assert [next(stream), next(stream)] == [0, 1]
        for _ in range(3):
            with pytest.raises(ZeroDivisionError, match="in the thread"):
                next(stream)


def test_a_damaged_sample_reaches_the_trainer(parts: tuple[SampleReader, SampleOrder], encoded: Path) -> None:
    for shard in encoded.glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    with LatentStream(*parts, 0, HALF, keep) as stream, pytest.raises(UserError, match="is unreadable"):
        next(stream)


def test_reads_nothing_before_it_is_asked(parts: tuple[SampleReader, SampleOrder]) -> None:
    before = threading.active_count()
    with LatentStream(*parts, 0, HALF, keep):
        assert threading.active_count() > before
    LatentStream(*parts, 0, HALF, keep)
    assert threading.active_count() == before


def test_close_ends_the_threads_and_next_begins_anew(parts: tuple[SampleReader, SampleOrder]) -> None:
    before = threading.active_count()
    stream = LatentStream(*parts, 0, HALF, keep)
    assert next(stream)[0] == 0
    assert threading.active_count() > before
    stream.close()
    stream.close()
    assert threading.active_count() == before
    assert next(stream)[0] == 1
    stream.close()


def test_small_windows_give_the_same_samples(parts: tuple[SampleReader, SampleOrder]) -> None:
    reader, _ = parts
    order = SampleOrder(reader.index.shard_counts, 20, seed=4, window=3)
    assert order.windows_per_epoch == 3
    with LatentStream(reader, order, 5, HALF, keep) as stream:
        for step in range(5, 30):
            got_step, _, moments, labels = next(stream)
            expected_moments, expected_labels = reader.read(order.step_ids(step, 10, 20))
            assert got_step == step
            np.testing.assert_array_equal(moments, expected_moments)
            np.testing.assert_array_equal(labels, expected_labels)


def test_a_window_is_read_once_and_the_next_ahead(encoded: Path) -> None:
    store = open_store(encoded)
    index = Index.load(store)
    order = SampleOrder(index.shard_counts, 20, seed=4, window=3)
    windows = [order.window_ids(window, 0, 20).ravel() for window in range(3)]
    assert [len(ids) for ids in windows] == [60, 80, 80]
    fetched, enough = [], threading.Event()

    class Watched(SampleReader):
        def read_run(self, run: Run, *arguments: np.ndarray) -> None:
            fetched.extend(run.ids.tolist())
            if len(fetched) == 140:
                enough.set()
            super().read_run(run, *arguments)

    with LatentStream(Watched(store, index), order, 0, slice(0, 20), keep) as stream:
        next(stream)
        if not fetched[140:]:  # a step of the second window may have been made already, and the third asked for
            assert enough.wait(10)
        assert sorted(fetched[:140]) == sorted(np.concatenate(windows[:2]))
        for _ in range(10):
            next(stream)
        assert sorted(fetched[:220]) == sorted(np.concatenate(windows))


def test_the_state_is_where_next_stands_at_any_world(parts: tuple[SampleReader, SampleOrder]) -> None:
    reader, order = parts
    with LatentStream(reader, order, 0, slice(0, 20), keep) as stream:
        for _ in range(13):
            next(stream)
        state = stream.state_dict()
        expected = [next(stream)[2] for _ in range(5)]
    assert state == {"data": reader.index.hash, "seed": 0, "global_batch": 20, "images": 13 * 20}
    for world in (1, 4):
        share = 20 // world
        streams = [LatentStream(reader, order, 0, slice(r * share, (r + 1) * share), keep) for r in range(world)]
        next(streams[0])  # begun or not
        for rank in streams:
            rank.load_state_dict(json.loads(json.dumps(state)))
        for batch in expected:
            np.testing.assert_array_equal(np.concatenate([next(rank)[2] for rank in streams]), batch)
        for rank in streams:
            rank.close()


@pytest.mark.parametrize(("field", "value"), [("data", "another"), ("seed", 1), ("global_batch", 10)])
def test_the_state_of_another_run_is_refused(
    parts: tuple[SampleReader, SampleOrder], field: str, value: object
) -> None:
    stream = LatentStream(*parts, 3, HALF, keep)
    with pytest.raises(UserError, match=f"was saved with {field} {value}, this run has"):
        stream.load_state_dict(stream.state_dict() | {field: value})
    assert stream.state_dict()["images"] == 60


def test_more_ranks_than_shards(parts: tuple[SampleReader, SampleOrder]) -> None:
    reader, order = parts  # 5 shards
    streams = [LatentStream(reader, order, 2, slice(rank, rank + 1), keep) for rank in range(20)]
    together = np.concatenate([next(stream)[2] for stream in streams])
    np.testing.assert_array_equal(together, reader.read(order.step_ids(2))[0])
    for stream in streams:
        stream.close()
