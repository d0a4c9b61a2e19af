"""One shard: a plain USTAR tar of `KEY.cls` and `KEY.latent.npy` members, which stock webdataset reads.

We read it by offset, so building one also gives the table of where each sample's numbers lie.
"""

from __future__ import annotations

import functools
import io
import tarfile
import zlib

import numpy as np

from diffussm.data.index import SAMPLE_DTYPE, sample_key
from diffussm.errors import needs


class ShardBuilder:
    """Builds the shard numbered ``shard`` in memory. The same samples give the same bytes on any machine."""

    def __init__(self, shard: int) -> None:
        with needs("encoding", "data"):
            import webdataset
        self._shard = shard
        self._rows: list[tuple[int, int, int, int]] = []
        self._buffer = io.BytesIO()
        self._tar = webdataset.TarWriter(self._buffer, encoder=False, mtime=0, user="", group="", mode=0o644)
        # TarWriter (1.0.2) never passes its `format` on, and tarfile's own default is PAX. With whole mtimes and short
        # names both write the same bytes; this makes anything that USTAR cannot hold an error.
        self._tar.tarstream.format = tarfile.USTAR_FORMAT

    def add(self, moments: np.ndarray, label: int) -> None:
        """Append a sample."""
        data = moments.tobytes()
        npy = npy_header(moments.shape, moments.dtype) + data
        self._tar.write({"__key__": sample_key(self._shard, len(self._rows)), "cls": b"%d" % label, "latent.npy": npy})
        # Members are written in the order of their names, so the array is the end of the tar up to now, but for the
        # padding to whole blocks.
        padding = -len(npy) % tarfile.BLOCKSIZE
        offset = self._tar.tarstream.offset - padding - len(data)
        self._rows.append((offset, len(data), zlib.crc32(data), label))

    def finish(self) -> tuple[bytes, np.ndarray]:
        """The shard's bytes, and its rows of the sample table (``SAMPLE_DTYPE``)."""
        self._tar.close()
        return self._buffer.getvalue(), np.array(self._rows, SAMPLE_DTYPE)


@functools.cache
def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What ``np.save`` writes before the numbers of such an array."""
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()
