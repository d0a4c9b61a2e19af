"""Which rank this process is, and on which device: the one place that asks the launcher.

deepspeed, torchrun   RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
srun                  SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID; the first host of the step is the master
mpirun                MPI introduces the processes to each other, and ends there
none                  one process

SLURM starts a job anew on other nodes when one does not answer. That one may only be cut off, and its ranks live on:
:class:`Attempt` tells which of two launches replaces the other.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from diffussm.errors import UserError, needs

Result = TypeVar("Result")
PMI = {"PMIX_RANK": "SLURM_PROCID", "PMI_SIZE": "SLURM_STEP_NUM_TASKS"}  # srun may set it, and then says the same
PORTS = range(20_000, 30_000)  # of which a SLURM job's master takes one
JOIN_NAME, JOIN_MINUTES = "DIFFUSSM_JOIN_MINUTES", 10.0
PATIENCE = timedelta(days=1)  # of collectives: how long a rank may wait for others is the watchdog's to say


@dataclass(frozen=True)
class Attempt:
    """One of the times that SLURM has started a job, "job 4711, attempt 2"; outside of SLURM, none: ""."""

    job: str = ""
    number: int = 0

    @classmethod
    def here(cls) -> Attempt:
        """This process's."""
        job = os.environ.get("SLURM_JOB_ID", "")
        return cls(job, int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1) if job else cls()

    @classmethod
    def in_text(cls, text: str) -> Attempt:
        """That which is named in a text."""
        found = re.search(r"job (\d+), attempt (\d+)", text)
        return cls(found[1], int(found[2])) if found else cls()

    def replaces(self, other: Attempt) -> bool:
        """Whether this is a later attempt of the same job."""
        return self.job != "" and self.job == other.job and self.number > other.number

    def __str__(self) -> str:
        return f"job {self.job}, attempt {self.number}" if self.job else ""


@dataclass(frozen=True)
class Identity:
    """Who this process is among those of a launch, by ``launcher``'s word. Alone it needs no master."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master: tuple[str, int] = ("127.0.0.1", 0)

    def export(self) -> None:
        """Have the environment say so, as torch and DeepSpeed read it."""
        address, port = self.master
        os.environ |= {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }


def identify() -> Identity:
    """Ask the launcher, and export the answer. Under mpirun all processes call it together.

    Raises:
        UserError: it does not say all, or the announced processes would each train alone.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        found = _by_environment()
    elif "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ and not _under_mpi():
        found = _by_slurm()
    elif _under_mpi():
        found = _by_mpi()
    else:
        found = Identity("none")
    announced = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_STEP_ID", "batch").isdigit():  # inside srun
        announced = max(announced, int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")))
    if found.world_size == 1 < announced:
        raise UserError(
            f"the launcher has started {announced} processes, but each would be alone: RANK and WORLD_SIZE are set to "
            "one process; unset them, or start with torchrun, deepspeed, srun or mpirun alone"
        )
    found.export()
    return found


def _by_environment() -> Identity:
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if os.environ["WORLD_SIZE"] != "1" else ():
        if name not in os.environ:
            raise UserError(
                f"the launcher set RANK but not {name}: start with deepspeed or torchrun, or export it "
                "(MASTER_ADDR=the first host, MASTER_PORT=29500)"
            )
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ
    if launched:  # torchrun's child, or deepspeed's
        end_with_the_launcher()
    number = {name: int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return Identity(
        "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "deepspeed" if launched else "the environment",
        number["RANK"],
        number["WORLD_SIZE"],
        number["LOCAL_RANK"],
        (os.environ.get("MASTER_ADDR", "127.0.0.1"), number["MASTER_PORT"]),
    )


def _by_slurm() -> Identity:
    size = int(os.environ["SLURM_STEP_NUM_TASKS"])
    if size == 1:
        return Identity("srun")
    address = os.environ.get("MASTER_ADDR") or next(iter(hosts_of_step()), None)
    if address is None:
        raise UserError(
            f"{size} processes, but no MASTER_ADDR, and scontrol does not tell the first of "
            f"{os.environ.get('SLURM_STEP_NODELIST', '')!r}: export MASTER_ADDR=the first host"
        )
    port = os.environ.get("MASTER_PORT") or PORTS[int(os.environ.get("SLURM_JOB_ID", "0")) % len(PORTS)]
    local_rank = int(os.environ.get("SLURM_LOCALID", "0"))
    return Identity("srun", int(os.environ["SLURM_PROCID"]), size, local_rank, (address, int(port)))


def _under_mpi() -> bool:
    said = os.environ.keys() & PMI.keys()
    return "OMPI_COMM_WORLD_SIZE" in os.environ or any(os.environ[name] != os.environ.get(PMI[name]) for name in said)


def _by_mpi() -> Identity:
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"mpirun has started this process, but mpi4py does not work here ({error}): pip install 'diffussm[mpi]', "
            f"and install the MPI that mpirun is of"
        ) from error
    MPI.Init()
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    local_rank = world.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()
    host = "127.0.0.1" if world.allreduce(local_rank, MPI.MAX) == size - 1 else socket.gethostname()
    master = world.bcast((os.environ.get("MASTER_ADDR", host), int(os.environ.get("MASTER_PORT", 0)) or _free_port()))
    MPI.Finalize()
    end_with_the_launcher()
    return Identity("mpirun", rank, size, local_rank, master)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def end_with_the_launcher() -> None:
    """Have the system end this process when its launcher is killed: a rank left over would go on writing."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def choose_device(local_rank: int) -> torch.device:
    """This process's GPU, which "cuda" then means, by its number on this host; the CPU where there is none.

    Of one that it sees, that one: SLURM gives each task its own by --gpus-per-task. Processes that only share work may
    share a GPU; that no two ranks of training do is seen when they compare (:mod:`diffussm.training.handshake`).
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def choose_interface(identity: Identity) -> str:
    """Have gloo use the interface by which the other hosts are reached, where the host's own name means loopback.

    Elsewhere gloo's own choice, the address of the host's name, is right; and NCCL needs no name. Returns what is said.
    """
    if identity.world_size > 1 and "GLOO_SOCKET_IFNAME" not in os.environ and _is_loopback(socket.gethostname()):
        for host in (identity.master[0], *hosts_of_step()):
            if not _is_loopback(host) and (name := _interface_towards(host)):
                os.environ["GLOO_SOCKET_IFNAME"] = name
                break
    chosen = {name: os.environ.get(f"{name}_SOCKET_IFNAME", "its own choice") for name in ("GLOO", "NCCL")}
    return ", ".join(f"{name} over {interface}" for name, interface in chosen.items())


def _is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


def _interface_towards(host: str) -> str | None:
    """The interface whose address this host shows to another one."""
    with needs("choosing the network's interface", "train"):
        import psutil
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
    names = (name for name, all in psutil.net_if_addrs().items() if any(one.address == own for one in all))
    return next(names, None)


def join_minutes() -> float:
    """How long ranks wait for each other at the start."""
    return float(os.environ.get(JOIN_NAME, JOIN_MINUTES))


def hosts_of_step() -> list[str]:
    """The hosts of this SLURM step, or of its job, in their order; [] outside of SLURM, or where it does not say.

    In a container there may be no scontrol: launch/common.sh has asked before, for the job.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return []
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("DIFFUSSM_HOSTS", "").split()


@dataclass(frozen=True)
class Cluster:
    """This process among the others.

    Attributes:
        rank: 0..world_size - 1.
        world_size: number of processes.
        local_rank: its number on this host, which picks the device; never the global rank.
        device: where it computes.
        host: name of the machine.
        control: group for small messages, on the CPU.
        saving: likewise, for threads that save.
        network: the interfaces that ranks talk over, in words.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    host: str
    control: dist.ProcessGroup
    saving: dist.ProcessGroup
    network: str = ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier(self.control)

    def from_main(self, function: Callable[[], Result]) -> Result:
        """What ``function`` returns on rank 0, on every rank; a UserError that it raises there, likewise."""
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, group=self.control)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]


def connect(identity: Identity | None = None) -> Cluster:
    """Join the group of all ranks, as who this process is by :func:`identify`.

    Raises:
        UserError: the others do not come within DIFFUSSM_JOIN_MINUTES (10).
    """
    identity = identity or identify()
    with needs("training", "train"):
        import deepspeed  # slow to import: bad arguments are reported before it
        from deepspeed.utils import logger

    logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names that DeepSpeed uses
    device = choose_device(identity.local_rank)
    if device.type == "cpu":
        # Its own sums over shared memory are for inference alone, and take a compiler 100 s; a kill then leaves locks.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    network = choose_interface(identity)
    minutes = join_minutes()
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timedelta(minutes=minutes))
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        saving = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (dist.DistError, RuntimeError, ValueError) as error:
        address, port = identity.master
        raise UserError(
            f"rank {identity.rank} of {identity.world_size} on {socket.gethostname()} could not meet the others at "
            f"{address}:{port} within {minutes:g} min ({JOIN_NAME}): look for ranks that have not started: "
            f"{str(error).splitlines()[0]}"
        ) from error
    dist.distributed_c10d._set_pg_timeout(PATIENCE)
    if (joined := dist.get_world_size()) != identity.world_size:
        raise UserError(f"joined a group of {joined} ranks where the launcher announced {identity.world_size}")
    host = socket.gethostname()
    return Cluster(identity.rank, identity.world_size, identity.local_rank, device, host, control, saving, network)
