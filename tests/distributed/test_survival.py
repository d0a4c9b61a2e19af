"""What a run meets at night: requests to stop, ranks that hang, numbers that are not finite, a disk that is full."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import runs

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.index import Shard, publish_index, shard_name
from diffussm.data.shards import ShardBuilder
from diffussm.data.store import open_store
from diffussm.training import checkpoint
from diffussm.training.monitor import log_of

pytestmark = pytest.mark.distributed

EXACT = ("images", "loss/total", "loss/mse", "loss/vlb", "grad_norm", "lr/dense", "lr/ssm")
LONG = {"train__total_images": 1600, "train__decay_images": 0, "train__checkpoint_images": 1000}


def seen(run: Path) -> int:
    return max((record["images"] for record in log_of(run)), default=0)


def curve(run: Path) -> list[tuple]:
    return [tuple(record[key] for key in EXACT) for record in log_of(run)]


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error:")]


# Requests to stop


def test_mpirun_trains_the_same(trained, shades, tmp_path):
    done = runs.run(runs.command("mpirun", 2, runs.arguments(shades, tmp_path / "run")))
    assert done.returncode == 0, done.stderr
    assert curve(tmp_path / "run") == curve(trained)


def test_stopped_again_and_again_it_goes_on_bit_for_bit(shades, tmp_path):
    """One run through every launcher and signal, and through the time limit."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    done = runs.run(runs.command("torchrun", 2, runs.arguments(shades, whole, **LONG)))
    assert done.returncode == 0, done.stderr
    for number, (launcher, name, code) in enumerate(
        [("torchrun", "SIGTERM", 1), ("deepspeed", "SIGINT", 75), ("mpirun", "SIGUSR1", 75)]
    ):
        before, log = seen(run), tmp_path / f"log{number}"
        command = runs.command(launcher, 2, runs.arguments(shades, run, **LONG))
        with runs.started(command, log, lambda before=before: seen(run) >= before + 80) as process:
            runs.ranks_of(process)[1].send_signal(signal.Signals[name])  # one rank alone: all stop
            assert process.wait(timeout=60) == code
        lines = log.read_text().splitlines()
        stopped = [line for line in lines if line.startswith("stopped at ")]
        assert len(stopped) == 1 and f"images by {name}; all is saved" in stopped[0], log.read_text()
        assert not errors(log.read_text())
        newest = checkpoint.complete(open_store(run / "checkpoints"))[0]
        assert stopped[0].split()[2] == f"{newest.meta['images']:,}" and newest.meta["images"] == seen(run)
    timed = runs.run(runs.command("deepspeed", 2, runs.arguments(shades, run, **LONG, train__max_hours=0.5 / 3600)))
    assert timed.returncode == 75 and "by the time limit of 0.000138889 h (train.max_hours)" in timed.stderr
    assert 0 < seen(run) < LONG["train__total_images"]
    done = runs.run(runs.command("torchrun", 2, runs.arguments(shades, run, **LONG)))
    assert done.returncode == 0, done.stderr
    assert curve(run) == curve(whole)


def test_a_launchers_own_signal_saves(shades, tmp_path):
    """As a terminal's Ctrl-C and a scheduler's SIGTERM come: the launcher gets it, and passes it on."""
    run = tmp_path / "run"
    endless = LONG | {"train__total_images": 10**6}
    for launcher, name in (("deepspeed", "SIGINT"), ("torchrun", "SIGTERM")):
        before = seen(run)
        command, log = runs.command(launcher, 2, runs.arguments(shades, run, **endless)), tmp_path / launcher
        with runs.started(command, log, lambda before=before: seen(run) >= before + 80) as process:
            os.killpg(process.pid, signal.Signals[name])
            assert process.wait(timeout=60) != 0
            deadline = time.monotonic() + 30
            while "all is saved" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        newest = checkpoint.complete(open_store(run / "checkpoints"))[0]
        assert newest.meta["images"] > before


def test_one_process_without_a_launcher_says_by_its_code_that_it_stopped(shades, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    command = runs.command("python", 1, runs.arguments(shades, run, **LONG | {"train__total_images": 10**6}))
    with runs.started(command, log, lambda: seen(run) >= 80) as process:
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 75
    announced, stopped = [line for line in log.read_text().splitlines() if "SIGUSR1" in line]
    assert announced.startswith(f"rank 0 on {socket.gethostname()}: SIGUSR1: finishes the step")
    assert stopped == f"stopped at {seen(run):,} images by SIGUSR1; all is saved, the same command goes on"


# Hangs


def test_ranks_that_hang_show_where_and_end(shades, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    keys = LONG | {"train__total_images": 10**6, "train__hang_minutes": 15 / 60}
    command = runs.command("torchrun", 2, runs.arguments(shades, run, **keys))
    with runs.started(command, log, lambda: seen(run) >= 80) as process:
        runs.ranks_of(process)[1].suspend()  # it hangs, and rank 0 with it, in a collective
        start = time.monotonic()
        assert process.wait(timeout=90) != 0
        assert time.monotonic() - start < 60
    text = log.read_text()
    assert f'rank 0 on {socket.gethostname()}: no progress for 0.25 min in "the step after' in text
    assert "trainer.py" in text and "in train_step" in text


STALLED = """
import os, time

def pread(*arguments, read=os.pread):
    rank, file = os.environ.get("OMPI_COMM_WORLD_RANK"), os.readlink(f"/proc/self/fd/{arguments[0]}")
    if rank == "1" and file.endswith(".tar"):
        time.sleep(1000)
    return read(*arguments)

os.pread = pread
"""


def test_a_rank_whose_data_never_comes_ends_all(shades, tmp_path, monkeypatch):
    """As from a network's disk that hangs on one host."""
    (tmp_path / "sitecustomize.py").write_text(STALLED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began = time.monotonic()
    arguments = runs.arguments(shades, tmp_path / "run", **LONG | {"train__hang_minutes": 0.2})
    done = runs.run(runs.command("mpirun", 2, arguments), timeout=120)
    assert done.returncode == 70 and time.monotonic() - began < 90
    for rank, where in enumerate(("in train_step", "in pread")):
        header = f'rank {rank} on {socket.gethostname()}: no progress for 0.2 min in "the step after 0 images"'
        if header in done.stderr:  # mpirun ends the other one, which may not have come to its own yet
            assert where in done.stderr
    assert "no progress for 0.2 min" in done.stderr


# What is not finite


class Floats(PixelCodec):
    """Pixels stored in a type that has NaN."""

    dtype = np.dtype("<f4")


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> tuple[Path, str]:
    """A data set with one sample that is not finite; the sample's key."""
    folder = tmp_path_factory.mktemp("poisoned")
    store, random = open_store(folder / "train"), np.random.default_rng(0)
    builder = ShardBuilder(0)
    for number in range(130):
        moments = random.uniform(0, 255, (4, 8, 8)).astype("<f4")
        if number == 77:
            moments[0, 0, 0] = np.nan
        builder.add(moments, number % 3)
    content, table = builder.finish()
    store.put(shard_name(0), content)
    shard = Shard(shard_name(0), len(content), 130, hashlib.sha256(content).hexdigest())
    publish_index(store, {"name": "poisoned"}, ["a", "b", "c"], Floats(16, 16, 1, size=16), [shard], table)
    return folder, shard.key(77)


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(poisoned, tmp_path):
    data, key = poisoned
    run, total = tmp_path / "run", 16 * 8  # an epoch: each sample once
    keys = {"train__total_images": total, "train__decay_images": 0, "train__ema_images": 400}
    done = runs.run(runs.command("torchrun", 2, runs.arguments(data, run, **keys)))
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(text) for text in (run / "skipped.jsonl").read_text().splitlines()]
    assert line["keys"] == [key] and line["cause"] == "loss"
    assert f"the step after {line['images']:,} images is skipped" in done.stderr
    records = log_of(run)
    assert records[-1]["skipped_steps"] == 1
    skipped = [record for record in records if "loss/total" not in record]
    assert [record["images"] for record in skipped] == [line["images"] + 8]  # a record of no step has no loss
    found = checkpoint.find(open_store(run / "checkpoints"))
    assert found.meta["skipped"] == {"total": 1, "in_a_row": 0} and found.meta["adam_steps"] == 15
    assert all(tensor.isfinite().all() for kind in found.kinds for tensor in found.tensors(kind).values())
    # at ZeRO 0 and 3, too; and through a resume
    for zero in ("0", "3"):
        other = tmp_path / zero
        config = json.loads((runs.ROOT / "ds_configs/zero2.json").read_text())
        config["zero_optimization"] = {"stage": int(zero)}
        (tmp_path / "ds.json").write_text(json.dumps(config))
        for images in (64, total):
            arguments = [*runs.arguments(data, other, **keys | {"train__total_images": images})]
            done = runs.run(runs.command("torchrun", 2, [*arguments, f"--deepspeed={tmp_path / 'ds.json'}"]))
            assert done.returncode == 0, done.stderr
        assert json.loads((other / "skipped.jsonl").read_text())["keys"] == [key]
        assert [r.get("loss/total") for r in log_of(other)] == pytest.approx([r.get("loss/total") for r in records])


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 2 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_waited_for(small_disk, shades, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2 * 2**20 - 8192))
    keys = LONG | {"train__total_images": 10**6, "train__checkpoint_images": 80, "train__checkpoints": small_disk / "c"}
    keys |= {"train__log_images": 8}
    with runs.started(
        runs.command("torchrun", 2, runs.arguments(shades, run, **keys)), log, lambda: "cannot be written" in text(log)
    ) as process:
        # the next one is written at once, and fails as well: that ends the run, and nothing half-written lies there
        assert process.wait(timeout=60) != 0
    (line,) = errors(text(log))
    assert "No space left on device" in line and str(small_disk) in line
    assert "warning: rank " in text(log) and "training goes on until the next checkpoint" in text(log)
    assert not checkpoint.complete(open_store(small_disk / "c"))
    images = seen(run)
    assert images == 160  # it went on from the first to the second
    ballast.unlink()
    total = {"train__total_images": 320}
    done = runs.run(runs.command("torchrun", 2, runs.arguments(shades, run, **keys | total)))
    assert done.returncode == 0, done.stderr
    found = checkpoint.find(open_store(small_disk / "c"))
    assert found.meta["images"] == 320
    assert len(list((small_disk / "c").glob("images-*"))) == 2


def test_a_disk_that_has_room_again_gets_the_checkpoint(small_disk, shades, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    ballast, store = small_disk / "ballast", open_store(small_disk / "c")
    ballast.write_bytes(bytes(2 * 2**20 - 8192))
    keys = {"train__total_images": 10**6, "train__checkpoint_images": 400, "train__checkpoints": small_disk / "c"}
    command = runs.command("mpirun", 2, runs.arguments(shades, run, **LONG | keys))
    with runs.started(command, log, lambda: "cannot be written" in text(log)) as process:
        ballast.unlink()
        deadline = time.monotonic() + 60
        while not checkpoint.complete(store):  # the try after ten seconds, or the next checkpoint
            assert process.poll() is None and time.monotonic() < deadline, text(log)
            time.sleep(0.05)
        runs.ranks_of(process)[0].send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    assert not errors(text(log))
    newest = checkpoint.find(store)
    assert newest.meta["images"] == seen(run) and f"stopped at {seen(run):,} images" in text(log)


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
