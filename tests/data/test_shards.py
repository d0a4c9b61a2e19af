from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.index import Index
from diffussm.data.reader import SampleReader
from diffussm.data.shards import ShardBuilder, npy_header
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store

pytestmark = pytest.mark.unit


def samples(dtype: str, shape: tuple[int, ...]) -> list[tuple[np.ndarray, int]]:
    random = np.random.default_rng(0)
    return [(random.integers(0, 200, shape).astype(dtype), i * 11 % 1000) for i in range(40)]


@pytest.mark.parametrize(("dtype", "shape"), [("uint8", (4, 4, 4)), ("float16", (8, 3, 3)), ("float32", (8, 4, 4))])
def test_bytes_are_those_of_a_ustar_tar_of_saved_arrays(dtype: str, shape: tuple[int, ...]) -> None:
    builder, expected = ShardBuilder(7), io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for place, (moments, label) in enumerate(samples(dtype, shape)):
            builder.add(moments, label)
            saved = io.BytesIO()
            np.save(saved, moments)
            for suffix, content in (("cls", str(label).encode()), ("latent.npy", saved.getvalue())):
                info = tarfile.TarInfo(f"00007-{place:06d}.{suffix}")
                info.size, info.mode = len(content), 0o644
                tar.addfile(info, io.BytesIO(content))
    content, rows = builder.finish()
    assert content == expected.getvalue()

    expected.seek(0)
    with tarfile.open(fileobj=expected) as tar:
        members = [member for member in tar if member.name.endswith(".npy")]
    for row, member, (moments, label) in zip(rows, members, samples(dtype, shape), strict=True):
        assert row["offset"] == member.offset_data + len(npy_header(shape, np.dtype(dtype)))
        assert row["length"] == moments.nbytes and row["label"] == label
        assert row["crc32"] == zlib.crc32(moments.tobytes())


def test_headers_on_disk_are_plain_ustar(encoded: Path) -> None:
    content = (encoded / "shard-00000.tar").read_bytes()
    position, kinds = 0, set()
    while content[position : position + 512].strip(b"\0"):
        header = content[position : position + 512]
        kinds.add((header[257:265], header[156:157]))  # magic and version, type of the member
        position += 512 + -(-int(header[124:135], 8) // 512) * 512
    assert kinds == {(b"ustar\x0000", b"0")}  # no 'x' or 'g': PAX


def test_what_ustar_cannot_hold_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffussm.data.shards.sample_key", lambda shard, place: "k" * 200)
    with pytest.raises(ValueError, match="too long"):  # PAX would have taken it
        ShardBuilder(0).add(*samples("uint8", (4, 4, 4))[0])


def test_stock_webdataset_reads_every_sample(encoded: Path, images: ArrayImages, codec: PixelCodec) -> None:
    index = Index.load(open_store(encoded))
    urls = [str(encoded / shard.name) for shard in index.shards]
    read = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False).decode()}
    reader, ids = SampleReader(open_store(encoded), index), np.arange(len(images))
    assert sorted(read) == reader.keys(ids)

    moments, labels = reader.read(ids)
    for number, key in enumerate(reader.keys(ids)):
        sample = read[key]
        np.testing.assert_array_equal(sample["latent.npy"], moments[number])
        assert sample["latent.npy"].dtype == np.uint8 and sample["cls"] == labels[number]
    stored = sorted(sample["latent.npy"].tobytes() for sample in read.values())
    assert stored == sorted(latent.tobytes() for latent in codec.encode(images.images))
