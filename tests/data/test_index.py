from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffussm.autoencoders.codec import codec_from_spec
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.index import SAMPLE_DTYPE, Index
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.errors import UserError

pytestmark = pytest.mark.unit


def load(folder: Path) -> Index:
    return Index.load(open_store(folder))


def test_load(encoded: Path, images: ArrayImages, codec: PixelCodec) -> None:
    index = load(encoded)
    assert len(index) == 230 and index.shard_counts.tolist() == [50, 50, 50, 50, 30]
    assert index.moments_shape == index.latent_shape == (4, 4, 4) and index.dtype == np.uint8
    assert (index.scale, index.shift, index.posterior) == (codec.scale, codec.shift, False)
    assert codec_from_spec(index.codec) == codec
    assert index.class_names == images.class_names and index.source["name"] == "noise/train"
    assert index.hash == hashlib.sha256((encoded / "index.json").read_bytes()).hexdigest()
    for shard in index.shards:
        assert shard.sha256 == hashlib.sha256((encoded / shard.name).read_bytes()).hexdigest()
    assert SAMPLE_DTYPE.itemsize == 20


def test_no_index_means_unfinished(encoded: Path) -> None:
    (encoded / "index.json").unlink()
    with pytest.raises(UserError, match=r"no index\.json in .*: the encoding is not finished or the path is wrong"):
        load(encoded)


def test_a_missing_shard_is_named(encoded: Path) -> None:
    (encoded / "shard-00003.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00003\.tar is missing"):
        load(encoded)


def test_a_torn_shard_is_named(encoded: Path) -> None:
    shard = encoded / "shard-00001.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match=rf"shard-00001\.tar has {size - 512} bytes, the index says {size}"):
        load(encoded)


def change_entry(*keys: Any, to: Any) -> Callable[[dict], None]:
    def change(table: dict) -> None:
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_entry("format", to="diffussm-latents/2"), "is of format 'diffussm-latents/2'"),
        (change_entry("count", to=231), "counts 231 samples, its shards 230"),
        (change_entry("count", to=-230), "counts -230 samples"),
        (change_entry("count", to=1 << 60), "counts 1152921504606846976 samples"),
        (change_entry("count", to=True), "'count' is not a int"),
        (change_entry("shards", 0, "count", to=49), "counts 230 samples, its shards 229"),
        (change_entry("shards", 0, "name", to="../shard-00000.tar"), "not a shard's name"),
        (change_entry("shards", 0, "name", to="/etc/x.tar"), "not a shard's name"),
        (change_entry("shards", 0, "name", to="a/b.tar"), "not a shard's name"),
        (change_entry("shards", 0, "name", to="a..tar\n"), "not a shard's name"),
        (change_entry("shards", 0, "name", to="shard-00001.tar"), "names a shard twice"),
        (change_entry("shards", 0, "size", to=10**30), "bytes and 50 samples"),
        (change_entry("shards", 0, "size", to=4096), "lies outside its shard"),
        (change_entry("shards", 0, to="shard-00000.tar"), "'name' is not a str"),
        (change_entry("shards", 0, "etag", to=5), "'etag' is not a str"),
        (change_entry("shards", 0, "sha256", to="../../../../etc/passwd"), "has no sha256, but"),
        (change_entry("shards", to={}), "'shards' is not a list"),
        (change_entry("shards", to=[]), "counts 230 samples, its shards 0"),
        (change_entry("latent", "shape", to=[4, 4, 5]), "not all samples are of 80 bytes"),
        (change_entry("latent", "shape", to=[1 << 20, 1 << 20, 1 << 20]), "its samples are of"),
        (change_entry("latent", "shape", to=[4, 16]), "shape is"),
        (change_entry("latent", "posterior", to=True), "not all samples are of 128 bytes"),
        (change_entry("latent", "dtype", to="object"), "dtype is 'object'"),
        (change_entry("latent", "scale", to=0.0), "scale and shift"),
        (change_entry("latent", "shift", to=float("nan")), "scale and shift"),
        (change_entry("class_names", to=["only one"]), "a label names no class"),
        (change_entry("samples", "name", to="../samples.npy"), "table of samples is not"),
        (change_entry("samples", "sha256", to="0" * 64), "changed since it was written"),
    ],
)
def test_a_damaged_index_is_refused(encoded: Path, change: Callable[[dict], None], message: str) -> None:
    path = encoded / "index.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    with pytest.raises(UserError, match=message):
        load(encoded)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null", b"1" * 10_000])
def test_what_is_no_index_is_refused(encoded: Path, content: bytes) -> None:
    (encoded / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load(encoded)


def replace_samples(folder: Path, content: bytes) -> None:
    """Another table of samples, with the index made to agree."""
    (folder / "samples.npy").write_bytes(content)
    table = json.loads((folder / "index.json").read_text())
    table["samples"]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "index.json").write_text(json.dumps(table))


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("offset", 1 << 40, "outside its shard"),
        ("offset", (1 << 64) - 1, "outside its shard"),
        ("offset", 5000, "do not follow each other"),
        ("length", 1, "not all samples are of 64 bytes"),
        ("label", -1, "names no class"),
        ("label", 5, "names no class"),
    ],
)
def test_a_bad_row_is_refused(encoded: Path, column: str, value: int, message: str) -> None:
    samples = load(encoded).samples.copy()
    samples[column][137] = value
    replace_samples(encoded, saved(samples))
    with pytest.raises(UserError, match=message):
        load(encoded)


def test_other_tables_are_refused(encoded: Path) -> None:
    samples = load(encoded).samples
    (encoded / "samples.npy").write_bytes(saved(samples[:100]))
    with pytest.raises(UserError, match=r"samples\.npy is not of 230 samples"):
        load(encoded)
    replace_samples(encoded, saved(samples.view("V20")))
    with pytest.raises(UserError, match=r"samples\.npy holds"):
        load(encoded)
    replace_samples(encoded, b"PK" + saved(samples)[2:])
    with pytest.raises(UserError, match="damaged"):
        load(encoded)
    (encoded / "samples.npy").unlink()
    with pytest.raises(UserError, match="damaged"):
        load(encoded)
