from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.index import Index
from diffussm.data.reader import SampleReader
from diffussm.data.sources import ArrayImages
from diffussm.data.store import open_store
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
