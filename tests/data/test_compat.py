from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from diffussm.data import compat
from diffussm.data.index import Index
from diffussm.data.reader import SampleReader
from diffussm.data.store import LocalStore, open_store
from diffussm.errors import UserError

pytestmark = pytest.mark.unit

URL = "s3://bucket/train"


@pytest.fixture
def urls(encoded: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A folder in place of the bucket; tests/s3 reads a real one."""
    monkeypatch.setattr(compat, "open_store", lambda url: {URL: LocalStore(encoded)}[url])
    monkeypatch.delitem(compat.gopen_schemes, "s3", raising=False)
    compat._load_index.cache_clear()
    compat.register()
    yield compat.shard_urls(URL + "/")
    compat._load_index.cache_clear()


def read(urls: list[str]) -> list[tuple[np.ndarray, int]]:
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).map(compat.decode))


def test_stock_webdataset_reads_what_the_reader_reads(urls: list[str], encoded: Path) -> None:
    assert urls == [f"{URL}/shard-{i:05d}.tar" for i in range(5)]
    store = open_store(encoded)
    moments, labels = SampleReader(store, Index.load(store)).read(np.arange(230))
    samples = read(urls)
    np.testing.assert_array_equal([sample[0] for sample in samples], moments)
    assert [sample[1] for sample in samples] == labels.tolist()


def cut_after_a_member(path: Path) -> None:
    with tarfile.open(path) as tar:
        end = tar.getmembers()[20].offset
    path.write_bytes(path.read_bytes()[:end])


def zero_a_header(path: Path) -> None:
    with tarfile.open(path) as tar:
        start = tar.getmembers()[20].offset
    content = bytearray(path.read_bytes())
    content[start : start + 512] = bytes(512)
    path.write_bytes(content)


def alter_a_sample(path: Path) -> None:
    with tarfile.open(path) as tar:
        start = tar.getmembers()[21].offset_data + 130
    content = bytearray(path.read_bytes())
    content[start] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "left", "line"),
    [
        (cut_after_a_member, 10, r"shard-00001\.tar has \d+ bytes, the index says \d+"),
        (zero_a_header, 10, r"shard-00001\.tar has changed since it was encoded"),
        (alter_a_sample, 50, r"shard-00001\.tar has changed since it was encoded"),
    ],
)
def test_what_webdataset_alone_does_not_notice_raises(
    urls: list[str], encoded: Path, damage: object, left: int, line: str
) -> None:
    damage(encoded / "shard-00001.tar")
    assert len(read([str(encoded / "shard-00001.tar")])) == left  # no exception
    assert len(read([urls[0]])) == 50
    with pytest.raises(UserError, match=line):
        read(urls)


def test_a_missing_shard_and_a_stranger(urls: list[str], encoded: Path) -> None:
    (encoded / "shard-00004.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00004\.tar is missing"):
        read(urls)
    with pytest.raises(UserError, match=r"other\.tar is not a shard of the data set there"):
        read([f"{URL}/other.tar"])
    with pytest.raises(ValueError, match="read only"):
        compat.open_shard(urls[0], "wb")
