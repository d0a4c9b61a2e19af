"""Files of a data set's statistics, in the layout of ADM's reference files: what samples are compared with.

    mu, sigma, mu_s, sigma_s    mean and covariance of the pool and the spatial features of the whole data set
    arr_0                       up to 10,000 of its images, uint8 [n, H, W, 3]: for precision and recall

Those that are written here hold three arrays more, which other readers pass over: ``features``, the pool features of
``arr_0`` [n, D], the slow part of precision and recall; ``extractor``, whose features they are; ``count``, how many
images the statistics are of.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffussm.errors import UserError
from diffussm.evaluation.extractors import EXTRACTORS
from diffussm.evaluation.features import Extractor
from diffussm.evaluation.frechet import Gaussian
from diffussm.evaluation.images import ImageSet, NpzImages
from diffussm.evaluation.inception import Inception2015
from diffussm.evaluation.npz import is_npz, npz_keys, read_npz
from diffussm.evaluation.summary import Measured
from diffussm.files import atomic_path, write_array

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class Reference:
    """What scoring needs of the real images.

    Attributes:
        pool, spatial: of their features.
        features: pool features [n, D] of up to 10,000 images, for precision and recall; None: there are none.
        count: images that the statistics are of; None: a file does not say.
    """

    pool: Gaussian
    spatial: Gaussian
    features: Tensor | None
    count: int | None

    @classmethod
    def of(cls, measured: Measured) -> Reference:
        """Of real images, measured.

        Raises:
            UserError: they are fewer than two.
        """
        summary = measured.summary
        return cls(summary.pool.gaussian(), summary.spatial.gaussian(), measured.features, summary.count)


def holds_statistics(path: str | Path) -> bool:
    """Whether it is a reference file. UserError if it looks like an .npz, and is none."""
    return is_npz(path) and "mu" in npz_keys(path)


def read_reference(path: str | Path, extractor: Extractor) -> tuple[Reference, ImageSet | None]:
    """A reference file, but for the features of its images where it holds none: those images are returned beside it.

    Raises:
        UserError: it is damaged, or its statistics are of another extractor.
    """
    keys = npz_keys(path)
    owner = str(read_npz(path, "extractor")) if "extractor" in keys else None
    mean, covariance, spatial_mean, spatial_covariance = (_read_moments(path, key) for key in STATISTICS)
    for mu, sigma in ((mean, covariance), (spatial_mean, spatial_covariance)):
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise UserError(
                f"{path}: a mean of {tuple(mu.shape)} does not go with a covariance of {tuple(sigma.shape)}"
            )
        if not torch.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * float(sigma.abs().max())):
            raise UserError(f"{path}: a covariance is not symmetric")
    _check_owner(path, owner, (len(mean), len(spatial_mean)), extractor)
    features = _read_moments(path, "features", torch.float32) if owner and "features" in keys else None
    count = read_npz(path, "count") if "count" in keys else None
    if count is not None and (count.shape != () or count.dtype.kind not in "iu"):
        raise UserError(f"{path}: count is not a number")
    if features is not None and (features.ndim != 2 or features.shape[1] != extractor.pool_size):
        raise UserError(f"{path}: features of shape {tuple(features.shape)} are not {extractor.name}'s")
    try:
        pool, spatial = Gaussian.of_moments(mean, covariance), Gaussian.of_moments(spatial_mean, spatial_covariance)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    images = NpzImages(path) if features is None and "arr_0" in keys else None
    return Reference(pool, spatial, features, None if count is None else int(count)), images


def write_reference(
    path: str | Path, measured: Measured, images: ImageSet, kept: np.ndarray, extractor: Extractor
) -> None:
    """Write a reference file of ``images``.

    Args:
        kept: the numbers of those whose features ``measured`` holds; they become ``arr_0``.

    Raises:
        UserError: they are fewer than two.
    """
    reference = Reference.of(measured)
    arrays = {
        "mu": reference.pool.mean,
        "sigma": reference.pool.covariance,
        "mu_s": reference.spatial.mean,
        "sigma_s": reference.spatial.covariance,
        "features": measured.features,
        "count": np.array(reference.count),
        "extractor": np.array(extractor.name),
    }
    blocks = (images.read(kept[start : start + IMAGES_AT_ONCE]) for start in range(0, len(kept), IMAGES_AT_ONCE))
    shape = len(kept), *images.read([0]).shape[1:]
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, values in arrays.items():
            values = np.asarray(values)
            write_array(archive, name, values.shape, values.dtype, [values])
        write_array(archive, "arr_0", shape, np.dtype(np.uint8), blocks)


def _read_moments(path: str | Path, key: str, dtype: torch.dtype = torch.float64) -> Tensor:
    values = read_npz(path, key)
    if values.dtype.kind != "f" or not np.isfinite(values).all():
        raise UserError(f"{path}: {key} is not an array of finite floating-point numbers")
    return torch.from_numpy(values).to(dtype)


def _check_owner(path: str | Path, owner: str | None, sizes: tuple[int, int], extractor: Extractor) -> None:
    if sizes == (extractor.pool_size, extractor.spatial_size) and owner in (None, extractor.name):
        return
    theirs = "they are of another one: give a data set or an .npz of images instead"
    if owner in (None, Inception2015.name) and sizes == (Inception2015.pool_size, Inception2015.spatial_size):
        theirs = f"they are of the 2015 Inception graph: add --extractor {Inception2015.name}"  # published files are
    elif owner in EXTRACTORS:
        theirs = f"they are of {owner}: add --extractor {owner}"
    elif owner:
        theirs = f"they are of {owner!r}, which this version does not have"
    raise UserError(
        f"{path} holds statistics of {sizes[0]} and {sizes[1]} features, but {extractor.name} has "
        f"{extractor.pool_size} and {extractor.spatial_size}: {theirs}"
    )
