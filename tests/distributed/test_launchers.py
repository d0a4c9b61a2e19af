"""What launchers make of ranks that disagree, end or do not come. That mpirun trains the same: test_survival.py."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import pytest
import runs

from diffussm.training.monitor import log_of

pytestmark = pytest.mark.distributed

WORKER = str(Path(__file__).parent / "launch_worker.py")


def command(launcher: str, *arguments: object) -> list[str]:
    """Two ranks of the worker."""
    worker, torchrun = [WORKER, *map(str, arguments)], str(Path(sys.executable).parent / "torchrun")
    return {
        "torchrun": [torchrun, "--nproc_per_node=2", f"--master_port={runs.free_port()}", *worker],
        "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, *worker],
    }[launcher]


@pytest.mark.parametrize(("launcher", "code"), [("torchrun", 1), ("mpirun", 2)])  # torchrun always ends with 1
def test_ranks_that_disagree_end_and_are_named(launcher: str, code: int) -> None:
    done = runs.run(command(launcher, "agree", 1))
    assert done.returncode == code, done.stderr
    told = f"rank 1 on {socket.gethostname()} has odd, the others have even: start every rank with the same command"
    assert f"error: the ranks do not agree on configuration: {told}" in done.stderr
    assert "agrees" not in done.stdout
    if launcher == "torchrun":
        assert "exitcode: 2" in done.stderr


@pytest.mark.parametrize(("code", "returned"), [(7, 7), (-signal.SIGKILL, 128 + signal.SIGKILL)])
def test_mpirun_ends_the_others_and_returns_a_ranks_code(code: int, returned: int) -> None:
    """Though MPI has ended in each: it only introduces them."""
    assert runs.run(command("mpirun", "end", code), timeout=90).returncode == returned


def test_a_rank_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(runs.free_port())
    launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (launch | {"DIFFUSSM_JOIN_MINUTES": "0.02"}).items():
        monkeypatch.setenv(name, value)
    done = runs.run([sys.executable, WORKER, "agree", "1"], timeout=90)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert f"rank 0 of 2 on {socket.gethostname()} could not meet the others at 127.0.0.1:{port}" in line
    assert "1/2 clients joined" in line


def test_the_local_script_saves_when_interrupted_and_goes_on(shades: Path, tmp_path: Path, monkeypatch) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    config = runs.write_config(tmp_path / "tiny.yaml", shades, train__checkpoint_images=10**6, train__total_images=1600)
    settings = {
        "DIFFUSSM_CONFIG": config,
        "DIFFUSSM_RUN": run,
        "DIFFUSSM_RANKS": 2,
        "DIFFUSSM_PYTHON": sys.executable,
        "DIFFUSSM_PREFLIGHT": 0,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    script = ["bash", str(runs.ROOT / "launch/local.sh")]
    done = runs.run(script)
    assert done.returncode == 2 and done.stderr.startswith("error: DIFFUSSM_DATA is not set: export DIFFUSSM_DATA=")
    monkeypatch.setenv("DIFFUSSM_DATA", str(shades / "train"))
    with runs.started(script, log, lambda: bool(log_of(run))) as process:
        process.send_signal(signal.SIGINT)  # to the script alone, which passes it on
        assert process.wait(timeout=60) == 75, log.read_text()
    assert "all is saved, the same command goes on" in log.read_text()
    done = runs.run([*script, "--train.total_images", str(log_of(run)[-1]["images"] + 16)])
    assert done.returncode == 0 and "going on at" in done.stderr, done.stderr
