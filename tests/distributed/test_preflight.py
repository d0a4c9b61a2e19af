"""tools/preflight.py by real ranks: all well, none there, stopped, and what a single one is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import runs

from diffussm.commands.preflight import main

pytestmark = pytest.mark.distributed

TOOL = str(runs.ROOT / "tools/preflight.py")
# rank 1 stops and rank 2 kills itself where the data is read
STRICKEN = """
import os, signal, sys
from diffussm.commands.preflight import main
from diffussm.errors import run_command
from diffussm.training import preflight
def strike(*arguments):
    os.kill(os.getpid(), signal.SIGSTOP if os.environ["RANK"] == "1" else signal.SIGKILL)
if os.environ["RANK"] != "0":
    preflight.measure_reading = strike
run_command(main)
"""


def arguments(data: Path, run: Path, *more: object) -> list[str]:
    return [*runs.arguments(data, run), *map(str, more)]


@contextmanager
def ranks(command: list[str], size: int, started: list[int], **environment: str) -> Iterator[list[subprocess.Popen]]:
    """Some of the ranks of a launch, each on a node of its own by SLURM's word; killed at the end."""
    launch = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(runs.free_port())}
    with ExitStack() as stack:
        processes = []
        for rank in started:
            own = {"RANK": str(rank), "LOCAL_RANK": "0", "SLURMD_NODENAME": f"n{rank}"}
            process = subprocess.Popen(
                [sys.executable, *command], env=runs.environment() | launch | own | environment, text=True,
                start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            stack.callback(runs.kill, process)
            processes.append(process)
        yield processes


def error_of(stderr: str) -> str:
    (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    return line


def test_two_ranks_of_torchrun(shades: Path, tmp_path: Path) -> None:
    torchrun = [
        str(Path(sys.executable).parent / "torchrun"),
        "--nproc_per_node=2",
        f"--master_port={runs.free_port()}",
    ]
    json_file = tmp_path / "told.json"
    done = runs.run([*torchrun, TOOL, *arguments(shades, tmp_path / "runs/a", "--json", json_file)], timeout=120)
    assert done.returncode == 0, done.stderr
    head, row, _, *lines = done.stdout.splitlines()
    assert re.split(r"  +", head)[:3] == ["node", "ranks", "devices"] and "0-1    2× cpu" in row and "verdict" in head
    assert lines[0].startswith("all-reduce  of 2 ranks: exact, ")
    told = json.loads(json_file.read_text())
    (node,) = told["nodes"]
    assert told["ok"] and told["exclude"] == [] and node["ranks"] == [0, 1]
    assert told["all_reduce"]["correct"] and told["all_reduce"]["bytes_per_second"] > 1e6
    assert node["flops"] > 1e8 and node["data_bytes_per_second"] > 1e3 and node["free_bytes"] > 0
    assert 0 < told["memory"]["peak"] < told["memory"]["limit"]
    assert list(tmp_path.iterdir()) == [json_file]  # no folder of the run


def test_a_link_between_nodes(shades: Path, tmp_path: Path) -> None:
    command = [TOOL, *arguments(shades, tmp_path / "run", "--json", "-", "--train.global_batch=12")]
    with ranks(command, 3, [0, 1, 2]) as processes:
        out, errors = processes[0].communicate(timeout=120)
        assert [process.wait(20) for process in processes] == [0, 0, 0], errors
    told = json.loads(out)
    assert [node["node"] for node in told["nodes"]] == ["n0", "n1", "n2"]
    assert all(node["link_bytes_per_second"] > 1e6 and abs(node["clock_seconds"]) < 1 for node in told["nodes"])


def test_a_rank_that_never_comes(shades: Path, tmp_path: Path) -> None:
    command = [TOOL, *arguments(shades, tmp_path / "run", "--timeout", 1)]
    with ranks(command, 2, [0], LOCAL_WORLD_SIZE="2") as (process,):
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error_of(errors).startswith("error: preflight: n0: 1 of 2 ranks came within 1 s, not rank 1; leave it out")
    assert "1 of 2 ranks came" in out.splitlines()[1]


def test_ranks_that_stop_or_die(shades: Path, tmp_path: Path) -> None:
    command = ["-c", STRICKEN, *arguments(shades, tmp_path / "run", "--train.global_batch=12", "--timeout", 2)]
    with ranks(command, 3, [0, 1, 2]) as processes:
        _, errors = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 2
    gone = "; ".join(f"n{rank}: rank {rank} gave no sign for 2 s in the check of data" for rank in (1, 2))
    assert error_of(errors) == f"error: preflight: {gone}; leave them out: sbatch --exclude=n1,n2"


@pytest.fixture
def alone(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command as a process of its own would: its exit code, stdout and stderr."""

    def run(*given: object) -> tuple[int, str, str]:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DIFFUSSM_S3_DEADLINE"):
            monkeypatch.setenv(name, "")  # so that it is restored
            monkeypatch.delenv(name)
        monkeypatch.setenv("SLURMD_NODENAME", "n0")
        return call(main, *given)

    return run


def test_alone(alone: Callable[..., tuple[int, str, str]], shades: Path, tmp_path: Path) -> None:
    code, out, errors = alone(*arguments(shades, tmp_path / "run"))
    assert code == 0, errors
    assert "all-reduce" not in out and out.splitlines()[1].endswith("ok") and list(tmp_path.iterdir()) == []


def test_data_that_is_not_there(alone: Callable[..., tuple[int, str, str]], shades: Path, tmp_path: Path) -> None:
    code, out, errors = alone(*arguments(shades, tmp_path / "run", "--data.path", tmp_path / "none"))
    assert code == 2 and "--exclude" not in errors
    assert errors.startswith(f"error: preflight: data: no index.json in {tmp_path}/none") and errors.count("\n") == 1
    assert "problem     data: no index.json" in out
    code, out, errors = alone("--config", "fashion32", "--data.path", tmp_path / "none/train")
    assert code == 0 and "not encoded yet: training does it (fashion-mnist)" in out, errors
    assert not os.path.exists(tmp_path / "none")


def test_a_run_dir_where_nobody_can_write(
    alone: Callable[..., tuple[int, str, str]], shades: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    code, _, errors = alone(*arguments(shades, tmp_path / "file" / "run"))
    assert code == 2
    assert errors.startswith(f"error: preflight: checkpoints: cannot write into {tmp_path}/file: Not a directory")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--data.pth", "x"], "unknown config key data.pth: did you mean data.path?"),
        (["--timeout", "0"], "--timeout 0 must be in 1..3600 seconds"),
        (["--deepspeed", "none.json"], "--deepspeed none.json: No such file"),
        (["--config", "none"], "--config 'none' is neither a file nor one of"),
    ],
)
def test_bad_arguments_are_one_line(alone: Callable[..., tuple[int, str, str]], given: list[str], line: str) -> None:
    code, out, errors = alone(*given)
    assert code == 2 and out == "" and errors.startswith(f"error: {line}") and errors.count("\n") == 1
