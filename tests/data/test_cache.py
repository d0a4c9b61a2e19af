from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from diffussm.data import cache as cache_module
from diffussm.data.cache import ShardCache
from diffussm.data.index import Index, Shard
from diffussm.data.reader import SampleReader
from diffussm.data.store import LocalStore, open_store
from diffussm.errors import UserError

pytestmark = pytest.mark.unit

FORK = multiprocessing.get_context("fork")


class Counted(LocalStore):
    """A store that writes down each read, across processes."""

    def __init__(self, root: Path, log: Path, before: Callable[[], None] = lambda: None) -> None:
        super().__init__(root)
        self._log, self._before = log, before

    def read(self, name: str, *arguments: object) -> bytes:
        with self._log.open("a") as file:
            file.write(f"{name}\n")
        self._before()
        return super().read(name, *arguments)

    def reads(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []


@pytest.fixture
def index(encoded: Path) -> Index:
    return Index.load(open_store(encoded))


@pytest.fixture
def store(encoded: Path, tmp_path: Path) -> Counted:
    return Counted(encoded, tmp_path / "reads")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def kept(folder: Path) -> set[str]:
    """Whose content is what the name says."""
    names = {path.stem for path in folder.glob("*.tar")}
    assert names == {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}
    return names


def test_reads_what_the_store_holds_and_fetches_it_once(store: Counted, index: Index, folder: Path) -> None:
    reader = SampleReader(store, index, ShardCache(store, folder, 1 << 30))
    expected = SampleReader(open_store(str(store)), index).read(np.arange(230))
    for _ in range(3):
        np.testing.assert_array_equal(reader.read(np.arange(230))[0], expected[0])
    again = SampleReader(store, index, ShardCache(store, folder, 1 << 30))  # another process, a later run
    np.testing.assert_array_equal(again.read(np.arange(230))[0], expected[0])
    assert sorted(store.reads()) == [shard.name for shard in index.shards]
    assert kept(folder) == {shard.sha256 for shard in index.shards}
    assert not list(folder.glob("*.part"))


def test_one_fetch_a_node_however_many_ranks(encoded: Path, tmp_path: Path, index: Index, folder: Path) -> None:
    store = Counted(encoded, tmp_path / "reads", before=lambda: time.sleep(0.05))
    shard = index.shards[2]
    content = (encoded / shard.name).read_bytes()

    def rank() -> None:
        cache = ShardCache(store, folder, 1 << 30)
        with ThreadPoolExecutor(4) as threads:
            for data in threads.map(lambda _: bytes(cache.read(shard, 100, 5000)), range(4)):
                assert data == content[100:5100]

    ranks = [FORK.Process(target=rank) for _ in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert store.reads() == [shard.name]


def test_killed_in_a_fetch_it_leaves_nothing_that_bears_a_name(
    encoded: Path, tmp_path: Path, index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "PIECE_BYTES", 10_000)
    log = tmp_path / "reads"
    shard = index.shards[0]

    def die_in_the_second_piece() -> None:
        if len(log.read_text().splitlines()) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(
        target=lambda: ShardCache(Counted(encoded, log, die_in_the_second_piece), folder, 1 << 30).read(shard, 0, 9)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert kept(folder) == set() and len(list(folder.glob("*.part"))) == 1
    store = open_store(encoded)
    cache = ShardCache(store, folder, sum(other.size for other in index.shards[:2]))
    cache.read(index.shards[1], 0, 9)  # what the dead one had set aside is free again
    assert not list(folder.glob("*.part"))
    assert cache.read(shard, 0, shard.size) == (encoded / shard.name).read_bytes()
    assert kept(folder) == {shard.sha256, index.shards[1].sha256}


def test_the_shards_not_read_for_longest_make_room(store: Counted, index: Index, folder: Path) -> None:
    a, b, c = index.shards[:3]
    cache = ShardCache(store, folder, a.size + b.size + c.size - 1)
    view = cache.read(a, 0, a.size)
    content = bytes(view)
    for shard in (b, a, c):
        time.sleep(0.02)  # the file system's clock may be coarse
        ShardCache(store, folder, a.size + b.size + c.size - 1).read(shard, 0, 1)
    assert kept(folder) == {a.sha256, c.sha256}
    assert store.reads() == [a.name, b.name, c.name]
    ShardCache(store, folder, b.size).read(b, 0, 1)
    assert kept(folder) == {b.sha256}
    assert bytes(view) == content  # still mapped


def test_a_cache_smaller_than_a_shard_is_refused(store: Counted, index: Index, folder: Path) -> None:
    cache = ShardCache(store, folder, index.shards[0].size - 1)
    with pytest.raises(UserError, match=r"no room for shard-00000\.tar of \d+ bytes: raise data\.cache_gib"):
        cache.read(index.shards[0], 0, 1)


@pytest.mark.parametrize("missing", [False, True])
def test_who_waits_for_a_fetch_that_fails_has_failed_with_it(
    missing: bool, encoded: Path, tmp_path: Path, index: Index, folder: Path
) -> None:
    """Threads and processes alike: a dead store is given up once, not once for each in turn."""
    deadline = 0.5
    shard = index.shards[2]

    def give_up() -> None:
        time.sleep(deadline)
        raise FileNotFoundError(2, "No such object") if missing else UserError(f"{shard.name}: given up")

    store = Counted(encoded, tmp_path / "reads", before=give_up)
    error, line = (FileNotFoundError, "No such object") if missing else (UserError, "given up")
    begin = FORK.Barrier(3)

    def rank() -> None:
        cache = ShardCache(store, folder, 1 << 30)
        begin.wait()
        began = time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            for read in [threads.submit(cache.read, shard, 0, 9) for _ in range(4)]:
                with pytest.raises(error, match=line):
                    read.result()
        assert time.monotonic() - began < 1.9 * deadline

    ranks = [FORK.Process(target=rank) for _ in range(2)]
    for process in ranks:
        process.start()
    begin.wait()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert store.reads() == [shard.name]
    with pytest.raises(error, match=line):  # who comes later tries again
        ShardCache(store, folder, 1 << 30).read(shard, 0, 9)
    assert store.reads() == [shard.name] * 2
    assert ShardCache(LocalStore(encoded), folder, 1 << 30).read(shard, 0, 9) == (encoded / shard.name).read_bytes()[:9]


def test_room_that_never_comes_is_one_line(
    index: Index, store: Counted, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others fetch, for ever, into all the room that there is."""
    monkeypatch.setattr(cache_module, "SAY_AFTER", 0.1)
    monkeypatch.setattr(cache_module, "GIVE_UP_AFTER", 0.5)
    shard = index.shards[0]
    cache = ShardCache(store, folder, shard.size)
    (folder / f"{'f' * 64}.part").write_bytes(bytes(10))
    with (folder / "ffff.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(
            UserError, match=r"shard-00000\.tar waits for room, in vain for 0\.5 s: raise data\.cache_gib"
        ):
            cache.read(shard, 0, 9)
    assert capsys.readouterr().err.count("shard-00000.tar waits for room") == 1
    cache.read(shard, 0, 9)  # the other was killed


def test_a_damaged_shard_is_never_kept(store: Counted, index: Index, folder: Path, encoded: Path) -> None:
    path = encoded / index.shards[1].name
    content = bytearray(path.read_bytes())
    content[5] ^= 1  # in a header: no sample's crc32 would tell
    path.write_bytes(content)
    reader = SampleReader(store, index, ShardCache(store, folder, 1 << 30))
    with pytest.raises(UserError, match=r"shard-00001\.tar is damaged: its sha256"):
        reader.read(np.arange(60, 70))
    assert kept(folder) == set()


def test_what_rots_in_the_cache_is_fetched_again(store: Counted, index: Index, folder: Path) -> None:
    shard = index.shards[0]
    SampleReader(store, index, ShardCache(store, folder, 1 << 30)).read(np.arange(50))
    path = folder / f"{shard.sha256}.tar"
    expected = SampleReader(open_store(str(store)), index).read(np.arange(50))[0]
    for damage in ("flip", "cut"):
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[int(index.samples["offset"][7]) + 3] ^= 1
        else:
            del content[-1000:]
        path.unlink()
        path.write_bytes(content)
        reader = SampleReader(store, index, ShardCache(store, folder, 1 << 30))
        np.testing.assert_array_equal(reader.read(np.arange(50))[0], expected)
        assert kept(folder) == {shard.sha256}
    assert store.reads() == [shard.name] * 3


def test_a_missing_shard_and_a_folder_that_cannot_be(index: Index, encoded: Path, folder: Path, tmp_path: Path) -> None:
    (encoded / index.shards[3].name).unlink()
    store = open_store(encoded)
    with pytest.raises(UserError, match=r"shard-00003\.tar: sample 00003-000000 is unreadable: No such file"):
        SampleReader(store, index, ShardCache(store, folder, 1 << 30)).read(np.arange(150, 155))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/cache cannot be made: Not a directory: choose another data\.cache"):
        ShardCache(store, tmp_path / "file/cache", 1 << 30)


def test_a_full_disk_is_one_line(index: Index, store: Counted, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(cache_module, "fsync", no_space)
    with pytest.raises(
        UserError, match=r"shard-00000\.tar in the cache .*: No space left on device: lower data\.cache_gib"
    ):
        ShardCache(store, folder, 1 << 30).read(index.shards[0], 0, 1)
    assert kept(folder) == set() and not list(folder.glob("*.part"))


def test_a_disk_that_fails_is_told_from_the_caches_own(
    encoded: Path, tmp_path: Path, index: Index, folder: Path
) -> None:
    def fail() -> None:
        raise OSError(5, os.strerror(5))

    store = Counted(encoded, tmp_path / "reads", before=fail)
    with pytest.raises(
        UserError, match=rf"^{encoded}/shard-00000\.tar cannot be read: Input/output error: look at its"
    ):
        ShardCache(store, folder, 1 << 30).read(index.shards[0], 0, 1)


def test_other_shards_do_not_wait_for_a_slow_one(encoded: Path, tmp_path: Path, index: Index, folder: Path) -> None:
    slow: Shard = index.shards[0]
    go_on, begun = threading.Event(), threading.Event()

    class Slow(LocalStore):
        def read(self, name: str, *arguments: object) -> bytes:
            if name == slow.name:
                begun.set()
                assert go_on.wait(30)
            return super().read(name, *arguments)

    cache = ShardCache(Slow(encoded), folder, 1 << 30)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(cache.read, slow, 0, 3)
        assert begun.wait(30)
        for shard in index.shards[1:]:
            cache.read(shard, 0, 3)
        assert not waiting.done()
        go_on.set()
        assert bytes(waiting.result()) == (encoded / slow.name).read_bytes()[:3]


def test_processes_that_take_each_others_room_read_nothing_wrong(encoded: Path, index: Index, folder: Path) -> None:
    """Room for two shards, three processes that read five at random: files vanish all the time."""
    contents = {shard.name: (encoded / shard.name).read_bytes() for shard in index.shards}
    room = 2 * max(shard.size for shard in index.shards)

    def rank(seed: int) -> None:
        cache = ShardCache(open_store(encoded), folder, room)
        random = np.random.default_rng(seed)
        with ThreadPoolExecutor(2) as threads:

            def read(number: int) -> None:
                shard = index.shards[number]
                assert cache.read(shard, 0, shard.size) == contents[shard.name]

            list(threads.map(read, random.integers(0, 5, 60).tolist()))

    ranks = [FORK.Process(target=rank, args=(seed,)) for seed in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    kept(folder)
    assert sum(path.stat().st_size for path in folder.glob("*.tar")) <= room
