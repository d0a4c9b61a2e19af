"""The same shards through stock webdataset, by an opener for its s3:// URLs that gives a whole shard or raises.

    import webdataset
    from diffussm.data.compat import decode, register, shard_urls

    register()
    dataset = webdataset.WebDataset(shard_urls("s3://bucket/train"), shardshuffle=False).map(decode)

webdataset takes a tar that was cut at the end of a member for a whole one, and an altered sample for a sound one. Its
order and its share of the ranks are its own: no exact resume, and no promise that each sample comes once.
"""

from __future__ import annotations

import functools
import hashlib
import io

import numpy as np
from webdataset.gopen import gopen_schemes

from diffussm.data.cache import ATTEMPTS
from diffussm.data.index import Index, Shard
from diffussm.data.store import Buffer, Store, open_store
from diffussm.errors import UserError


def register() -> None:
    """Have webdataset open s3:// URLs by :func:`open_shard`, in this process and those forked from it."""
    gopen_schemes["s3"] = open_shard


def shard_urls(url: str) -> list[str]:
    """The shards of the data set at ``url``.

    Raises:
        UserError: as :meth:`Index.load`.
    """
    return [f"{url.rstrip('/')}/{shard.name}" for shard in _load_index(url.rstrip("/"))[1].shards]


def open_shard(url: str, mode: str = "rb", bufsize: int = 0) -> io.BytesIO:
    """The shard at ``url``, fetched as a whole and compared with the index beside it. webdataset passes the other two.

    Raises:
        UserError: it is missing, ends short or has changed.
    """
    if mode != "rb":
        raise ValueError(f"{url}: shards are read only, not opened as {mode!r}")
    folder, _, name = url.rpartition("/")
    store, index = _load_index(folder)
    shard = next((shard for shard in index.shards if shard.name == name), None)
    if shard is None:
        raise UserError(f"{url} is not a shard of the data set there: shard_urls({folder!r}) lists them")
    for _ in range(ATTEMPTS):
        problem, content = _read(store, shard)
        if problem is None:
            return io.BytesIO(content)
    raise UserError(f"{url} {problem}: restore it, or delete index.json and run tools/encode_latents.py again")


def decode(sample: dict[str, bytes]) -> tuple[np.ndarray, int]:
    """What a sample of webdataset holds: moments as stored, and the class. Nothing is unpickled."""
    return np.lib.format.read_array(io.BytesIO(sample["latent.npy"]), allow_pickle=False), int(sample["cls"])


def _read(store: Store, shard: Shard) -> tuple[str | None, Buffer]:
    try:
        content = store.read(shard.name, etag=shard.etag)
    except FileNotFoundError:
        return "is missing", b""
    if len(content) != shard.size:
        return f"has {len(content)} bytes, the index says {shard.size}", b""
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        return "has changed since it was encoded", b""
    return None, content


@functools.lru_cache(maxsize=8)
def _load_index(url: str) -> tuple[Store, Index]:
    store = open_store(url)
    return store, Index.load(store)
