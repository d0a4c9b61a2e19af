"""Locks that killed compilations leave behind are removed, those of living ones are not."""

import pytest

from diffussm.training.extensions import remove_stale_locks

pytestmark = pytest.mark.unit


def test_only_locks_that_nobody_holds_open_are_stale(tmp_path):
    stale, held, other = (
        tmp_path / "py311_cpu" / name
        for name in ("a/deepspeed_shm_comm/lock", "b/deepspeed_shm_comm/lock", "c/other_project/lock")
    )
    for path in (stale, held, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    with open(held):
        remove_stale_locks(tmp_path)
        assert (stale.exists(), held.exists(), other.exists()) == (False, True, True)
    remove_stale_locks(tmp_path)
    assert not held.exists()


def test_no_folder_is_no_lock(tmp_path):
    remove_stale_locks(tmp_path / "nothing")
