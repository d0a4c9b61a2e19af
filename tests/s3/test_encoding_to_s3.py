"""Encoding into an object store goes on where it was broken off, as it does on a disk."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import runs
from distributed.encode_worker import ALL, NOBODY
from s3.conftest import BUCKET

from diffussm.data.store import open_store

pytestmark = pytest.mark.s3


def test_killed_and_gone_on_with(tmp_path: Path, prefix: str) -> None:
    worker, bin = str(runs.ROOT / "tests/distributed/encode_worker.py"), Path(sys.executable).parent
    torchrun = [str(bin / "torchrun"), "--nproc_per_node=2", f"--master_port={runs.free_port()}"]
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable]
    whole, broken = (open_store(f"s3://{BUCKET}/{prefix}/{name}") for name in ("whole", "broken"))
    with runs.started(
        [*torchrun, worker, str(broken), ALL, "0.1"], tmp_path / "log", lambda: len(broken.list("finished-")) > 8
    ):
        pass
    assert not broken.exists("index.json")
    for command, store in ((mpirun, broken), ([sys.executable], whole)):
        done = runs.run([*command, worker, str(store), NOBODY, "0"])
        assert done.returncode == 0, done.stderr
    names = list(whole.list())
    assert names == list(broken.list()) and len(names) == 48
    assert all(whole.read(name) == broken.read(name) for name in names)
