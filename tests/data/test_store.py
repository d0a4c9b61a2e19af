from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from diffussm.data import store as store_module
from diffussm.data.store import Stat, open_store
from diffussm.errors import UserError
from diffussm.files import atomic_path

pytestmark = pytest.mark.unit


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real one, of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"it takes root to mount a disk: {mount.stderr}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # stores keep files open


def race(count: int, work: Callable[[int], bool]) -> list[bool]:
    """What ``work(number)`` says in as many processes, which begin at once."""
    begin, go = os.pipe()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(begin, 1)  # until the parent has closed its end
            code = 2
            try:
                code = 0 if work(number) else 1
            finally:
                os._exit(code)
        children.append(child)
    os.close(go)
    os.close(begin)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 1}
    return [code == 0 for code in codes]


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_put_and_read(tmp_path: Path) -> None:
    store = open_store(tmp_path / "new")
    assert store.list() == {} and not store.exists("a")
    store.put("a", b"0123456789")
    store.put("b/c", bytearray())
    assert store.exists("a") and store.stat("a") == Stat(10)
    assert store.read("a") == b"0123456789"
    assert store.read("a", 3, 4) == b"3456"
    assert store.read("a", 7) == store.read("a", 7, 100) == b"789"
    assert store.read("a", 20) == store.read("a", 20, 5) == store.read("b/c") == b""
    assert list(store.list()) == ["a", "b/c"] and store.list("b") == {"b/c": Stat(0)}
    store.delete("a")
    store.delete("a")
    assert not store.exists("a") and list(store.list()) == ["b/c"]


def test_put_replaces_what_is_being_read(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("a", b"old")
    assert store.read("a") == b"old"
    (tmp_path / "source").write_bytes(b"newer")
    store.put("a", tmp_path / "source")
    assert store.read("a") == b"newer" and store.stat("a").size == 5


def test_what_another_process_has_replaced(tmp_path: Path) -> None:
    store, other = open_store(tmp_path), open_store(tmp_path)
    store.swap("latest", None, b"old")
    assert store.read("latest") == b"old"
    other.swap("latest", b"old", b"new")
    assert store.read("latest") == b"new"


def test_put_if_absent(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("a", b"first", if_absent=True)
    with pytest.raises(FileExistsError):
        store.put("a", b"second", if_absent=True)
    assert store.read("a") == b"first" and list(store.list()) == ["a"]


def test_a_file_that_is_put_becomes_the_object(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    source, link = tmp_path / "source", tmp_path / "link"
    source.write_bytes(b"content")
    source.chmod(0o600)  # as safetensors writes them
    link.symlink_to(source)
    new = tmp_path / "new"
    new.touch()
    for name in ("a", "b/c"):
        assert store.put(name, link) == Stat(7)
        path = tmp_path / "store" / name
        assert path.samefile(source) and path.stat().st_mode == new.stat().st_mode and not path.is_symlink()
    with pytest.raises(FileExistsError):
        store.put("a", source, if_absent=True)
    store.put("a", tmp_path / "store/a")
    source.unlink()
    assert store.read("a") == store.read("b/c") == b"content"
    assert everything(tmp_path / "store") == ["a", "b", "b/c"]


def test_a_file_of_another_disk_or_user_is_copied(tmp_path: Path, small_disk: Path) -> None:
    store = open_store(tmp_path / "store")
    for source in (small_disk / "source", tmp_path / "source"):
        source.write_bytes(b"content")
        source.chmod(0o600)
    os.chown(tmp_path / "source", 12345, 12345)
    for source in (small_disk / "source", tmp_path / "source"):
        assert store.put("a", source) == Stat(7)
        path = tmp_path / "store/a"
        assert not path.samefile(source) and path.stat().st_uid == 0 and store.read("a") == b"content"
        assert stat.S_IMODE(source.stat().st_mode) == 0o600


@pytest.mark.parametrize("source", ["bytes", "file"])
def test_a_full_disk(small_disk: Path, tmp_path: Path, source: str) -> None:
    store = open_store(small_disk)
    store.put("a", b"old")
    content = bytes(2 << 20)
    (tmp_path / "source").write_bytes(content)
    for name in ("a", "b"):
        with pytest.raises(OSError, match="No space left on device") as failure:
            store.put(name, content if source == "bytes" else tmp_path / "source")
        assert failure.value.errno == errno.ENOSPC and failure.value.filename == str(small_disk / name)
    with pytest.raises(OSError, match=f"{small_disk}/a"):
        store.swap("a", b"old", content)
    assert store.read("a") == b"old" and store.list() == {"a": Stat(3)}
    assert everything(small_disk) == [".a.lock", "a"]


def test_swap(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(FileExistsError, match="a/latest"):
        store.swap("a/latest", b"", b"1")
    store.swap("a/latest", None, b"1")
    for old in (None, b"", b"0"):
        with pytest.raises(FileExistsError, match="Somebody else has written it"):
            store.swap("a/latest", old, b"2")
    assert store.read("a/latest") == b"1"
    store.swap("a/latest", b"1", b"")
    store.swap("a/latest", b"", b"2")
    assert store.read("a/latest") == b"2" and store.list() == {"a/latest": Stat(1)}


@pytest.mark.parametrize("old", [None, b"old"])
def test_one_of_many_that_swap_wins(tmp_path: Path, old: bytes | None) -> None:
    store = open_store(tmp_path)
    if old is not None:
        store.put("latest", old)

    def swap(number: int) -> bool:
        try:
            store.swap("latest", old, b"%d" % number)
        except FileExistsError:
            return False
        return True

    won = race(16, swap)
    assert won.count(True) == 1 and open_store(tmp_path).read("latest") == b"%d" % won.index(True)


def test_no_swap_is_lost(tmp_path: Path) -> None:
    store, path = open_store(tmp_path), tmp_path / "count"
    store.put("count", b"0")

    def count(number: int) -> bool:
        done = 0
        while done < 10:
            old = path.read_bytes()
            try:
                store.swap("count", old, b"%d" % (int(old) + 1))
            except FileExistsError:
                continue
            done += 1
        return True

    race(4, count)
    assert path.read_bytes() == b"40"


def test_delete_all(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for name in ("c/1/manifest.json", "c/1/a", "c/1/b/c", "c/10/a", "c/2"):
        store.put(name, b"")
    (tmp_path / "c/1/.b.01234567").mkdir()
    (tmp_path / "c/1/.b.01234567/b").write_bytes(b"half")
    store.delete_all("c/1/", first="c/1/manifest.json")
    store.delete_all("c/1/", first="c/1/manifest.json")
    assert everything(tmp_path) == ["c", "c/10", "c/10/a", "c/2"]
    store.delete_all("c/")
    assert everything(tmp_path) == []


def test_delete_all_that_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    for name in ("1/manifest.json", "1/a", "1/b"):
        store.put(name, b"")

    def die(folder: Path) -> None:
        (folder / "a").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", die)
        store.delete_all("1/", first="1/manifest.json")
    assert list(store.list()) == ["1/b"]
    store.delete_all("1/", first="1/manifest.json")
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    ("prefix", "first"),
    [
        ("", None),
        ("/", None),
        ("a", None),
        ("./", None),
        ("../", None),
        ("a/../../", None),
        ("a/", "b"),
        ("a/", "a/../b"),
    ],
)
def test_delete_all_stays_below_its_prefix(tmp_path: Path, prefix: str, first: str | None) -> None:
    store = open_store(tmp_path)
    store.put("a/x", b"")
    store.put("b", b"")
    with pytest.raises(UserError):
        store.delete_all(prefix, first)
    assert list(store.list()) == ["a/x", "b"]


def test_sweep_removes_what_killed_writers_have_left(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for name in ("a", "b/c.tar", "b/d/e"):
        child = os.fork()
        if child == 0:
            with atomic_path(tmp_path / name) as temporary:
                temporary.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (tmp_path / ".empty.0_23abcd").mkdir()
    assert len(everything(tmp_path)) == 9
    store.sweep()
    assert everything(tmp_path) == ["b", "b/d"]


def test_sweep_leaves_everything_else(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.sweep()
    store.swap("latest", None, b"1")
    for name in (".ssh.settings/key", ".a.01234567/a/b", ".git/.a.01234567/a", ".b.0123456789/b", "c.01234567/c"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".f.01234567").write_bytes(b"")
    (tmp_path / ".c.01234567").symlink_to(tmp_path / "c.01234567")
    before = everything(tmp_path)
    store.sweep()
    assert everything(tmp_path) == before


def test_unfinished_writes_are_no_objects(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("a", b"")
    (tmp_path / ".b.x1").mkdir()
    (tmp_path / ".b.x1" / "b").write_bytes(b"half")
    assert list(store.list()) == ["a"]


def test_missing_objects(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for call in (store.read, store.stat):
        with pytest.raises(FileNotFoundError):
            call("a")
    store.put("a", b"now")
    assert store.read("a") == b"now"


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "..", "", "."])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    store = open_store(tmp_path)
    for call in (store.read, store.stat, store.exists, lambda name: store.put(name, b""), store.delete):
        with pytest.raises(UserError, match="not a name inside"):
            call(name)


def test_urls(tmp_path: Path) -> None:
    open_store(tmp_path / "a b").put("x", b"1")
    assert open_store(f"file://{tmp_path}/a%20b").read("x") == b"1"
    with pytest.raises(UserError, match=r"gopher:// is not supported"):
        open_store("gopher://host/data")
    with pytest.raises(UserError, match="three slashes"):
        open_store("file://data/train")


def test_more_files_than_it_keeps_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "OPEN_FILES", 4)
    store = open_store(tmp_path)
    for i in range(20):
        store.put(f"{i}", b"%d" % i)
    before = len(os.listdir("/proc/self/fd"))
    assert [store.read(f"{i}", 0, 2) for i in range(20)] == [b"%d" % i for i in range(20)]
    assert len(os.listdir("/proc/self/fd")) - before == 4


def test_forked_processes_share_one_store(tmp_path: Path) -> None:
    content = np.arange(4096, dtype="<u4").tobytes()
    store = open_store(tmp_path)
    store.put("a", content)
    store.read("a", 0, 1)  # opened before the fork
    children = []
    for seed in range(3):
        child = os.fork()
        if child == 0:
            starts = np.random.default_rng(seed).integers(0, 4000, 3000).tolist()
            right = all(store.read("a", 4 * i, 8) == content[4 * i : 4 * i + 8] for i in starts)
            os._exit(0 if right else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
