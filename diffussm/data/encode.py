"""Encode a set of images into shards and an index."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
from tqdm import tqdm

from diffussm.autoencoders.codec import Codec
from diffussm.data.index import INDEX_NAME, SHARD_PREFIX, Index, Shard, publish_index, shard_name
from diffussm.data.order import ENCODING_ORDER, philox, random_permutation
from diffussm.data.shards import ShardBuilder
from diffussm.data.sources import ImageSource
from diffussm.data.store import Store
from diffussm.errors import UserError

SAMPLES_PER_SHARD = 4096
BATCH = 256  # images encoded at once


def encode(
    source: ImageSource, codec: Codec, store: Store, samples_per_shard: int = SAMPLES_PER_SHARD, seed: int = 0
) -> Index:
    """Encode all of ``source`` into ``store``, in an order shuffled by ``seed``, and return the index.

    Shuffled, because sources come sorted by class and a training step takes its samples from few places. The result
    is a function of the arguments: a run that was killed is simply run again, and several at once write the same
    bytes. If it is there already, nothing is done.

    Raises:
        UserError: ``store`` holds something else, complete or in part, or is damaged.
    """
    description = {
        "name": source.name,
        "count": len(source),
        "sha256": source.fingerprint(),
        "seed": seed,
        "samples_per_shard": samples_per_shard,
    }
    if store.exists(INDEX_NAME):
        index = Index.load(store)
        wanted = {**description, "codec": codec.spec()}
        found = {**index.source, "codec": index.codec}
        if different := [key for key in wanted if found.get(key) != wanted[key]]:
            key = different[0]
            raise UserError(
                f"{store} already holds another encoding: its {key} is {found.get(key)}, not {wanted[key]}: "
                f"choose another folder or delete this one"
            )
        print(f"{store}: already encoded, nothing to do", file=sys.stderr)
        return index

    starts = range(0, len(source), samples_per_shard)
    names = [shard_name(number) for number in range(len(starts))]
    if stray := set(store.list(SHARD_PREFIX)) - set(names):
        raise UserError(
            f"{store} holds {min(stray)}, which is not of this encoding: empty the folder or choose another"
        )
    order = random_permutation(philox(seed, ENCODING_ORDER), len(source))
    shards, tables = [], []
    refresh = 0.5 if sys.stderr.isatty() else 10
    with tqdm(total=len(source), desc=f"encoding {store}", unit="image", mininterval=refresh) as bar:
        for number, start in enumerate(starts):
            name = names[number]
            numbers = range(start, min(start + samples_per_shard, len(source)))
            content, table = _encode_shard(number, source, codec, order, numbers, bar)
            store.put(name, content)
            shards.append(Shard(name, len(content), len(table), hashlib.sha256(content).hexdigest()))
            tables.append(table)
    publish_index(store, description, source.class_names, codec, shards, np.concatenate(tables))
    return Index.load(store)


def _encode_shard(
    shard: int, source: ImageSource, codec: Codec, order: np.ndarray, numbers: range, bar: tqdm
) -> tuple[bytes, np.ndarray]:
    """The bytes of one shard and its rows of the table; sample ``number`` is image ``order[number]``."""
    builder = ShardBuilder(shard)
    for start in range(numbers.start, numbers.stop, BATCH):
        ids = order[start : min(start + BATCH, numbers.stop)]
        images, labels = source.read(ids)
        for moments, label in zip(codec.encode(images), labels.tolist(), strict=True):
            builder.add(moments, label)
        bar.update(len(ids))
    return builder.finish()
