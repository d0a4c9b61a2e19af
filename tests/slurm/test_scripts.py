"""The scripts of launch/ as text and as sbatch reads them, and what they say at once where a setting is missing."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
from slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

LAUNCH = runs.ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("slurm_*.sh"))
NEEDED = {"slurm_encode.sh": ["DIFFUSSM_INPUT", "DIFFUSSM_OUT"], "slurm_eval.sh": ["DIFFUSSM_RUN"]}


def needed(script: Path) -> list[str]:
    return NEEDED.get(script.name, ["DIFFUSSM_DATA", "DIFFUSSM_RUN"])


def test_shellcheck_has_nothing_to_say() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    scripts = sorted(
        str(path.relative_to(runs.ROOT)) for path in [*LAUNCH.glob("*.sh"), *Path(__file__).parent.glob("*.sh")]
    )
    assert len(scripts) >= 10
    done = subprocess.run([shellcheck, "--external-sources", *scripts], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.stdout == ""


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_line_for_sbatch_is_explained_and_taken(cluster: Cluster, plain_environment, script: Path) -> None:
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert len(lines) >= 10
    assert not [line for line in lines if not re.search(r"\S  +# \w", line)]
    tested = cluster.try_on("ctl", "sbatch", "--test-only", str(script), env=plain_environment)
    assert tested.returncode == 0 and " to start at " in tested.stderr, tested.stderr
    nodes = 8 if "--nodes=8" in script.read_text() else 1
    assert f"using {nodes * 64} processors on nodes n" in tested.stderr
    ours = ["--account=lab", "--partition=main", "--nodes=2", "--time=60"]  # flags win over the script's own lines
    tested = cluster.try_on("ctl", "sbatch", "--test-only", *ours, str(script), env=plain_environment)
    assert "using 128 processors on nodes n[1-2]" in tested.stderr, tested.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_missing_setting_ends_the_job_at_once_with_the_line_to_type(
    cluster: Cluster, plain_environment, tmp_path: Path, script: Path
) -> None:
    settings: dict[str, str] = {}
    for name in needed(script):
        began = time.monotonic()
        job = cluster.submit(script, cwd=tmp_path, env=plain_environment | settings)
        ended = cluster.wait_ended(job, 20)
        assert time.monotonic() - began < 10
        assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
        assert int(ended["RunTime"][-2:]) <= 1
        log = next(tmp_path.glob(f"*-{job}.out")).read_text()
        (line,) = [line for line in log.splitlines() if line.startswith("error:")]
        assert f"{name} is not set: export {name}=" in line and "submit again" in line
        settings[name] = str(tmp_path)


def test_sbatch_from_elsewhere_is_told_to_name_the_project(cluster: Cluster, plain_environment, tmp_path: Path) -> None:
    environment = {name: value for name, value in plain_environment.items() if name != "DIFFUSSM_ROOT"}
    job = cluster.submit(LAUNCH / "slurm_xl512.sh", cwd=tmp_path, env=environment)
    assert cluster.wait_ended(job, 20)["ExitCode"] == "2:0"
    log = (tmp_path / f"diffussm-xl512-{job}.out").read_text()
    assert (
        log == f"error: {tmp_path} is not the project's folder: call sbatch there, or export DIFFUSSM_ROOT=its path\n"
    )


@pytest.mark.parametrize(
    ("settings", "options", "line"),
    [
        ({"DIFFUSSM_ZERO": "7"}, [], "DIFFUSSM_ZERO=7 is none of 1, 2, 3, 3_offload, nor a file"),
        ({"DIFFUSSM_SETUP": "/nowhere.sh"}, [], "DIFFUSSM_SETUP=/nowhere.sh cannot be read"),
        ({"DIFFUSSM_RUN": "/proc/runs"}, [], "DIFFUSSM_RUN=/proc/runs cannot be made"),
        ({}, ["--gpus-per-node=4"], "give sbatch --gpus-per-node=4 --ntasks-per-node=4"),
    ],
)
def test_what_cannot_be_is_one_line(cluster, plain_environment, tmp_path, settings, options, line) -> None:
    environment = plain_environment | {"DIFFUSSM_DATA": "data", "DIFFUSSM_RUN": str(tmp_path / "run")} | settings
    job = cluster.submit(LAUNCH / "slurm_xl512.sh", *options, cwd=tmp_path, env=environment)
    assert cluster.wait_ended(job, 20)["ExitCode"] == "2:0"
    (told,) = [
        text for text in (tmp_path / f"diffussm-xl512-{job}.out").read_text().splitlines() if text.startswith("error:")
    ]
    assert line in told
