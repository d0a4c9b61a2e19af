"""webdataset's tars in a bucket: as a source of images, and our shards through its own reader."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data import compat
from diffussm.data.encode import encode
from diffussm.data.index import Index
from diffussm.data.reader import SampleReader
from diffussm.data.s3 import S3Store
from diffussm.data.sources import open_source
from diffussm.errors import UserError

pytestmark = pytest.mark.s3


@pytest.fixture
def images(store: S3Store) -> str:
    """The URL of three tars of 20 images each, as webdataset writes them."""
    for number in range(3):
        file = io.BytesIO()
        with webdataset.TarWriter(file) as tar:
            for i in range(20):
                image = Image.new("RGB", (16, 16), (10 * i, 80 * number, 0))
                tar.write({"__key__": f"{number}/{i:03d}", "png": image, "cls": i % 4})
        store.put(f"images/in-{number}.tar", file.getvalue())
    return f"{store}/images"


def test_tars_in_a_bucket_are_encoded_into_another_place(images: str, store: S3Store) -> None:
    latents = S3Store("tests", f"{store}/latents".split("/", 3)[3])
    index = encode(
        open_source("webdataset", f"{images}/in-{{0..2}}.tar", size=16, classes=4), PixelCodec(16, 16, 3, 16), latents
    )
    assert [shard.count for shard in index.shards] == [20] * 3
    moments, labels = SampleReader(latents, index).read(np.arange(60))
    assert labels.tolist() == [i % 4 for i in range(20)] * 3
    assert moments[:, 0, 0, 0].tolist() == [10 * i for i in range(20)] * 3  # red
    assert moments[:, 4, 0, 0].tolist() == [0] * 20 + [80] * 20 + [160] * 20  # green


def test_a_tar_that_is_cut_in_the_bucket_is_an_error(images: str, store: S3Store) -> None:
    content = bytes(store.read("images/in-1.tar"))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        end = tar.getmembers()[10].offset
    store.put("images/in-1.tar", content[:end])
    source = open_source("webdataset", images, size=16, classes=4)
    with pytest.raises(UserError, match=r"images/in-1\.tar is damaged after byte \d+: it does not end as a tar does"):
        encode(source, PixelCodec(16, 16, 3, 16), S3Store("tests", f"{store}/latents".split("/", 3)[3]))


def test_stock_webdataset_reads_our_shards_and_notices_what_is_cut(images: str, store: S3Store) -> None:
    latents = S3Store("tests", f"{store}/latents".split("/", 3)[3])
    encode(open_source("webdataset", images, size=16, classes=4), PixelCodec(16, 16, 3, 16), latents)
    compat.register()
    urls = compat.shard_urls(str(latents))
    read = webdataset.WebDataset(urls, shardshuffle=False).map(compat.decode)
    moments, labels = SampleReader(latents, Index.load(latents)).read(np.arange(60))
    samples = list(read)
    np.testing.assert_array_equal([sample[0] for sample in samples], moments)
    assert [sample[1] for sample in samples] == labels.tolist()
    content = bytes(latents.read("shard-00002.tar"))
    latents.put("shard-00002.tar", content[: len(content) // 2])
    with pytest.raises(UserError, match=r"shard-00002\.tar"):
        list(read)
