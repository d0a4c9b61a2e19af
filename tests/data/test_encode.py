from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data import prepare as prepare_module
from diffussm.data.encode import encode
from diffussm.data.index import Index
from diffussm.data.prepare import prepare
from diffussm.data.sources import ArrayImages
from diffussm.data.store import open_store
from diffussm.errors import UserError

pytestmark = pytest.mark.unit

fork = multiprocessing.get_context("fork")


@dataclass(frozen=True, eq=False)
class SlowImages(ArrayImages):
    """Takes its time, and for ever from the batch numbered ``stall`` on, so that a test can interrupt it."""

    stall: int
    batches: Iterator[int] = field(default_factory=itertools.count)

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        time.sleep(0.01 if next(self.batches) < self.stall else 600)
        return super().read(ids)


def contents(folder: Path) -> dict[str, bytes]:
    store = open_store(folder)
    return {name: store.read(name) for name in store.list()}


def encode_in_shards_of_ten(images: ArrayImages, codec: PixelCodec, folder: Path) -> None:
    encode(images, codec, open_store(folder), samples_per_shard=10)


def test_the_same_arguments_give_the_same_bytes(images: ArrayImages, codec: PixelCodec, tmp_path: Path) -> None:
    for name in ("a", "b"):
        encode(images, codec, open_store(tmp_path / name), samples_per_shard=70, seed=1)
    encode(images, codec, open_store(tmp_path / "c"), samples_per_shard=70, seed=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "c").keys()
    assert contents(tmp_path / "a")["shard-00000.tar"] != contents(tmp_path / "c")["shard-00000.tar"]


def test_shards_mix_the_classes_of_a_sorted_source(encoded: Path) -> None:
    index = Index.load(open_store(encoded))
    for labels in np.split(index.samples["label"], np.cumsum(index.shard_counts)[:-1]):
        assert np.bincount(labels, minlength=5).min() >= 2


def test_killed_and_run_again_it_gives_the_bytes_of_an_unbroken_run(
    images: ArrayImages, codec: PixelCodec, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    encode_in_shards_of_ten(images, codec, whole)
    slow = SlowImages(images.name, images.class_names, images.images, images.labels, stall=20)
    for shards in (1, 4, 9):
        process = fork.Process(target=encode_in_shards_of_ten, args=(slow, codec, broken))
        process.start()
        while len(open_store(broken).list("shard-")) < shards:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert shards <= len(open_store(broken).list("shard-")) < 23
        with pytest.raises(UserError, match="the encoding is not finished"):
            Index.load(open_store(broken))
    encode_in_shards_of_ten(images, codec, broken)
    assert contents(broken) == contents(whole)


def test_two_processes_at_once_write_one_data_set(images: ArrayImages, codec: PixelCodec, tmp_path: Path) -> None:
    slow = SlowImages(images.name, images.class_names, images.images, images.labels, stall=1000)
    processes = [fork.Process(target=encode_in_shards_of_ten, args=(slow, codec, tmp_path / "both")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    encode_in_shards_of_ten(images, codec, tmp_path / "one")
    assert contents(tmp_path / "both") == contents(tmp_path / "one")


def test_what_is_there_is_left_alone(
    images: ArrayImages, codec: PixelCodec, encoded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in encoded.iterdir()}
    index = encode(images, codec, open_store(encoded), samples_per_shard=50, seed=3)
    assert index.hash == Index.load(open_store(encoded)).hash
    assert {path: path.stat().st_mtime_ns for path in encoded.iterdir()} == before
    assert "already encoded, nothing to do" in capsys.readouterr().err


def test_another_encoding_is_never_overwritten(images: ArrayImages, codec: PixelCodec, encoded: Path) -> None:
    store = open_store(encoded)
    with pytest.raises(UserError, match=r"another encoding: its name is noise/train, not noise/test"):
        encode(replace(images, name="noise/test"), codec, store, 50, 3)
    with pytest.raises(UserError, match=r"another encoding: its sha256 is"):
        encode(replace(images, images=images.images[::-1]), codec, store, 50, 3)
    with pytest.raises(UserError, match=r"another encoding: its codec is"):
        encode(images, PixelCodec(6, 8, 1, size=10), store, 50, 3)
    with pytest.raises(UserError, match=r"another encoding: its seed is 3, not 4"):
        encode(images, codec, store, 50, 4)
    with pytest.raises(UserError, match=r"another encoding: its samples_per_shard is 50, not 60"):
        encode(images, codec, store, 60, 3)


def test_shards_of_an_unfinished_other_encoding_are_not_mixed_in(
    images: ArrayImages, codec: PixelCodec, encoded: Path
) -> None:
    (encoded / "index.json").unlink()
    with pytest.raises(UserError, match=r"shard-00003\.tar, which is not of this encoding"):
        encode(images, codec, open_store(encoded), samples_per_shard=100)


def test_prepare(images: ArrayImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_folders = []

    def noise(split: str, raw: Path) -> ArrayImages:
        raw_folders.append(raw)
        return replace(images, name=f"noise/{split}")

    monkeypatch.setattr(prepare_module, "SOURCES", {"noise": noise})
    prepare("noise", tmp_path / "noise32")
    assert raw_folders == [tmp_path / "noise-raw"] * 2
    for split in ("train", "test"):
        index = Index.load(open_store(tmp_path / "noise32" / split))
        assert index.source["name"] == f"noise/{split}" and index.latent_shape == (4, 16, 16)
    prepare("noise", str(tmp_path / "noise32"))
    assert len(raw_folders) == 2  # not even looked for

    with pytest.raises(UserError, match="unknown data set 'lsun'"):
        prepare("lsun", tmp_path / "lsun")
    (tmp_path / "mixed").mkdir()
    shutil.copytree(tmp_path / "noise32" / "test", tmp_path / "mixed" / "train")
    with pytest.raises(UserError, match="holds noise/test, not noise/train"):
        prepare("noise", tmp_path / "mixed")
