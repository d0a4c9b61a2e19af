"""Arrays in .npz files, of which nothing is ever unpickled."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from diffussm.errors import UserError

DAMAGE = (  # what NumPy and zipfile raise on it
    ValueError, OSError, EOFError, RuntimeError, OverflowError, KeyError, MemoryError, AttributeError,
    zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip
CHECKED_AT_ONCE = 16 << 20  # bytes


def is_npz(path: str | Path) -> bool:
    return Path(path).suffix == ".npz" or Path(path).is_file()


def npz_keys(path: str | Path) -> list[str]:
    """The arrays of an .npz. UserError if it is none."""
    with open_npz(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_npz(path: str | Path, key: str) -> np.ndarray:
    """An array of an .npz, checked. UserError if it is not there, damaged or pickled."""
    _require(path, key)
    try:
        with np.load(path, allow_pickle=False) as file:
            return file[key]
    except DAMAGE:
        raise UserError(f"{path}: {key} is damaged, pickled, or larger than memory: write it again") from None


def check_npz(path: str | Path, key: str) -> None:
    """Compare an array's checksum. UserError if it is damaged."""
    with open_npz(path) as archive:
        try:
            with archive.open(f"{key}.npy") as file:
                while file.read(CHECKED_AT_ONCE):  # its end compares
                    pass
        except DAMAGE:
            raise UserError(f"{path}: {key} is damaged: write it again") from None


def map_array(path: str | Path, key: str, largest_copy: int | None = None) -> np.ndarray:
    """As :func:`read_npz`, but not checked and not in memory where the file holds it as it is.

    Args:
        largest_copy: bytes that what is compressed may have, as it is unpacked into memory; None: any number.
    """
    _require(path, key)
    damaged = UserError(f"{path}: {key} is damaged: write it again")
    with open_npz(path) as archive:
        info = archive.getinfo(f"{key}.npy")
        try:
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, fortran_order, dtype = header[version](file)
                start = file.tell()
            with open(path, "rb") as file:  # the local header, whose lengths are not those of the directory
                file.seek(info.header_offset + 26)
                place = start + info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        except DAMAGE:
            raise damaged from None
    if not dtype.hasobject and (
        min(shape, default=0) < 0 or start + math.prod(shape) * dtype.itemsize != info.file_size
    ):
        raise damaged
    if info.compress_type == zipfile.ZIP_STORED and not (fortran_order or dtype.hasobject or 0 in shape):
        return np.memmap(path, dtype, "r", place, shape)
    if largest_copy is not None and info.file_size > largest_copy:
        raise UserError(
            f"{path}: {key} is compressed or in Fortran order, and each process would hold all of it: numpy.savez, of "
            f"numpy.ascontiguousarray, writes it plainly"
        )
    return read_npz(path, key)


def _require(path: str | Path, key: str) -> None:
    if key not in (keys := npz_keys(path)):
        raise UserError(f"{path} has no {key}, only {', '.join(keys) or 'nothing'}")


def open_npz(path: str | Path) -> zipfile.ZipFile:
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    try:
        return zipfile.ZipFile(path)
    except DAMAGE:
        raise UserError(
            f"{path} is not an .npz file, or a damaged one: numpy.savez({str(path)!r}, images) writes one"
        ) from None
