"""Who a process is, by whatever its launcher has said."""

import os
import sys
from dataclasses import replace

import pytest

from diffussm.errors import UserError
from diffussm.training import cluster
from diffussm.training.cluster import Attempt, Identity, choose_device, identify

pytestmark = pytest.mark.unit


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"} | MASTER
STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
BATCH_SHELL = {"SLURM_JOB_ID": "123456", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_NODEID": "0"}


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Sets just these variables, and has an scontrol that knows two hosts."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI")) or name in (*NAMES, "TORCHELASTIC_RUN_ID", "CROSS_RANK"):
            monkeypatch.delenv(name)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(cluster, "end_with_the_launcher", lambda: None)
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what identify() exports is undone
        monkeypatch.delenv(name)

    def use(*tables: dict[str, str]) -> None:
        for table in tables:
            for name, value in table.items():
                monkeypatch.setenv(name, value)

    return use


@pytest.mark.parametrize(
    ("tables", "found"),
    [
        ([], Identity("none")),
        ([TORCHRUN, {"TORCHELASTIC_RUN_ID": "x"}], Identity("torchrun", 5, 8, 1, ("10.0.0.1", 29500))),
        ([TORCHRUN, {"CROSS_RANK": "0"}], Identity("deepspeed", 5, 8, 1, ("10.0.0.1", 29500))),
        ([STEP], Identity("srun", 9, 16, 1, ("gpu07", 20_000 + 123456 % 10_000))),
        ([STEP, MASTER], Identity("srun", 9, 16, 1, ("10.0.0.1", 29500))),
        ([STEP, {"PMIX_RANK": "9"}], Identity("srun", 9, 16, 1, ("gpu07", 23456))),  # srun --mpi=pmix: no MPI is needed
        ([STEP, {"PMI_RANK": "9", "PMI_SIZE": "16"}], Identity("srun", 9, 16, 1, ("gpu07", 23456))),
        ([STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}], Identity("srun")),
        ([BATCH_SHELL], Identity("none")),  # python in a batch script
        ([BATCH_SHELL, TORCHRUN], Identity("the environment", 5, 8, 1, ("10.0.0.1", 29500))),
    ],
)
def test_who_this_process_is(environment, tables, found):
    environment(*tables)
    assert identify() == found
    exported = {name: os.environ[name] for name in NAMES}
    assert exported == {
        "RANK": str(found.rank),
        "WORLD_SIZE": str(found.world_size),
        "LOCAL_RANK": str(found.local_rank),
        "MASTER_ADDR": found.master[0],
        "MASTER_PORT": str(found.master[1]),
    }
    assert identify() == replace(found, launcher=identify().launcher)  # whoever asks again hears the same


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        ([STEP, {"RANK": "0", "WORLD_SIZE": "1"}], "has started 16 processes, but each would be alone"),
        ([{"OMPI_COMM_WORLD_SIZE": "2", "RANK": "0", "WORLD_SIZE": "1"}], "has started 2 processes"),
        ([{"RANK": "1", "WORLD_SIZE": "2"}], "RANK but not LOCAL_RANK"),
        ([STEP | {"SLURM_STEP_NODELIST": "unknown"}], "scontrol does not tell the first of 'unknown'"),
    ],
)
def test_a_launch_that_cannot_be_right_is_refused(environment, tables, line):
    environment(*tables)
    with pytest.raises(UserError, match=line):
        identify()


@pytest.mark.parametrize(
    "tables",
    [
        [{"OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "3"}],
        [{"PMI_SIZE": "4", "PMI_RANK": "3"}],
        # which starts a daemon a host by srun
        [STEP | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, {"OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1"}],
        [STEP | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, {"PMI_SIZE": "4", "PMI_RANK": "3"}],
    ],
)
def test_mpirun_is_asked_where_it_is_the_launcher(environment, monkeypatch, tables):
    environment(*tables)
    found = Identity("mpirun", 3, 4, 1, ("10.0.0.1", 29500))
    monkeypatch.setattr(cluster, "_by_mpi", lambda: found)
    assert identify() == found


def test_mpirun_without_mpi4py_is_refused(environment, monkeypatch):
    environment({"OMPI_COMM_WORLD_SIZE": "2"})
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"mpi4py does not work here .*: pip install 'diffussm\[mpi\]'"):
        identify()


@pytest.mark.parametrize(
    ("local_rank", "visible", "index"),
    [(0, 8, 0), (7, 8, 7), (0, 1, 0), (5, 1, 0)],  # the last as by --gpus-per-task=1: each task sees its own alone
)
def test_the_device_goes_by_the_number_on_the_host(monkeypatch, local_rank, visible, index):
    taken = []
    monkeypatch.setattr(cluster.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cluster.torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(cluster.torch.cuda, "set_device", taken.append)
    assert choose_device(local_rank) == taken[0] == cluster.torch.device("cuda", index)


def test_which_attempt_replaces_which(environment):
    environment({"SLURM_JOB_ID": "7"})
    first = Attempt.here()
    environment({"SLURM_RESTART_COUNT": "10"})
    eleventh = Attempt.here()
    assert (str(first), str(eleventh)) == ("job 7, attempt 1", "job 7, attempt 11")
    assert eleventh.replaces(first) and not first.replaces(eleventh) and not first.replaces(first)
    assert Attempt.in_text(f"process 12 on n1 ({eleventh})") == eleventh
    for other in (Attempt("77", 3), Attempt(), Attempt.in_text("process 12 on n1")):
        assert not eleventh.replaces(other) and not other.replaces(eleventh)
    environment({"SLURM_JOB_ID": ""})
    assert Attempt.here() == Attempt() and str(Attempt.here()) == ""
