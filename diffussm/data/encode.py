"""Encode a set of images into shards and an index: by many processes at once, in as many goes as it takes.

Whoever is free claims the next shard, and leaves a record beside the finished one. So the store alone knows what there
is: a run that was killed is run again, by any number of processes, and makes the other shards. In the end one process
makes the index of the records. A shard's bytes depend on its images only, so that all objects come out the same however
often the work was broken off; with an autoencoder, on the same kind of processor.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np

from diffussm.autoencoders.codec import Codec
from diffussm.data.index import INDEX_NAME, SHARD_PREFIX, Index, Shard, publish_index, shard_name
from diffussm.data.loading import LOADERS, load_ahead
from diffussm.data.records import (
    RECORD_PREFIX,
    LeftOut,
    Record,
    load_record,
    record_name,
    refuse_another,
    remove_records,
    save_record,
)  # fmt: skip
from diffussm.data.shards import ShardBuilder
from diffussm.data.sources.base import BadImage, ImageSource, Item, Version
from diffussm.data.store import Store
from diffussm.data.workers import Alone, Progress, Workers
from diffussm.errors import UserError

SAMPLES_PER_SHARD = 4096
BAD_IMAGES_NAME = "bad-images.json"


def encode(
    source: ImageSource,
    codec: Codec,
    store: Store,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    seed: int = 0,
    *,
    flip: bool = False,
    on_bad_image: str = "stop",
    workers: Workers | None = None,
    share: tuple[int, int] = (0, 1),
) -> Index | None:
    """Encode all of ``source`` into ``store`` and return the index. If it is there already, nothing is done.

    Args:
        seed: of the order of the images: sources come sorted by class, and a training step takes its samples from few
            places.
        flip: also encode each image's mirror, as a sample of its own in a shard of its own.
        on_bad_image: ``stop`` at an image that cannot be decoded, so that it can be mended and the same call goes on;
            or ``skip`` it: it is left out, listed in ``bad-images.json`` and counted in the index.
        workers: those who share the work; each calls this function with the same arguments.
        share: (i, n): of the shards only every n-th, from the i-th. Others, which may know nothing of these workers,
            make the rest. Whose shards are the last publishes the index; before, None is returned.

    Raises:
        UserError: ``store`` holds something else, complete or in part, or is damaged; an image cannot be read or
            decoded, or has changed since its shard was finished; or another process is lost.
    """
    workers = workers or Alone()
    encoding = Encoding(source, codec, store, samples_per_shard, seed, flip, on_bad_image == "skip")
    if store.exists(INDEX_NAME):
        index = Index.load(store)
        encoding.refuse_finished(index)
        if workers.rank == 0:
            remove_records(store)  # left over where a run was killed after it had published the index
            print(f"{store}: already encoded, nothing to do", file=sys.stderr)
        return index
    encoding.refuse_strays()
    shards = range(share[0], encoding.shard_count, share[1])
    images = encoding.image_count if len(shards) == encoding.shard_count else None
    with (
        Progress(f"encoding {store}", len(shards), images, workers) as progress,
        ThreadPoolExecutor(LOADERS, "images") as pool,
    ):
        while (number := progress.claim()) is not None:
            encoding.finish_shard(shards[number], pool, progress)
            progress.add_shard()
        if workers.rank == 0:
            progress.wait_for_shards()
            if len(shards) == encoding.shard_count or encoding.all_finished():
                encoding.publish()
            progress.announce_end()
        else:
            progress.wait_for_end()
    return Index.load(store) if store.exists(INDEX_NAME) else None


class Encoding:
    """What is to be encoded, how, and where to.

    Attributes:
        description: all that the result depends on, as JSON: two encodings that agree in it are the same.
        shard_count: of all shards; with mirrors the second half are theirs.
        image_count: of all images, mirrors included; None where the source does not know.
    """

    def __init__(
        self, source: ImageSource, codec: Codec, store: Store, samples_per_shard: int, seed: int, flip: bool, skip: bool
    ) -> None:
        self._source, self._codec, self._store, self._skip = source, codec, store, skip
        self._parts = source.parts(samples_per_shard, seed)
        self._files = source.files(samples_per_shard, seed)
        self.shard_count = len(self._parts) * (2 if flip else 1)
        self.image_count = None if source.count is None else source.count * (2 if flip else 1)
        self.description = {
            "name": source.name,
            "fingerprint": source.fingerprint(),
            "codec": codec.spec(),
            "seed": seed,
            "samples_per_shard": samples_per_shard,
            "flip": flip,
        }
        if codec.device_kind:
            self.description["device"] = codec.device_kind

    def refuse_finished(self, index: Index) -> None:
        """UserError unless the finished data set is what this encoding would make of the images as they are now."""
        any_device = {key: value for key, value in self.description.items() if key != "device"}
        refuse_another(self._store, {**index.source, "codec": index.codec}, any_device)
        anew = f"choose another folder, or delete {INDEX_NAME} there, and all is encoded anew"
        if index.source.get("files") != _hash_versions(map(self._versions, range(len(self._parts)))):
            raise UserError(f"{self._store} was encoded from images that have changed since: {anew}")
        if (count := index.source.get("skipped")) and not self._skip:
            raise UserError(
                f"{self._store} was encoded without {count} images that cannot be decoded (its {BAD_IMAGES_NAME} lists "
                f"them): accept that by --on-bad-image skip, or mend them and {anew}"
            )

    def refuse_strays(self) -> None:
        """UserError where the store holds a shard that is not one of ours."""
        strays = set(self._store.list(SHARD_PREFIX)) - {shard_name(number) for number in range(self.shard_count)}
        if strays:
            raise UserError(
                f"{self._store} holds {min(strays)}, which is not of this encoding: empty the folder or choose another"
            )

    def finish_shard(self, number: int, pool: ThreadPoolExecutor, progress: Progress) -> None:
        """See to it that the shard and its record are in the store."""
        record = load_record(self._store, number)
        if record is not None:
            refuse_another(self._store, record.description, self.description)
        if record is None or (record.left_out and not self._skip):  # what was left out then may have been mended since
            save_record(self._store, number, self._make_shard(number, pool, progress))
        else:
            self._refuse_changed(number, record)
            progress.add_images(len(record.rows) + len(record.left_out))

    def all_finished(self) -> bool:
        """Whether there is a record of every shard, whoever made it."""
        return len(self._store.list(RECORD_PREFIX)) == self.shard_count

    def publish(self) -> None:
        """Make the index of the records of all shards, and remove them."""
        records = [load_record(self._store, number) for number in range(self.shard_count)]
        if None not in records:
            for record in records:  # processes of this very run may differ: one may have no GPU
                refuse_another(self._store, record.description, self.description)
            left_out = [asdict(bad) for record in records[: len(self._parts)] for bad in record.left_out]
            versions = [record.versions for record in records[: len(self._parts)]]
            rows = np.concatenate([record.rows for record in records])
            if not len(rows):
                raise UserError(f"{self._source.name} has no image that can be decoded, of {len(left_out)}")
            if left_out:
                self._store.put(BAD_IMAGES_NAME, (json.dumps(left_out, indent=1) + "\n").encode())
            source = {key: value for key, value in self.description.items() if key != "codec"}
            publish_index(
                self._store,
                {**source, "files": _hash_versions(versions), "skipped": len(left_out)},
                self._source.class_names,
                self._codec,
                [record.shard for record in records if record.shard],
                rows,
            )
        elif not self._store.exists(INDEX_NAME):  # which another run, at work at the same time, has not published
            raise UserError(f"{self._store}: the record of {shard_name(records.index(None))} is lost: encode again")
        remove_records(self._store)

    def _make_shard(self, number: int, pool: ThreadPoolExecutor, progress: Progress) -> Record:
        mirrored, part = divmod(number, len(self._parts))
        builder, left_out, versions = ShardBuilder(number), [], self._versions(part)
        for batch in load_ahead(self._parts[part](), pool):
            left_out += [LeftOut(item.name, str(image)) for item, image in batch if isinstance(image, BadImage)]
            self._refuse_left_out(left_out)
            good = [(item, image) for item, image in batch if not isinstance(image, BadImage)]
            if good:
                items, images = zip(*good, strict=True)
                self._add_samples(builder, items, np.stack([image[:, ::-1] if mirrored else image for image in images]))
            progress.add_images(len(batch))
        content, rows = builder.finish()
        if not len(rows):
            return Record(self.description, None, rows, left_out, versions)
        name = shard_name(number)
        etag = self._store.put(name, content).etag
        shard = Shard(name, len(content), len(rows), hashlib.sha256(content).hexdigest(), etag)
        return Record(self.description, shard, rows, left_out, versions)

    def _add_samples(self, builder: ShardBuilder, items: Iterable[Item], images: np.ndarray) -> None:
        for item, moments in zip(items, self._codec.encode(images), strict=True):
            if not np.isfinite(moments).all():
                raise UserError(f"{item.name} has a latent that is not finite: the autoencoder does not suit it")
            builder.add(moments, item.label)

    def _refuse_left_out(self, left_out: list[LeftOut]) -> None:
        if left_out and not self._skip:
            first, count = left_out[0], len(left_out)
            raise UserError(
                f"{first.name} cannot be decoded: {first.problem} ({count} such so far in its shard): mend it and run "
                f"the same command again, which keeps finished shards; or leave such images out: --on-bad-image skip"
            )

    def _refuse_changed(self, number: int, record: Record) -> None:
        files = self._files[number % len(self._parts)]()
        for (name, version), then in zip(files, record.versions, strict=True):
            if version != then:
                raise UserError(
                    f"{name} has changed since {shard_name(number)} was made of it: bring the old file back, or delete "
                    f"{self._store}/{record_name(number)}, and that shard is made anew"
                )

    def _versions(self, part: int) -> list[Version]:
        return [version for _, version in self._files[part]()]


def _hash_versions(parts: Iterable[list[Version]]) -> str:
    """Of the files of all parts, as they were encoded."""
    digest = hashlib.sha256()
    for versions in parts:
        digest.update(json.dumps(versions).encode())
    return digest.hexdigest()
