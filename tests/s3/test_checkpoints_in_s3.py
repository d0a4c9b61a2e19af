"""A run whose checkpoints lie in a bucket: it resumes bit for bit, is sampled from, and never mixes with another."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import torch
from s3.conftest import BUCKET
from s3.fault_proxy import FaultProxy, refuse

from diffussm.data import s3_requests
from diffussm.data.s3 import S3Store
from diffussm.data.store import open_store
from diffussm.training import checkpoint
from diffussm.training.monitor import log_of

pytestmark = pytest.mark.s3


def losses(run: Path) -> list[float]:
    return [record["loss/total"] for record in log_of(run)]


def tensors(place: str) -> dict[str, torch.Tensor]:
    found = checkpoint.find(open_store(place))
    return {f"{kind}:{name}": tensor for kind in found.kinds for name, tensor in found.tensors(kind).items()}


def test_a_run_resumes_from_a_bucket_and_is_sampled(trained: Path, shades: Path, tmp_path: Path, prefix: str) -> None:
    run, url = tmp_path / "run", f"s3://{BUCKET}/{prefix}"
    keys = {"train__checkpoints": url}
    with runs.started(
        runs.command("torchrun", 2, runs.arguments(shades, run, **keys)),
        tmp_path / "log",
        lambda: len(losses(run)) >= 6,
    ):
        pass  # killed
    done = runs.run(runs.command("torchrun", 2, runs.arguments(shades, run, **keys)))
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(trained)
    mine, theirs = tensors(url), tensors(str(trained / "checkpoints"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    names = {name.split("/")[0] for name in open_store(url).list()}
    assert names == {"images-000000000064", "images-000000000096", "latest", "owner"}
    command = [sys.executable, str(runs.ROOT / "tools/sample.py"), str(run), "--count=2", "--steps=2"]
    sampled = subprocess.run(command, capture_output=True, text=True)
    assert sampled.returncode == 0, sampled.stderr
    assert (run / "samples/samples.npz").is_file()


def test_two_runs_into_one_place(shades: Path, tmp_path: Path, prefix: str) -> None:
    """As after a cut network, when a replacement has started: the first one's next save is refused."""
    url = f"s3://{BUCKET}/{prefix}"
    endless = {"train__total_images": 10**6, "train__decay_images": 0, "train__checkpoint_images": 400}
    keys = endless | {"train__checkpoints": url}
    first = runs.command("python", 1, runs.arguments(shades, tmp_path / "first", **keys))
    with runs.started(first, tmp_path / "log", lambda: bool(checkpoint.complete(open_store(url)))) as process:
        second = runs.arguments(shades, tmp_path / "second", **keys | {"train__max_hours": 0.5 / 3600})
        done = runs.run(runs.command("python", 1, second))
        assert done.returncode == 75, done.stderr
        assert process.wait(timeout=60) == 2
        assert "another process has begun to save" in (tmp_path / "log").read_text()
    checkpoint.find(open_store(url)).verify()


def test_a_server_that_refuses_for_a_while_is_outlasted(
    shades: Path, tmp_path: Path, prefix: str, store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on, and once the server is back, a checkpoint arrives."""
    run, log = tmp_path / "run", tmp_path / "log"
    monkeypatch.setenv(s3_requests.DEADLINE_NAME, "1")
    keys = {"train__total_images": 10**6, "train__decay_images": 0, "train__checkpoint_images": 400}
    arguments = runs.arguments(shades, run, train__checkpoints=f"s3://{BUCKET}/{prefix}", **keys)
    command = runs.command("mpirun", 2, arguments)
    with runs.started(command, log, lambda: len(losses(run)) >= 2) as process:
        for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
            proxy.inject(refuse(503, "SlowDown"), method=method)
        wait_for(process, log, lambda: "cannot be written" in log.read_text())
        failed_at = len(losses(run))
        wait_for(process, log, lambda: len(losses(run)) >= failed_at + 2)
        proxy.rules.clear()
        wait_for(process, log, lambda: bool(checkpoint.complete(store)))
        runs.ranks_of(process)[1].send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    told = log.read_text()
    assert "the server answered 503 SlowDown: given up" in told and "training goes on" in told
    assert "error:" not in told and "all is saved" in told
    checkpoint.find(store).verify()


def wait_for(process: subprocess.Popen[str], log: Path, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
