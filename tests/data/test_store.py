from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from diffussm.data import store as store_module
from diffussm.data.store import Stat, open_store
from diffussm.errors import UserError

pytestmark = pytest.mark.unit


def test_put_and_read(tmp_path: Path) -> None:
    store = open_store(tmp_path / "new")
    assert store.list() == {} and not store.exists("a")
    store.put("a", b"0123456789")
    store.put("b/c", b"")
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


def test_put_if_absent(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("a", b"first", if_absent=True)
    with pytest.raises(FileExistsError):
        store.put("a", b"second", if_absent=True)
    assert store.read("a") == b"first" and list(store.list()) == ["a"]


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
    for call in (store.read, store.stat, store.exists, lambda name: store.put(name, b"")):
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
    assert [store.read(f"{i}") for i in range(20)] == [b"%d" % i for i in range(20)]
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
