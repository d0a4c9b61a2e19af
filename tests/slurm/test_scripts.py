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


def test_one_job_of_an_array_is_queued_again_without_the_others(cluster, plain_environment, tmp_path) -> None:
    """The last of an array has the array's own number, by which SLURM would take them all."""
    script, rank = tmp_path / "job.sh", tmp_path / "rank.sh"
    script.write_text(f'#!/bin/bash\nset -eu\ncd "$DIFFUSSM_ROOT"\n. launch/common.sh\nbegin\nattempts ranks {rank}\n')
    rank.write_text(
        f"trap 'exit 75' USR1\n[ ${{SLURM_RESTART_COUNT:-0}} = 0 ] || exit 0\ntouch {tmp_path}/$SLURM_ARRAY_TASK_ID\n"
        f"for ((i = 0; i < 300; i++)); do [ ! -e {tmp_path}/end ] || exit 0; sleep 0.1; done; exit 1\n"
    )
    environment = plain_environment | {"DIFFUSSM_PYTHON": "bash"}
    options = ["--array=0-1", "--mem=100M", "--requeue", "--output=%x-%j.out", "--open-mode=append"]
    array = cluster.submit(script, *options, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 20
    while not all((tmp_path / task).exists() for task in ("0", "1")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (last,) = [task for task in ("0", "1") if cluster.job(f"{array}_{task}")["JobId"] == array]
    cluster.on("ctl", "scancel", "--signal=USR1", "--batch", f"{array}_{last}")
    while cluster.job(f"{array}_{last}")["Restarts"] == "0":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (tmp_path / "end").touch()
    other = cluster.wait_ended(f"{array}_{1 - int(last)}", 20)
    assert (other["JobState"], other["Restarts"]) == ("COMPLETED", "0")
    ended = cluster.wait_ended(f"{array}_{last}", 60)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")


def test_an_array_with_gaps_is_refused(cluster, plain_environment, tmp_path) -> None:
    settings = {"DIFFUSSM_INPUT": "images", "DIFFUSSM_OUT": str(tmp_path)}
    job = cluster.submit(LAUNCH / "slurm_encode.sh", "--array=3,7,9", cwd=tmp_path, env=plain_environment | settings)
    for number in cluster.jobs_of(job):
        assert cluster.wait_ended(number, 20)["ExitCode"] == "2:0"
    logs = [path.read_text() for path in tmp_path.glob("*.out")]
    assert len(logs) == 3 and all("error: an array with gaps" in log for log in logs)


def test_ranks_start_in_a_container_where_one_is_named(cluster, plain_environment, tmp_path) -> None:
    """With a stand-in for srun: this SLURM has no pyxis."""
    srun, setup = tmp_path / "bin/srun", tmp_path / "setup.sh"
    srun.parent.mkdir()
    srun.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" "$SRUN_CPUS_PER_TASK" "$DIFFUSSM_HOSTS" >>{tmp_path}/arguments\n'
    )
    srun.chmod(0o755)
    setup.write_text(f'export PATH={srun.parent}:"$PATH" UNSET="$NEVER_SET"\n')
    settings = {
        "DIFFUSSM_DATA": "s3://bucket/data", "DIFFUSSM_RUN": str(tmp_path / "run"), "DIFFUSSM_SETUP": str(setup),
        "DIFFUSSM_CONTAINER": "/images/a.sqsh", "DIFFUSSM_MOUNTS": "/data:/data", "DIFFUSSM_SRUN": "--mpi=none --quiet",
        "DIFFUSSM_ZERO": "3_offload", "DIFFUSSM_CACHE": "/local", "DIFFUSSM_CHECKPOINTS": "s3://bucket/run",
    }  # fmt: skip
    environment = {name: value for name, value in plain_environment.items() if name != "DIFFUSSM_PYTHON"} | settings
    size = ["--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=4"]
    script = LAUNCH / "slurm_xl256.sh"
    job = cluster.submit(script, *size, arguments=["--train.lr", "2e-4"], cwd=tmp_path, env=environment)
    assert cluster.wait_ended(job, 20)["JobState"] == "COMPLETED"
    mounts = f"{runs.ROOT}:{runs.ROOT},{tmp_path}/run:{tmp_path}/run,/data:/data"
    options = ["--label", "--kill-on-bad-exit=1", "--container-image=/images/a.sqsh"]
    options += [f"--container-workdir={runs.ROOT}", f"--container-mounts={mounts}", "--mpi=none", "--quiet", "python3"]
    training = ["--deepspeed", "ds_configs/zero3_offload.json", "--config", "xl256", "--data.path", "s3://bucket/data"]
    training += ["--run_dir", f"{tmp_path}/run", "--train.checkpoints", "s3://bucket/run", "--data.cache", "/local"]
    training += ["--train.lr", "2e-4", "4", "n1", "n2"]
    expected = [*options, "tools/preflight.py", *training, *options, "diffussm/train.py", *training]
    assert (tmp_path / "arguments").read_text().split("\n")[:-1] == expected
