"""The index of an encoded data set: what it holds, how its latents are normalised, and where each sample lies.

`index.json` is published last: a data set without one is unfinished. `samples.npy` beside it is the table of samples.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from diffussm.autoencoders.codec import Codec
from diffussm.data.store import Store
from diffussm.errors import UserError

FORMAT = "diffussm-latents/1"
INDEX_NAME = "index.json"
SAMPLES_NAME = "samples.npy"
SHARD_PREFIX = "shard-"
# Of each sample, in the order of their numbers: the byte offset and length of the raw array inside its shard, the crc32
# of those bytes, and the class.
SAMPLE_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4"), ("label", "<i4")])
MOMENT_DTYPES = ("uint8", "float16", "float32")
MAX_INDEX_BYTES = 1 << 28
MAX_SAMPLES = 1 << 32
MAX_SHARD_BYTES = 1 << 48
MAX_SAMPLE_BYTES = 1 << 28
AGAIN = "restore it, or delete index.json and run tools/encode_latents.py again"


def shard_name(shard: int) -> str:
    """The name of the shard numbered ``shard``."""
    return f"{SHARD_PREFIX}{shard:05d}.tar"


def sample_key(shard: int, place: int) -> str:
    """The key of the sample that is number ``place`` in the shard numbered ``shard``: no other in the set has it."""
    return f"{shard:05d}-{place:06d}"


@dataclass(frozen=True)
class Shard:
    """One tar of the data set. ``etag`` is what the object store calls this version of it; None on a disk."""

    name: str
    size: int
    count: int
    sha256: str
    etag: str | None = None

    def key(self, place: int) -> str:
        """Of its sample number ``place``. Its name has its number: shards without a sound image are left out."""
        return sample_key(int(re.sub(r"\D", "", self.name.removeprefix(SHARD_PREFIX)) or 0), place)


@dataclass(frozen=True, eq=False)
class Index:
    """A data set's index. Sample ``i`` of the data set is row ``i`` of ``samples``; shards follow each other.

    The latent that a model sees is ``(mean - shift) * scale``, the mean being the first C channels of the moments.
    """

    source: dict[str, Any]  # what was encoded, and in which order
    codec: dict[str, Any]  # Codec.spec(): all that decoding needs
    latent_shape: tuple[int, int, int]  # [C, h, w]
    dtype: np.dtype  # of the stored moments
    posterior: bool  # True: moments are [2C, h, w], mean and log-variance
    scale: float
    shift: float
    class_names: list[str]
    shards: list[Shard]
    samples: np.ndarray = field(repr=False)  # [len(self)] of SAMPLE_DTYPE
    hash: str  # sha256 of index.json: the data set's identity

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """[C or 2C, h, w] of one stored sample."""
        channels, height, width = self.latent_shape
        return channels * (2 if self.posterior else 1), height, width

    @property
    def shard_counts(self) -> np.ndarray:
        """Samples in each shard, int64."""
        return np.array([shard.count for shard in self.shards], np.int64)

    @classmethod
    def read(cls, store: Store) -> Index:
        """Read and check the index, whatever there is of its shards.

        Raises:
            UserError: there is no index, or it is damaged.
        """
        if not store.exists(INDEX_NAME):
            raise UserError(
                f"no {INDEX_NAME} in {store}: the encoding is not finished or the path is wrong: "
                f"run tools/encode_latents.py --out {store}"
            )
        try:
            return _parse(store)
        except (ValueError, RecursionError, FileNotFoundError) as error:
            raise UserError(f"{store}/{INDEX_NAME} is damaged: {error}: {AGAIN}") from error

    @classmethod
    def load(cls, store: Store) -> Index:
        """Read and check the index, and that every shard is there at its full size. No sample is read.

        Raises:
            UserError: there is no index, or it or a shard is damaged.
        """
        index = cls.read(store)
        there = store.list(SHARD_PREFIX)
        for shard in index.shards:
            if shard.name not in there:
                raise UserError(f"{store}/{shard.name} is missing: {AGAIN}")
            if (size := there[shard.name].size) != shard.size:
                raise UserError(f"{store}/{shard.name} has {size} bytes, the index says {shard.size}: {AGAIN}")
        # A copy of the data set has etags of its own. What the store says now holds for as long as the index is used.
        return replace(index, shards=[replace(shard, etag=there[shard.name].etag) for shard in index.shards])


def publish_index(
    store: Store, source: dict[str, Any], class_names: list[str], codec: Codec, shards: list[Shard], samples: np.ndarray
) -> None:
    """Write the table of samples, then `index.json`: with that the data set exists."""
    buffer = io.BytesIO()
    np.save(buffer, samples, allow_pickle=False)
    table = buffer.getvalue()
    store.put(SAMPLES_NAME, table)
    index = {
        "format": FORMAT,
        "count": len(samples),
        "source": source,
        "codec": codec.spec(),
        "latent": {
            "shape": list(codec.latent_shape),
            "dtype": codec.dtype.name,
            "posterior": codec.posterior,
            "scale": codec.scale,
            "shift": codec.shift,
        },
        "class_names": class_names,
        "samples": {"name": SAMPLES_NAME, "sha256": hashlib.sha256(table).hexdigest()},
        "shards": [asdict(shard) for shard in shards],
    }
    store.put(INDEX_NAME, (json.dumps(index, indent=1) + "\n").encode())


def _parse(store: Store) -> Index:
    """`index.json` and its table as an Index; ValueError says what is wrong with them."""
    _check(store.stat(INDEX_NAME).size <= MAX_INDEX_BYTES, "it is absurdly large")
    content = store.read(INDEX_NAME)
    table = json.loads(bytes(content))
    form = _get(table, "format", str)
    if form != FORMAT:
        raise UserError(f"{store}/{INDEX_NAME} is of format {form!r}, this version reads {FORMAT!r}: encode again")

    latent = _get(table, "latent", dict)
    shape, dtype, posterior = _get(latent, "shape", list), _get(latent, "dtype", str), _get(latent, "posterior", bool)
    _check(len(shape) == 3 and all(type(n) is int and n > 0 for n in shape), f"the latent's shape is {shape}")
    _check(dtype in MOMENT_DTYPES, f"the latent's dtype is {dtype!r}")
    scale, shift = _get(latent, "scale", float), _get(latent, "shift", float)
    _check(math.isfinite(shift) and math.isfinite(scale) and scale > 0, f"scale and shift are {scale} and {shift}")

    class_names = _get(table, "class_names", list)
    _check(all(type(name) is str for name in class_names), "class names are not all strings")

    shards = [_parse_shard(entry) for entry in _get(table, "shards", list)]
    _check(len({shard.name for shard in shards}) == len(shards), "it names a shard twice")
    count = _get(table, "count", int)
    _check(0 < count <= MAX_SAMPLES, f"it counts {count} samples")
    total = sum(shard.count for shard in shards)
    _check(total == count, f"it counts {count} samples, its shards {total}")

    index = Index(
        source=_get(table, "source", dict),
        codec=_get(table, "codec", dict),
        latent_shape=tuple(shape),
        dtype=np.dtype(dtype).newbyteorder("<"),
        posterior=posterior,
        scale=scale,
        shift=shift,
        class_names=class_names,
        shards=shards,
        samples=_read_samples(store, count, _get(table, "samples", dict)),
        hash=hashlib.sha256(content).hexdigest(),
    )
    _check_samples(index)
    return index


def _parse_shard(entry: Any) -> Shard:
    name = _get(entry, "name", str)
    _check(re.fullmatch(SHARD_PREFIX + r"[\w.-]+\.tar", name, re.ASCII) is not None, f"{name!r} is not a shard's name")
    size, count = _get(entry, "size", int), _get(entry, "count", int)
    _check(0 < size <= MAX_SHARD_BYTES and count > 0, f"{name} has {size} bytes and {count} samples")
    sha256 = _get(entry, "sha256", str)
    _check(re.fullmatch("[0-9a-f]{64}", sha256) is not None, f"{name} has no sha256, but {sha256!r}")
    return Shard(name, size, count, sha256, None if entry.get("etag") is None else _get(entry, "etag", str))


def _read_samples(store: Store, count: int, entry: dict[str, Any]) -> np.ndarray:
    _check(_get(entry, "name", str) == SAMPLES_NAME, f"its table of samples is not {SAMPLES_NAME}")
    size = store.stat(SAMPLES_NAME).size
    header_limit = 4096
    _check(0 <= size - count * SAMPLE_DTYPE.itemsize <= header_limit, f"{SAMPLES_NAME} is not of {count} samples")
    content = store.read(SAMPLES_NAME)
    sha256 = hashlib.sha256(content).hexdigest()
    _check(sha256 == _get(entry, "sha256", str), f"{SAMPLES_NAME} has changed since it was written")
    file = io.BytesIO(content)
    _check(np.lib.format.read_magic(file) == (1, 0), f"{SAMPLES_NAME} is of another version of npy")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    _check(shape == (count,) and dtype == SAMPLE_DTYPE, f"{SAMPLES_NAME} holds {dtype} {shape}")
    return np.frombuffer(content, SAMPLE_DTYPE, count, file.tell())


def _check_samples(index: Index) -> None:
    samples = index.samples
    sample_bytes = math.prod(index.moments_shape) * index.dtype.itemsize
    _check(sample_bytes <= MAX_SAMPLE_BYTES, f"its samples are of {sample_bytes} bytes")
    _check(bool((samples["length"] == sample_bytes).all()), f"not all samples are of {sample_bytes} bytes")
    first = 0
    for shard in index.shards:
        offsets = samples["offset"][first : first + shard.count]
        first += shard.count
        inside = shard.size >= sample_bytes and bool((offsets <= shard.size - sample_bytes).all())
        _check(inside, f"a sample lies outside its shard {shard.name}")
        in_turn = bool((offsets[1:] >= offsets[:-1] + np.uint64(sample_bytes)).all())
        _check(in_turn, f"the samples of {shard.name} do not follow each other")
    classes = max(1, len(index.class_names))
    _check(bool(((samples["label"] >= 0) & (samples["label"] < classes)).all()), "a label names no class")


def _get(table: Any, key: str, kind: type) -> Any:
    value = table.get(key) if type(table) is dict else None
    _check(type(value) is kind, f"{key!r} is not a {kind.__name__}")
    return value


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
