from __future__ import annotations

import gzip
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from diffussm.data.sources import fashion_mnist as sources
from diffussm.data.sources.base import ArrayImages
from diffussm.data.sources.fashion_mnist import load_fashion_mnist, parse_idx
from diffussm.errors import UserError

pytestmark = pytest.mark.unit

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
LABELS = np.array([9, 0, 4], np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without Fashion-MNIST, and a folder that serves a tiny one as if it were the site."""
    site = tmp_path / "site"
    site.mkdir()
    files: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for name, content in ((f"{prefix}-images-idx3", idx(IMAGES)), (f"{prefix}-labels-idx1", idx(LABELS))):
            (site / f"{name}-ubyte.gz").write_bytes(gzip.compress(content))
            files[split][f"{name}-ubyte.gz"] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(sources, "FASHION_MNIST_FILES", files)
    monkeypatch.setattr(sources, "FASHION_MNIST_URL", f"file://{site}/")
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # who cannot install packages
    return site


def test_parse_idx() -> None:
    np.testing.assert_array_equal(parse_idx(idx(IMAGES)), IMAGES)
    np.testing.assert_array_equal(parse_idx(idx(LABELS)), LABELS)
    huge = struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1)
    for torn in (idx(IMAGES)[:-1], idx(IMAGES) + b"\0", huge):
        with pytest.raises(UserError, match="torn"):
            parse_idx(torn)
    for other in (b"", b"\0\0\x08", idx(IMAGES)[:12], b"\0\0\x0d\x01\0\0\0\0", b"PK\x03\x04" * 9):
        with pytest.raises(UserError, match="not an IDX file"):
            parse_idx(other)


@pytest.mark.parametrize("split", ["train", "test"])
def test_files_are_downloaded_once(published: Path, tmp_path: Path, split: str) -> None:
    raw = tmp_path / "raw"
    source = load_fashion_mnist(split, raw)
    assert source.name == f"fashion-mnist/{split}" and len(source) == 3 and len(source.class_names) == 10
    np.testing.assert_array_equal(source.images, IMAGES[..., None])
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [9, 0, 4]
    for path in published.iterdir():
        path.unlink()
    assert load_fashion_mnist(split, raw).fingerprint() == source.fingerprint()


def test_debians_files_come_first(published: Path, tmp_path: Path) -> None:
    published.rename(tmp_path / "debian")
    assert len(load_fashion_mnist("test", tmp_path / "raw")) == 3
    assert not (tmp_path / "raw").exists()


def test_root_installs_debians_package(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installer = tmp_path / "bin" / "apt-get"
    installer.parent.mkdir()
    wanted = '[ "$1" = install ] && for last; do :; done && [ "$last" = dataset-fashion-mnist ]'
    installer.write_text(f"#!/bin/sh\n{wanted} && mv {published} {tmp_path}/debian\n")
    installer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{installer.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert len(load_fashion_mnist("test", tmp_path / "raw")) == 3
    assert not (tmp_path / "raw").exists()


def test_altered_files_are_refused_and_never_kept(published: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for broken in (gzip.compress(idx(IMAGES[::-1])), b"<html>not found</html>", gzip.compress(idx(IMAGES))[:-30]):
        (published / "t10k-images-idx3-ubyte.gz").write_bytes(broken)
        with pytest.raises(UserError, match=r"cannot be had here \(this is not the published file\)"):
            load_fashion_mnist("test", raw)
        assert not raw.exists()
    published.rename(raw)
    with pytest.raises(UserError, match=r"raw/t10k-images-idx3-ubyte\.gz: this is not the published file"):
        load_fashion_mnist("test", raw)


def test_a_machine_that_cannot_have_them_is_told_what_to_do(published: Path, tmp_path: Path) -> None:
    for path in published.iterdir():
        path.unlink()
    with pytest.raises(UserError) as failure:
        load_fashion_mnist("train", tmp_path / "raw")
    message = str(failure.value)
    for part in ("train-images-idx3-ubyte.gz", str(tmp_path / "raw"), "dataset-fashion-mnist"):
        assert part in message
    assert "\n" not in message


def test_fingerprints_tell_sources_apart() -> None:
    def source(images: np.ndarray, labels: np.ndarray) -> str:
        return ArrayImages("x", ["a"], images, labels).fingerprint()

    labels = LABELS.astype(np.int64)
    same = source(IMAGES[..., None], labels)
    assert same == source(IMAGES.copy()[..., None], labels)
    assert len({same, source(IMAGES[::-1, ..., None], labels), source(IMAGES[..., None], labels[::-1])}) == 3
    assert same != source(IMAGES.reshape(3, 14, 56, 1), labels)


def test_fashion_mnist_itself(tmp_path: Path) -> None:
    if not sources.DEBIAN_FOLDER.is_dir():
        pytest.skip(f"Debian's {sources.DEBIAN_PACKAGE} is not installed")
    source = load_fashion_mnist("test", tmp_path / "raw")
    assert source.images.shape == (10_000, 28, 28, 1)
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert source.images.mean() == pytest.approx(73.1466, abs=0.001)
