"""Whole shards on a node's own disk, so that each is fetched once however many ranks and epochs read it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import sys
import time
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path

from diffussm.data.index import Shard
from diffussm.data.store import Buffer, Store
from diffussm.errors import UserError
from diffussm.files import fsync

PIECE_BYTES = 16 << 20  # fetched at once
WAIT_SECONDS = 0.1  # between looks for room
SAY_AFTER, GIVE_UP_AFTER = 10, 600  # seconds without room
ATTEMPTS = 3  # to fetch what arrives damaged


class ShardCache:
    """Shards of a store, kept in a folder of a local disk; all processes of a node may share it, for any data sets.

    A file bears the sha256 of its content. It is fetched by one process, under a lock, into a file of another name, and
    gets its own once it is on the disk and its sha256 is right; so what bears a name is whole, whoever is killed when.
    Where the fetch fails it has failed for all that have waited for it: none of them tries for another while.

    Args:
        max_bytes: what the folder may hold; the shards that were not read for longest make room.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, store: Store, folder: str | Path, max_bytes: int) -> None:
        self._store = store
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._maps = weakref.WeakValueDictionary[str, mmap.mmap]()  # unmapped when the last reader lets go
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache folder {folder} cannot be made: {error.strerror}: choose another data.cache"
            ) from error

    def read(self, shard: Shard, start: int, length: int) -> memoryview:
        """Bytes of a shard, fetched first if need be; the view keeps them readable even when the file makes room.

        Raises:
            FileNotFoundError: the store has no such shard.
            UserError: it is damaged or cannot be fetched, or the disk is full.
        """
        mapped = self._maps.get(shard.sha256) or self._open(shard)
        return memoryview(mapped)[start : start + length]

    def drop(self, shard: Shard) -> None:
        """Forget a shard whose file has turned out damaged."""
        self._maps.pop(shard.sha256, None)
        self._path(shard).unlink(missing_ok=True)

    def _open(self, shard: Shard) -> mmap.mmap:
        lock = self._lock(shard.sha256)
        before = _read_text(lock)
        with self._locked(lock):
            mapped = self._open_kept(shard)
            if mapped is None:
                failure = _read_text(lock)
                if failure != before:
                    _raise_failure(failure, shard)  # while we waited
                try:
                    mapped = self._fetch(shard)
                except (UserError, FileNotFoundError) as error:
                    with contextlib.suppress(OSError):  # the disk is full: the others find out for themselves
                        lock.write_text(_describe_failure(error, shard))
                    raise
        self._maps[shard.sha256] = mapped
        return mapped

    def _open_kept(self, shard: Shard) -> mmap.mmap | None:
        with contextlib.suppress(FileNotFoundError), self._path(shard).open("rb") as file:
            if os.fstat(file.fileno()).st_size == shard.size:
                os.utime(file.fileno())  # read just now: the last to make room
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return None

    def _fetch(self, shard: Shard) -> mmap.mmap:
        path = self._path(shard)
        part = path.with_suffix(".part")
        try:
            self._make_room(shard, part)
            if not any(self._download(shard, part) for _ in range(ATTEMPTS)):
                raise UserError(
                    f"{self._store}/{shard.name} is damaged: its sha256 is not what the index says: restore it, or "
                    f"delete index.json and run tools/encode_latents.py again"
                )
            fsync(part)
            with part.open("rb") as file:  # before it has a name, and another process can take its room
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            os.replace(part, path)
            fsync(self._folder)
            return mapped
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(
                f"cannot keep {shard.name} in the cache {self._folder}: {error.strerror}: lower data.cache_gib"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def _download(self, shard: Shard, part: Path) -> bool:
        """Whether what came is the shard: a network may alter or cut it on its way."""
        digest = hashlib.sha256()
        with part.open("r+b") as file:
            for start in range(0, shard.size, PIECE_BYTES):
                piece = self._read(shard, start, min(PIECE_BYTES, shard.size - start))
                digest.update(piece)
                file.write(piece)
        return digest.hexdigest() == shard.sha256

    def _read(self, shard: Shard, start: int, length: int) -> Buffer:
        try:
            return self._store.read(shard.name, start, length, shard.etag)
        except FileNotFoundError:
            raise
        except OSError as error:  # of the store's disk, not of ours
            raise UserError(f"{self._store}/{shard.name} cannot be read: {error.strerror}: look at its disk") from error

    def _make_room(self, shard: Shard, part: Path) -> None:
        """Set the shard's room aside, by a file of its size; waits for it while others are fetching theirs.

        Raises:
            UserError: there never is enough, or has not been for ten minutes.
        """
        if shard.size > self._max_bytes:
            raise UserError(
                f"the cache {self._folder} has no room for {shard.name} of {shard.size} bytes: raise data.cache_gib"
            )
        begin, said = time.monotonic(), False
        while not self._set_aside(shard.size, part):
            waited = time.monotonic() - begin
            full = f"the cache {self._folder} is full of shards that are being fetched: {shard.name} waits for room"
            if waited > GIVE_UP_AFTER:
                raise UserError(f"{full}, in vain for {GIVE_UP_AFTER} s: raise data.cache_gib")
            if waited > SAY_AFTER and not said:
                print(f"{full}: raise data.cache_gib if this goes on", file=sys.stderr, flush=True)
                said = True
            time.sleep(WAIT_SECONDS)

    def _set_aside(self, size: int, part: Path) -> bool:
        with self._locked(self._folder / "lock"):
            for left in self._folder.glob("*.part"):
                if self._lock(left.stem) == self._lock(part.stem):
                    left.unlink()  # we hold its lock
                else:
                    self._remove_abandoned(left)
            kept = {}
            for path in self._folder.iterdir():
                if path.suffix in (".tar", ".part"):
                    with contextlib.suppress(FileNotFoundError):  # it has just got its name, or been dropped
                        kept[path] = path.stat()
            free = self._max_bytes - sum(stat.st_size for stat in kept.values())
            for path in sorted(kept, key=lambda path: kept[path].st_mtime_ns):
                if free >= size:
                    break
                if path.suffix == ".tar":
                    path.unlink(missing_ok=True)
                    free += kept[path].st_size
            if free < size:
                return False
            with part.open("wb") as file:
                file.truncate(size)
            return True

    def _remove_abandoned(self, part: Path) -> None:
        """Remove what a killed process has left: nobody holds its lock."""
        with self._lock(part.stem).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Hold a lock between threads and processes; the system unlocks it however this process ends."""
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, shard: Shard) -> Path:
        return self._folder / f"{shard.sha256}.tar"

    def _lock(self, sha256: str) -> Path:
        return self._folder / f"{sha256[:4]}.lock"  # few share one, and there are not too many


def _describe_failure(error: UserError | FileNotFoundError, shard: Shard) -> str:
    """What a lock's file tells of the last fetch that failed; no two are the same."""
    message = (error.strerror or str(error)) if isinstance(error, FileNotFoundError) else str(error)
    failure = {"shard": shard.sha256, "missing": isinstance(error, FileNotFoundError), "message": message}
    return json.dumps({**failure, "id": uuid.uuid4().hex})


def _raise_failure(text: str, shard: Shard) -> None:
    """Raise what :func:`_describe_failure` has described, if it was of this shard."""
    try:
        failure = json.loads(text)
    except ValueError:  # its writer has been killed
        return
    if failure["shard"] == shard.sha256:
        raise (
            FileNotFoundError(errno.ENOENT, failure["message"]) if failure["missing"] else UserError(failure["message"])
        )


def _read_text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
