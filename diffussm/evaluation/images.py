"""Sets of images to score or to compare with: .npz files of ADM's layout, folders of image files, encoded data sets.

Each is read by numbers, so that any number of processes can share it and none holds all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from PIL import Image

from diffussm.autoencoders.codec import codec_from_spec
from diffussm.data.index import INDEX_NAME, Index
from diffussm.data.order import random_permutation
from diffussm.data.reader import SampleReader
from diffussm.data.sources.base import BadImage
from diffussm.data.sources.folder import image_files
from diffussm.data.sources.resize import SUFFIXES, read_image
from diffussm.data.store import open_store
from diffussm.errors import UserError
from diffussm.evaluation.npz import DAMAGE, check_npz, is_npz, map_array

LARGEST_COPY = 1 << 30  # bytes, that each of several processes may unpack
SUBSET_SEED = 0  # fixed: the same subset at every call, so that figures repeat


class ImageSet(Protocol):
    """RGB images that are read by their numbers.

    Attributes:
        name: its path.
        identity: differs from that of a set of other images.
    """

    name: str
    identity: str

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [len(numbers), H, W, 3]. May be called by several threads at once.

        Raises:
            UserError: one of them is damaged, or unlike the others.
        """
        ...

    def check(self) -> None:
        """Find damage that reading would not show. UserError where there is some."""
        ...


def open_images(path: str | Path, limit: int | None = None, size: int | None = None, *, alone: bool = True) -> ImageSet:
    """The images of an ``.npz`` (``arr_0``, as ADM has it), of a folder of image files, or of an encoded data set.

    Args:
        limit: of more images, a random subset of this many; the same one at every call.
        size: bring the images of a folder to this side as `tools/encode_latents.py` does, as ADM did: crop the centre,
            make colours RGB. Without it they are taken as they are, and must be RGB and all of one size. Other sets
            are taken as they are in any case.
        alone: no other process reads it: what is compressed can be unpacked into memory, whatever its size.

    Raises:
        UserError: it cannot be read, or does not hold such images.
    """
    if is_npz(path):
        images: ImageSet = NpzImages(path, alone)
    elif "://" not in str(path) and Path(path).is_dir() and not (Path(path) / INDEX_NAME).exists():
        images = FolderImages(path, size)
    else:
        images = EncodedImages(path)
    return images if limit is None or len(images) <= limit else Subset(images, random_subset(len(images), limit))


def random_subset(count: int, limit: int) -> np.ndarray:
    """``limit`` of the numbers below ``count`` at random, the same ones at every call; all in order if no more."""
    if count <= limit:
        return np.arange(count)
    return random_permutation(np.random.Philox(SUBSET_SEED), count)[:limit]


class Subset:
    """Some of the images of a set, ``whole``, in the order of ``numbers``."""

    def __init__(self, images: ImageSet, numbers: np.ndarray) -> None:
        self.name, self.identity = images.name, f"{images.identity} {_digest(numbers.tobytes())}"
        self.check = images.check
        self.whole, self._numbers = images, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        return self.whole.read(self._numbers[np.asarray(numbers)])


class NpzImages:
    """``arr_0`` of an .npz: uint8 [N, H, W, 3]. Only what is read of it is in memory, unless it is compressed."""

    def __init__(self, path: str | Path, alone: bool = True) -> None:
        self.name = str(path)
        state = Path(path).stat() if Path(path).is_file() else None
        self.identity = f"{Path(path).resolve()} {state and (state.st_size, state.st_mtime_ns)}"
        self._images = map_array(path, "arr_0", LARGEST_COPY if not alone else None)
        shape, dtype = self._images.shape, self._images.dtype
        if dtype != np.uint8:
            raise UserError(f"{path}: the images are {dtype}, not uint8 from 0 to 255")
        if len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
            raise UserError(f"{path}: the images are grey, {shape}: where that is meant, repeat them to 3 channels")
        if len(shape) == 4 and shape[3] == 4:
            raise UserError(f"{path}: the images have 4 channels, {shape}: drop the transparency (alpha)")
        if len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise UserError(f"{path}: the images are of shape {shape}, not [N, height, width, 3]")

    def __len__(self) -> int:
        return len(self._images)

    def read(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.array(self._images[np.asarray(numbers)])

    def check(self) -> None:
        check_npz(self.name, "arr_0")


class FolderImages:
    """The image files of a folder and its sub-folders, in the order of their names."""

    def __init__(self, path: str | Path, size: int | None) -> None:
        self.name, self._size, self._root = str(path), size, Path(path)
        files = sorted(image_files(self._root))
        if not files:
            raise UserError(
                f"{path} holds neither images ({', '.join(SUFFIXES)}) nor an encoded data set ({INDEX_NAME})"
            )
        self._files = [self._root / name for name, _ in files]
        versions = [(name, bytes, (self._root / name).stat().st_mtime_ns) for name, bytes in files]
        self.identity = f"{self._root.resolve()} {size} {_digest(repr(versions).encode())}"
        self._shape = self._load(self._files[0]).shape

    def __len__(self) -> int:
        return len(self._files)

    def read(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.stack([self._load_alike(self._files[number]) for number in numbers])

    def check(self) -> None:
        """Reading shows it all."""

    def _load_alike(self, file: Path) -> np.ndarray:
        image = self._load(file)
        if image.shape != self._shape:
            sizes = (f"{shape[1]}×{shape[0]}" for shape in (image.shape, self._shape))
            raise UserError(f"{file} is {' and not '.join(sizes)} as {self._files[0].name}: --size N makes them alike")
        return image

    def _load(self, file: Path) -> np.ndarray:
        try:
            if self._size is not None:
                return read_image(file, self._size, "adm")
            with Image.open(file) as image:
                if any(";16" in str(tile) for tile in getattr(image, "tile", ())):
                    raise UserError(f"{file} has 16 bits a channel: convert it to 8, or let --size N do so")
                if image.mode == "RGB" and not image.has_transparency_data:
                    return np.asarray(image)
                kind = (
                    "transparent" if image.has_transparency_data else "grey" if image.mode[0] in "L1IF" else "coloured"
                )
            raise UserError(f"{file} is {kind} ({image.mode}), not RGB: convert it, or let --size N do so")
        except BadImage as problem:
            raise UserError(f"{file} cannot be decoded: {problem}") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{file} cannot be decoded: {' '.join(str(error).split())}") from None


class EncodedImages:
    """The decoded images of a data set that was encoded without loss."""

    def __init__(self, path: str | Path) -> None:
        store = open_store(path)
        index = Index.load(store)
        if index.posterior:
            raise UserError(
                f"{path} holds latents of a lossy autoencoder, whose decoded images are not the real ones: "
                f"give an .npz of the images, a folder of them, or a reference file"
            )
        self.name, self.identity = str(path), index.hash
        self._index, self._codec, self._reader = index, codec_from_spec(index.codec), SampleReader(store, index)

    def __len__(self) -> int:
        return len(self._index)

    def read(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        moments, _ = self._reader.read(np.asarray(numbers))
        latents = torch.from_numpy(moments.astype(np.float32))
        images = self._codec.decode((latents - self._index.shift) * self._index.scale)
        return images if images.shape[3] == 3 else images.repeat(3, axis=3)

    def check(self) -> None:
        """Reading shows it all."""


def read_stream(file: IO[bytes], name: str) -> Iterator[np.ndarray]:
    """The arrays uint8 [n, H, W, 3] that ``numpy.save`` has written one after another into a pipe.

    Raises:
        UserError: something else comes, or the pipe breaks off within an array.
    """
    while first := file.read(1):
        try:
            images = np.lib.format.read_array(_Rest(first, file), allow_pickle=False)
        except DAMAGE as error:
            raise UserError(f"{name}: array after array by numpy.save is to come, not this: {error}") from None
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise UserError(f"{name}: images are uint8 [n, height, width, 3], not {images.dtype} {images.shape}")
        yield images


class _Rest:
    """A pipe whose first byte was read already."""

    def __init__(self, first: bytes, file: IO[bytes]) -> None:
        self._first, self._file = first, file

    def read(self, size: int) -> bytes:
        first, self._first = self._first[:size], self._first[size:]
        return first + self._file.read(size - len(first))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
