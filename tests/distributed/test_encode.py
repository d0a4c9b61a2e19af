"""Encoding by many processes: killed at any moment and gone on with by any number, the objects are the same bytes."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import runs
from distributed.encode_worker import ALL, FAILING, NOBODY, SHARD, images
from torch.distributed import HashStore, TCPStore

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data import workers
from diffussm.data.encode import encode
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.errors import UserError
from diffussm.training.workers import Counting, join

pytestmark = pytest.mark.distributed

WORKER = str(Path(__file__).parent / "encode_worker.py")
SHARDS = 46


SRUN = """
ranks=$1; shift
export SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$ranks MASTER_ADDR=127.0.0.1
for rank in $(seq 0 $((ranks - 1))); do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids="$pids $!"; done
for pid in $pids; do wait $pid || exit; done
"""  # what it tells its tasks, on a machine that has none


def command(launcher: str, ranks: int, store: Path, slow: object = NOBODY, seconds: float = 0.0) -> list[str]:
    torchrun, arguments = str(Path(sys.executable).parent / "torchrun"), [WORKER, str(store), str(slow), str(seconds)]
    return {
        "python": [sys.executable, *arguments],
        "torchrun": [torchrun, f"--nproc_per_node={ranks}", f"--master_port={runs.free_port()}", *arguments],
        "srun": [
            *("env", f"MASTER_PORT={runs.free_port()}", "sh", "-c", SRUN),
            *("srun", str(ranks), sys.executable, *arguments),
        ],
        "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks), sys.executable, *arguments],
    }[launcher]


def contents(folder: Path) -> dict[str, bytes]:
    store = open_store(folder)
    return {name: bytes(store.read(name)) for name in store.list()}


def shards_by_rank(output: str) -> Counter[str]:
    return Counter(re.findall(r"shard \d+ by (\d+)", output))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All objects, by one process that nothing has broken off."""
    folder = tmp_path_factory.mktemp("whole")
    encode(images(), PixelCodec(6, 8, 1, size=8), open_store(folder), SHARD, flip=True)
    assert len(contents(folder)) == SHARDS + 2
    return contents(folder)


@pytest.mark.parametrize(
    ("launcher", "ranks", "then", "others"),
    [("python", 1, "torchrun", 3), ("torchrun", 3, "mpirun", 2), ("mpirun", 2, "srun", 2), ("srun", 2, "python", 1)],
)
def test_killed_and_gone_on_with_by_another_number(
    launcher: str, ranks: int, then: str, others: int, whole: dict[str, bytes], tmp_path: Path
) -> None:
    store = open_store(tmp_path / "data")
    slowly = command(launcher, ranks, tmp_path / "data", slow=ALL, seconds=0.05)
    for shards in (3, 15):
        with runs.started(slowly, tmp_path / "log", lambda so_far=shards: len(store.list("finished-")) >= so_far):
            pass
        assert not store.exists("index.json")
    kept = len(store.list("finished-"))
    done = runs.run(command(then, others, tmp_path / "data"))
    assert done.returncode == 0, done.stderr
    assert sum(shards_by_rank(done.stdout).values()) <= SHARDS - kept
    assert contents(tmp_path / "data") == whole


@pytest.mark.parametrize(("launcher", "ranks", "slow"), [("mpirun", 3, "1"), ("torchrun", 2, "0")])
def test_a_slow_rank_holds_nobody(
    launcher: str, ranks: int, slow: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    done = runs.run(command(launcher, ranks, tmp_path, slow=slow, seconds=1.0))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == whole
    by_rank = shards_by_rank(done.stdout)
    assert sum(by_rank.values()) == SHARDS and len(by_rank) == ranks
    assert by_rank[slow] < SHARDS // ranks // 2, by_rank
    assert "460/460" in done.stderr  # the bar of rank 0 counts for all


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_ranks_end_with_their_launcher(launcher: str, tmp_path: Path) -> None:
    store, slowly = open_store(tmp_path / "data"), command(launcher, 2, tmp_path / "data", slow=ALL, seconds=0.2)
    with runs.started(slowly, tmp_path / "log", lambda: len(store.list("finished-")) > 1) as process:
        process.send_signal(signal.SIGKILL)  # the launcher alone
        process.wait()
        time.sleep(0.5)
        finished = len(store.list("finished-"))
        time.sleep(1)
        assert len(store.list("finished-")) == finished < SHARDS


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_a_rank_that_fails_ends_all(launcher: str, tmp_path: Path) -> None:
    began = time.monotonic()
    done = runs.run(command(launcher, 3, tmp_path / "data", slow=FAILING))
    assert done.returncode != 0 and time.monotonic() - began < 60
    assert "error: rank 1: here is bad input" in done.stderr


def test_where_there_is_no_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"2 processes, but no MASTER_ADDR, .*: export MASTER_ADDR"), join():
        pass


def test_those_who_wait_for_a_lost_rank_give_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that has claimed a shard and then hangs, where no launcher sees it."""
    monkeypatch.setattr(workers, "PATIENCE_SECONDS", 0.5)
    counters = HashStore()
    first, second = (Counting(counters, rank, 2, rank) for rank in (0, 1))
    store = open_store(tmp_path)
    second.add(f"encoding {store}: claimed", 1)
    with pytest.raises(UserError, match=r"no process has done anything for .* run the command again"):
        encode(images(), PixelCodec(6, 8, 1, size=8), store, SHARD, workers=first)
    assert len(store.list("finished-")) == SHARDS // 2 - 1


def test_those_who_count_where_nobody_keeps_count_any_more_say_so() -> None:
    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    counting = Counting(TCPStore("127.0.0.1", kept.port, timeout=timedelta(seconds=5)), 1, 2, 1)
    assert counting.add("shard", 2) == 2
    del kept
    with pytest.raises(UserError, match="another process has ended, and the counters with it: run the command again"):
        counting.add("shard", 1)


def test_the_bar_counts_shards_where_nobody_knows_how_many_images_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Uncounted(ArrayImages):
        count = None

    encode(images(Uncounted), PixelCodec(6, 8, 1, size=8), open_store(tmp_path), 100)
    bar = capsys.readouterr().err
    assert "3/3" in bar and float(re.findall(r"([\d.]+) images/s", bar)[-1]) > 0
