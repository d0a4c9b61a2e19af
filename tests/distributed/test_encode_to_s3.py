"""Encoding into an object store goes on where it was broken off, as it does on a disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import runs
from distributed.encode_worker import ALL, NOBODY

from benchmarks.seaweed import Seaweed
from diffussm.data.store import open_store

pytestmark = pytest.mark.s3


def test_killed_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, bin = str(Path(__file__).parent / "encode_worker.py"), Path(sys.executable).parent
    torchrun = [str(bin / "torchrun"), "--nproc_per_node=2", f"--master_port={runs.free_port()}"]
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable]
    with Seaweed(tmp_path / "server") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="latents")
        whole, broken = (open_store(f"s3://latents/{name}") for name in ("whole", "broken"))
        slowly = [*torchrun, worker, str(broken), ALL, "0.1"]
        with runs.started(slowly, tmp_path / "log", lambda: len(broken.list("finished-")) > 8):
            pass
        assert not broken.exists("index.json")
        for command, store in ((mpirun, broken), ([sys.executable], whole)):
            done = runs.run([*command, worker, str(store), NOBODY, "0"])
            assert done.returncode == 0, done.stderr
        names = list(whole.list())
        assert names == list(broken.list()) and len(names) == 48
        assert all(whole.read(name) == broken.read(name) for name in names)
        tool = [sys.executable, str(runs.ROOT / "tools/verify_shards.py"), str(broken)]
        verified = subprocess.run(tool, capture_output=True, text=True)
        assert verified.returncode == 0 and verified.stdout.endswith("sound\n"), verified
