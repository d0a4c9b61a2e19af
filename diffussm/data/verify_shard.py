"""A shard's bytes against the index: sample by sample, and member by member of the tar."""

from __future__ import annotations

import io
import itertools
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from diffussm.data.index import Index, Shard
from diffussm.data.normalisation import Statistics
from diffussm.data.shards import npy_header

BLOCK = 256  # samples whose sums are taken at once


@dataclass(frozen=True)
class Problem:
    """What is wrong with an object, or with one of its samples."""

    name: str
    sample: str | None  # its key
    problem: str

    def __str__(self) -> str:
        return f"{self.name}: {f'sample {self.sample}: ' if self.sample else ''}{self.problem}"


def verify_samples(
    shard: Shard, index: Index, rows: np.ndarray, content: bytes
) -> tuple[list[Problem], Statistics | None]:
    """Problems with the shard's samples, found by offset as training finds them; and statistics of those without.

    Args:
        rows: the shard's own, of the table of samples.
        content: all its bytes.
    """
    problems, sound = [], []
    for place, (offset, length, crc32, _) in enumerate(rows.tolist()):
        data = content[offset : offset + length]
        if len(data) < length:
            problem = "the shard ends before it"
        elif zlib.crc32(data) != crc32:
            problem = "its bytes have changed: it has another crc32"
        elif not np.isfinite(moments := np.frombuffer(data, index.dtype).reshape(index.moments_shape)).all():
            problem = "has numbers that are not finite"
        else:
            sound.append(moments)
            continue
        problems.append(Problem(shard.name, shard.key(place), problem))
    statistics = None
    for start in range(0, len(sound), BLOCK):
        of_block = Statistics.of(np.stack(sound[start : start + BLOCK]), index.latent_shape[0])
        statistics = statistics + of_block if statistics else of_block
    return problems, statistics


def verify_tar(shard: Shard, index: Index, rows: np.ndarray, content: bytes) -> Iterator[Problem]:
    """Problems with the shard as a tar, found as any reader of tars would find them. Arguments as above."""
    header = npy_header(index.moments_shape, index.dtype)
    expected = itertools.product(range(len(rows)), ("cls", "latent.npy"))
    for wanted, member in itertools.zip_longest(expected, _members(content)):
        if wanted is None:
            yield Problem(shard.name, None, f"has a member {member.name!r} that the index does not know")
            continue
        place, suffix = wanted
        key, row = shard.key(place), rows[place]
        if member is None:
            yield Problem(shard.name, key, f"the tar ends before its {suffix}, or a header is damaged")
            return
        data = content[member.offset_data : member.offset_data + member.size]
        if not member.isreg() or member.name != f"{key}.{suffix}":
            yield Problem(shard.name, key, f"where its {suffix} belongs, the tar has {member.name!r}")
        elif suffix == "cls":
            if data != b"%d" % row["label"]:
                yield Problem(shard.name, key, f"its cls says {data[:20]!r}, the index {row['label']}")
        elif not data.startswith(header):
            yield Problem(shard.name, key, f"its array is not of {index.dtype.name} {index.moments_shape}")
        elif (member.offset_data + len(header), len(data) - len(header)) != (row["offset"], row["length"]):
            yield Problem(shard.name, key, "its array lies elsewhere than the index says")


def _members(content: bytes) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, as far as it can be read."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            yield from tar
    except (tarfile.TarError, ValueError, OSError):
        return
