"""Fashion-MNIST, from Debian's package or the site that publishes it."""

from __future__ import annotations

import hashlib
import http.client
import math
import os
import shutil
import subprocess
import sys
import urllib.request
import zlib
from pathlib import Path

import numpy as np

from diffussm.data.sources.base import ArrayImages
from diffussm.errors import UserError
from diffussm.files import write_atomically

FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
# Images and labels of each split, with the sha256 of what is inside the .gz: Debian packs the same files anew.
FASHION_MNIST_FILES = {
    "train": {
        "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    },
    "test": {
        "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
MAX_UNPACKED_BYTES = 1 << 26
INSTALL_SECONDS, DOWNLOAD_SECONDS = 300, 30


def load_fashion_mnist(split: str, raw: Path) -> ArrayImages:
    """Fashion-MNIST: 60,000 (``train``) or 10,000 (``test``) grey images [28, 28, 1] of 10 classes.

    Its files come from Debian's package, else from the folder ``raw``; where neither has them the package is
    installed (as root), or the files are downloaded to ``raw``.

    Raises:
        UserError: the files can be had nowhere, or are not the published ones.
    """
    files = FASHION_MNIST_FILES[split]
    folder = _fashion_mnist_folder(files, raw)
    images, labels = (parse_idx(_read_checked(folder / name, sha256)) for name, sha256 in files.items())
    return ArrayImages(f"fashion-mnist/{split}", FASHION_MNIST_CLASSES, images[..., None], labels.astype(np.int64))


SPLITS = ("train", "test")


def parse_idx(content: bytes) -> np.ndarray:
    """The uint8 array in an IDX file's content.

    Raises:
        UserError: it is not one, or its size is not what its header says.
    """
    magic, dimensions = content[:3], content[3:4]
    if magic != b"\x00\x00\x08" or not dimensions or len(content) < 4 + 4 * dimensions[0]:
        raise UserError("not an IDX file of bytes: it does not begin with the magic number 0x0000080N")
    shape = np.frombuffer(content, ">u4", dimensions[0], 4).tolist()
    start = 4 + 4 * dimensions[0]
    if math.prod(shape) != len(content) - start:
        raise UserError(f"an IDX file of shape {shape} has {len(content) - start} bytes of data: it is torn")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _fashion_mnist_folder(files: dict[str, str], raw: Path) -> Path:
    """A folder that has all of ``files`` (name: sha256), got there if need be."""
    for folder in (DEBIAN_FOLDER, raw):
        if all((folder / name).is_file() for name in files):
            return folder
    if _install_package() and all((DEBIAN_FOLDER / name).is_file() for name in files):
        return DEBIAN_FOLDER
    for name, sha256 in files.items():
        _download(name, sha256, raw / name)
    return raw


def _install_package() -> bool:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return False
    print(f"Fashion-MNIST is not here: installing Debian's package {DEBIAN_PACKAGE} ...", file=sys.stderr)
    command = ["apt-get", "install", "--yes", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=60", DEBIAN_PACKAGE]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=INSTALL_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _download(name: str, sha256: str, path: Path) -> None:
    """Fetch one file of Fashion-MNIST to ``path``, unless it is there."""
    if path.is_file():
        return
    url = FASHION_MNIST_URL + name
    print(f"Fashion-MNIST is not here: downloading {url} ...", file=sys.stderr)
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as response:
            packed = response.read(MAX_UNPACKED_BYTES)
        _unpack(packed, sha256)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(
            f"Fashion-MNIST cannot be had here ({error}): put {name} and its three sisters (train and t10k, images and "
            f"labels) from {FASHION_MNIST_URL} in {path.parent}, or install the Debian package {DEBIAN_PACKAGE}"
        ) from error
    write_atomically(path, packed)


def _read_checked(path: Path, sha256: str) -> bytes:
    try:
        return _unpack(path.read_bytes(), sha256)
    except ValueError as error:
        raise UserError(f"{path}: {error}: delete it or replace it by the one of {FASHION_MNIST_URL}") from error


def _unpack(packed: bytes, sha256: str) -> bytes:
    """What is inside a .gz; ValueError unless that has the hash ``sha256``."""
    try:
        content = zlib.decompressobj(wbits=31).decompress(packed, MAX_UNPACKED_BYTES)  # 31: with gzip's header
    except zlib.error:
        content = b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("this is not the published file")
    return content
