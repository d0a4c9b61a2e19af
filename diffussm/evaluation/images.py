"""Sets of images to score, and what they are compared with: sample files, reference files, encoded data sets."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffussm.autoencoders.codec import codec_from_spec
from diffussm.data.index import Index
from diffussm.data.order import random_permutation
from diffussm.data.reader import SampleReader
from diffussm.data.store import open_store
from diffussm.errors import UserError

SUBSET_SEED = 0  # fixed: the same subset at every call, so that figures repeat
DECODE_BATCH = 256
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
DAMAGE = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)  # what NumPy raises on it


@dataclass(frozen=True)
class ReferenceStatistics:
    """Moments of a whole data set's features, in the layout of ADM's reference files."""

    path: str
    mean: Tensor  # [D]
    covariance: Tensor  # [D, D]
    spatial_mean: Tensor  # [S]
    spatial_covariance: Tensor  # [S, S]
    images: np.ndarray | None  # [N, H, W, C] of the data set, for precision and recall


def read_images(path: str | Path, limit: int | None = None) -> np.ndarray:
    """uint8 images [N, H, W, 1 or 3] of an ``.npz`` with ``arr_0`` (ADM's layout) or of an encoded data set.

    Args:
        limit: of more images, a random subset of this many; the same one at every call.

    Raises:
        UserError: it cannot be read, or does not hold such images.
    """
    if _is_npz(path):
        images = _check_images(path, _read_npz(path, "arr_0"))
        return images if limit is None else images[random_subset(len(images), limit)]
    return _decode_images(path, limit)


def read_reference(path: str | Path, limit: int) -> np.ndarray | ReferenceStatistics:
    """Images as of :func:`read_images`, or, of an ``.npz`` with ``mu``, the statistics of a data set's features.

    Raises:
        UserError: it cannot be read, or holds neither.
    """
    if not (_is_npz(path) and "mu" in _npz_keys(path)):
        return read_images(path, limit)
    mean, covariance, spatial_mean, spatial_covariance = (_read_moments(path, key) for key in STATISTICS)
    for mu, sigma in ((mean, covariance), (spatial_mean, spatial_covariance)):
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise UserError(
                f"{path}: a mean of {tuple(mu.shape)} does not go with a covariance of {tuple(sigma.shape)}"
            )
    images = read_images(path, limit) if "arr_0" in _npz_keys(path) else None
    return ReferenceStatistics(str(path), mean, covariance, spatial_mean, spatial_covariance, images)


def random_subset(count: int, limit: int) -> np.ndarray:
    """``limit`` of the numbers below ``count`` at random, the same ones at every call; all in order if no more."""
    if count <= limit:
        return np.arange(count)
    return random_permutation(np.random.Philox(SUBSET_SEED), count)[:limit]


def _decode_images(path: str | Path, limit: int | None) -> np.ndarray:
    store = open_store(path)
    index = Index.load(store)
    if index.posterior:
        raise UserError(
            f"{path} holds latents of a lossy autoencoder, whose decoded images are not the real ones: "
            f"give an .npz of the images, or a reference file"
        )
    codec, reader = codec_from_spec(index.codec), SampleReader(store, index)
    ids = random_subset(len(index), len(index) if limit is None else limit)
    batches = []
    for start in range(0, len(ids), DECODE_BATCH):
        latents, _ = reader.read(ids[start : start + DECODE_BATCH])
        latents = torch.from_numpy(latents.astype(np.float32))
        batches.append(codec.decode((latents - index.shift) * index.scale))
    return _check_images(path, np.concatenate(batches))


def _check_images(path: str | Path, images: np.ndarray) -> np.ndarray:
    if images.dtype != np.uint8:
        raise UserError(f"{path}: the images are {images.dtype}, not uint8 from 0 to 255")
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UserError(f"{path}: the images are of shape {images.shape}, not [N, height, width, 1 or 3]")
    if images.max() <= 1:
        raise UserError(f"{path}: the images hold nothing but 0 and 1: scale them to 0..255 before making them uint8")
    return images


def _read_moments(path: str | Path, key: str) -> Tensor:
    values = _read_npz(path, key)
    if values.dtype.kind != "f" or not np.isfinite(values).all():
        raise UserError(f"{path}: {key} is not an array of finite floating-point numbers")
    return torch.from_numpy(values.astype(np.float64))


def _is_npz(path: str | Path) -> bool:
    return Path(path).suffix == ".npz" or Path(path).is_file()


def _npz_keys(path: str | Path) -> list[str]:
    with _open_npz(path) as file:
        return file.files


def _read_npz(path: str | Path, key: str) -> np.ndarray:
    with _open_npz(path) as file:
        if key not in file.files:
            raise UserError(f"{path} has no {key}, only {', '.join(file.files) or 'nothing'}")
        try:
            return file[key]
        except (*DAMAGE, MemoryError):
            raise UserError(f"{path}: {key} is damaged, pickled, or larger than memory: write it again") from None


def _open_npz(path: str | Path) -> np.lib.npyio.NpzFile:
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    try:
        file = np.load(path, allow_pickle=False)
    except DAMAGE:
        file = None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise UserError(f"{path} is not an .npz file, or a damaged one: numpy.savez({str(path)!r}, images) writes one")
    return file
