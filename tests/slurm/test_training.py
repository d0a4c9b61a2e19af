"""The script of the 512 px run on two nodes that are asked to stop, lose power, or lose their network."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import runs
from slurm.cluster import Cluster
from slurm.conftest import LONG

from diffussm.data.store import open_store
from diffussm.training import checkpoint
from diffussm.training.monitor import log_of

pytestmark = pytest.mark.slurm

SCRIPT = runs.ROOT / "launch/slurm_xl512.sh"
EXACT = ("images", "loss/total", "loss/mse", "loss/vlb", "grad_norm", "lr/dense", "lr/ssm")
ENDLESS = LONG | {"train__total_images": 10**6}
SMALL = ["--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=6", "--mem=1G", "--time=10"]
TWO = ["--nodes=2", *SMALL]


def seen(run: Path) -> int:
    return max((record["images"] for record in log_of(run)), default=0)


def curve(run: Path) -> list[tuple]:
    return [tuple(record[key] for key in EXACT) for record in log_of(run)]


class Job:
    """Training by the script: its number, its run and its log."""

    def __init__(self, cluster: Cluster, folder: Path, environment: dict[str, str], *options: str) -> None:
        self.cluster, self.run = cluster, folder / "run"
        settings = {"DIFFUSSM_RUN": str(self.run), "DIFFUSSM_PREFLIGHT": "0"} | environment
        self.number = cluster.submit(SCRIPT, *options, cwd=folder, env=settings)
        self._log = folder / f"diffussm-xl512-{self.number}.out"

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def wait(self, holds: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def wait_seen(self, images: int, seconds: float = 60) -> None:
        self.wait(lambda: seen(self.run) >= images, seconds)

    def complete(self, seconds: float = 120) -> dict[str, str]:
        ended = self.cluster.wait_ended(self.number, seconds)
        assert ended["JobState"] == "COMPLETED", self.log
        return ended


@pytest.fixture
def submit(cluster: Cluster, plain_environment, shades: Path, tmp_path: Path):
    def submit(*options: str, overrides: dict = LONG, **settings: str) -> Job:
        config = runs.write_config(tmp_path / "tiny.yaml", shades, **overrides)
        tiny = {"DIFFUSSM_DATA": str(shades / "train"), "DIFFUSSM_CONFIG": str(config)}
        return Job(cluster, tmp_path, plain_environment | tiny | settings, *options)

    return submit


def test_asked_to_stop_it_queues_itself_and_goes_on_bit_for_bit(cluster: Cluster, submit, whole: Path) -> None:
    """By USR1 to the batch shell, as --signal=B:USR1@300 sends it; twice, as a user and the limit may. Later a rank
    dies, and all start again on the same nodes.
    """
    job = submit(*TWO)
    job.wait_seen(240)
    for _ in range(2):
        cluster.on("ctl", "scancel", "--signal=USR1", "--batch", job.number)
    job.wait(lambda: "going on at " in job.log)
    assert job.log.count("stopped at ") == 1 and "stopped by USR1 with exit code 75: queued again" in job.log
    assert f"job {job.number}, attempt 2: 2 nodes" in job.log
    job.wait_seen(seen(job.run) + 80)
    host = cluster.on("ctl", "scontrol", "show", "hostnames", cluster.job(job.number)["NodeList"]).split()[1]
    ranks(cluster, host)[0].kill()
    ended = job.complete()
    assert (ended["Restarts"], ended["ExitCode"]) == ("1", "0:0")
    assert re.search(r"failed with exit code 1\d\d: trying again on the same nodes \(1 of 3\)", job.log), job.log
    assert curve(job.run) == curve(whole)


def test_slurms_own_signal_before_the_limit_queues_it_again(cluster: Cluster, submit) -> None:
    """By the script's own line. It comes with SLURM's next look at its limits, in half a minute at most."""
    job = submit("--time=1", "--signal=B:USR1@55", *TWO[:-1], overrides=ENDLESS)
    job.wait(lambda: "stopped by USR1 with exit code" in job.log and "queued again" in job.log)
    job.wait(lambda: cluster.job(job.number)["Restarts"] == "1")
    assert not [line for line in job.log.splitlines() if line.startswith("error:")]


def test_a_cancelled_job_saves_and_is_not_queued_again(cluster: Cluster, submit) -> None:
    job = submit(*TWO, overrides=ENDLESS)
    job.wait_seen(80)
    cluster.on("ctl", "scancel", job.number)
    assert cluster.wait_ended(job.number, 30)["JobState"] == "CANCELLED"
    job.wait(lambda: "all is saved" in job.log)
    assert cluster.job(job.number)["Restarts"] == "0"


def test_a_node_that_loses_power_is_replaced(cluster: Cluster, submit, whole) -> None:
    job = submit(*TWO)
    job.wait_seen(240)
    assert cluster.job(job.number)["NodeList"] == "n[1-2]"
    cluster.power_off("n2")
    ended = job.complete()
    assert ended["Restarts"] == "1"
    assert "n2" not in cluster.on("ctl", "scontrol", "show", "hostnames", ended["NodeList"]).split()
    assert curve(job.run) == curve(whole)


def test_ranks_that_were_cut_off_write_no_more(cluster: Cluster, submit, whole) -> None:
    """Both on one node, so that nothing there is missing. They sleep, are replaced, and wake up beside the others."""
    job = submit("--nodes=1", "--gpus-per-node=2", "--ntasks-per-node=2", *SMALL[2:])
    job.wait_seen(240)
    cluster.cut("n1")
    old = ranks(cluster, "n1")
    for rank in old:
        rank.suspend()
    before = seen(job.run)
    job.wait(lambda: "going on at " in job.log)
    job.wait_seen(before + 80)
    for rank in old:
        rank.resume()
    assert job.complete()["Restarts"] == "1"
    job.wait(lambda: "error: another process has begun to save into" in job.log)
    assert "trying again" not in job.log
    assert curve(job.run) == curve(whole)
    _, gone = psutil.wait_procs(old, timeout=30)
    assert not gone
    for found in checkpoint.complete(open_store(job.run / "checkpoints")):
        found.verify()


def ranks(cluster: Cluster, host: str) -> list[psutil.Process]:
    """The training processes on a host."""
    found = []
    for process in cluster.processes(host):
        with contextlib.suppress(psutil.Error):
            if "diffussm/train.py" in process.cmdline()[1:2]:
                found.append(process)
    return found


def test_hosts_whose_names_mean_loopback_find_each_other(cluster: Cluster, plain_environment, tmp_path: Path) -> None:
    """As Debian writes /etc/hosts: gloo would tell the other hosts 127.0.1.1."""
    hosts = (cluster.folder / "hosts").read_text()
    for host in ("n1", "n2"):
        (tmp_path / host).write_text(f"127.0.1.1 {host}\n{hosts}")
        cluster.on(host, "mount", "--bind", str(tmp_path / host), "/etc/hosts")
    try:
        code = "from diffussm.training.cluster import connect; c = connect(); c.barrier(); print(c.rank, c.network)"
        python = plain_environment["DIFFUSSM_PYTHON"]
        job = ["srun", "--nodes=2", "--ntasks=2", "--cpus-per-task=2", python, "-c", code]
        told = cluster.on("ctl", *job, cwd=tmp_path, env=plain_environment)
    finally:
        for host in ("n1", "n2"):
            cluster.on(host, "umount", "/etc/hosts")
    lines = sorted(line for line in told.splitlines() if "GLOO" in line)
    assert lines == [f"{rank} GLOO over eth0, NCCL over its own choice" for rank in (0, 1)]
