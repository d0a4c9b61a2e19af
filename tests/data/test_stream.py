from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from diffussm.data.index import Index
from diffussm.data.order import SampleOrder
from diffussm.data.reader import SampleReader
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


def test_close_ends_the_thread(parts: tuple[SampleReader, SampleOrder]) -> None:
    before = threading.active_count()
    stream = LatentStream(*parts, 0, HALF, keep)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    stream.close()
    assert threading.active_count() == before
    with pytest.raises((RuntimeError, CancelledError)):
        next(stream)
