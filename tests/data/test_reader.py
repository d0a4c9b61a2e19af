from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.index import Index
from diffussm.data.reader import SampleReader
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import LocalStore, open_store
from diffussm.errors import UserError

pytestmark = pytest.mark.unit


def open_reader(folder: Path) -> SampleReader:
    store = open_store(folder)
    return SampleReader(store, Index.load(store))


def test_reads_every_image_once_with_its_label(encoded: Path, images: ArrayImages, codec: PixelCodec) -> None:
    reader = open_reader(encoded)
    moments, labels = reader.read(np.arange(230))
    assert moments.dtype == np.uint8 and moments.shape == (230, 4, 4, 4) and labels.dtype == np.int64
    of_image = {m.tobytes(): label for m, label in zip(codec.encode(images.images), images.labels, strict=True)}
    assert [of_image.pop(m.tobytes()) for m in moments] == labels.tolist()
    assert not of_image
    moments[:] = 0  # the caller's own


def test_any_order_and_repeats(encoded: Path) -> None:
    reader = open_reader(encoded)
    moments, labels = reader.read(np.arange(230))
    ids = np.array([229, 0, 49, 50, 0, 199, 200])
    some, some_labels = reader.read(ids)
    np.testing.assert_array_equal(some, moments[ids])
    np.testing.assert_array_equal(some_labels, labels[ids])
    assert reader.keys(ids)[:2] == ["00004-000029", "00000-000000"]
    assert reader.read(np.array([], np.int64))[0].shape == (0, 4, 4, 4)


def test_numbers_outside_the_data_set(encoded: Path) -> None:
    for number in (-1, 230):
        with pytest.raises(IndexError):
            open_reader(encoded).read(np.array([0, number]))


def test_an_altered_bit_is_found_and_named(encoded: Path) -> None:
    shard = encoded / "shard-00002.tar"
    content = bytearray(shard.read_bytes())
    content[int(Index.load(open_store(encoded)).samples["offset"][123]) + 63] ^= 1
    shard.write_bytes(content)
    reader = open_reader(encoded)
    reader.read(np.delete(np.arange(230), 123))
    with pytest.raises(UserError, match=r"shard-00002\.tar: sample 00002-000023 is unreadable: its bytes have changed"):
        reader.read(np.arange(230))


def test_a_shard_torn_after_opening_is_found(encoded: Path) -> None:
    reader = open_reader(encoded)
    shard = encoded / "shard-00004.tar"
    reader.read(np.array([229]))
    with shard.open("r+b") as file:
        file.truncate(int(reader.index.samples["offset"][229]) + 10)
    with pytest.raises(
        UserError, match=r"shard-00004\.tar: sample 00004-000029 is unreadable: the file ends before it"
    ):
        reader.read(np.array([228, 229]))


def test_a_shard_removed_after_opening_is_found(encoded: Path) -> None:
    reader = open_reader(encoded)
    (encoded / "shard-00000.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00000\.tar: sample 00000-000007 is unreadable: No such file"):
        reader.read(np.array([7]))


def test_runs_are_ranges_of_one_shard_in_turn(encoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_reader(encoded)
    everything = np.arange(230)
    runs = reader.plan(everything)
    assert [(run.shard, len(run.ids)) for run in runs] == [(0, 50), (1, 50), (2, 50), (3, 50), (4, 30)]
    np.testing.assert_array_equal(np.concatenate([run.ids for run in runs]), everything)
    stride = int(np.diff(reader.index.samples["offset"][:2])[0])
    monkeypatch.setattr("diffussm.data.reader.RANGE_BYTES", 20 * stride)
    parts = [len(run.ids) for run in reader.plan(everything)]
    assert parts == [16, 17, 17] * 4 + [15, 15]  # equal parts, none longer
    monkeypatch.setattr("diffussm.data.reader.GAP_BYTES", 3 * stride)
    assert [run.ids.tolist() for run in reader.plan(np.array([0, 3, 9, 11]))] == [[0, 3], [9, 11]]
    assert reader.plan(np.array([], np.int64)) == []


def test_a_run_is_read_as_one_range_and_put_where_it_belongs(encoded: Path) -> None:
    reads = []

    class Counted(LocalStore):
        def read(self, name: str, *arguments: object) -> bytes:
            reads.append(name)
            return super().read(name, *arguments)

    store = open_store(encoded)
    index = Index.load(store)
    reader = SampleReader(Counted(encoded), index)
    for ids in (np.arange(50, 100), np.array([51, 53, 58, 70]), np.array([99])):  # evenly spaced, not, alone
        [run] = reader.plan(ids)
        moments = np.zeros((200, 4, 4, 4), np.uint8)
        places = np.random.default_rng(0).permutation(200)[: len(ids)]
        reader.read_run(run, moments, places)
        np.testing.assert_array_equal(moments[places], SampleReader(store, index).read(ids)[0])
        assert not np.delete(moments, places, axis=0).any()
    assert reads == ["shard-00001.tar"] * 3


def test_what_arrives_altered_or_short_is_read_again(encoded: Path) -> None:
    damages = ["flip", "cut"]

    class Noisy(LocalStore):
        def read(self, name: str, *arguments: object) -> bytes:
            data = bytearray(super().read(name, *arguments))
            if damages:
                if damages.pop() == "flip":
                    data[3] ^= 1
                else:
                    del data[-1:]
            return bytes(data)

    store = open_store(encoded)
    index = Index.load(store)
    moments, _ = SampleReader(Noisy(encoded), index).read(np.arange(50))
    np.testing.assert_array_equal(moments, SampleReader(store, index).read(np.arange(50))[0])
    damages[:] = ["flip"] * 3
    with pytest.raises(UserError, match=r"shard-00000\.tar: sample 00000-000000 is unreadable: its bytes have changed"):
        SampleReader(Noisy(encoded), index).read(np.arange(50))
