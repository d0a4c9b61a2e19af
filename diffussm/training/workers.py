"""The processes that a launcher started on work that is shared by counting, such as encoding: no gradients, no groups.

MPI, where mpirun is the launcher, only introduces the processes to each other, and ends there: whichever fails after
that, mpirun ends the others.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

from torch.distributed import Store, TCPStore, rendezvous

from diffussm.data.workers import Alone, Workers
from diffussm.errors import UserError
from diffussm.training.cluster import end_with_the_launcher

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # rank, number of processes, rank on this machine
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
MPI_SIGNS = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE")  # any one
MEETING = timedelta(minutes=5)
FAREWELL_SECONDS = 60


class Counting:
    """This process among those that count in one store, which rank 0 or the launcher keeps."""

    def __init__(self, store: Store, rank: int, size: int, local_rank: int) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = store

    def add(self, counter: str, amount: int) -> int:
        try:
            return self._store.add(counter, amount)
        except RuntimeError as error:
            raise UserError("another process has ended, and the counters with it: run the command again") from error

    def leave(self) -> None:
        """Return once all have come here: the one that keeps the counters stays until then."""
        left, since = self.add("left", 1), time.monotonic()
        while self.rank == 0 and left < self.size and time.monotonic() - since < FAREWELL_SECONDS:
            time.sleep(0.05)
            left = self.add("left", 0)


@contextlib.contextmanager
def join() -> Iterator[Workers]:
    """This process among those that torchrun, deepspeed, srun or mpirun has started; or alone.

    Raises:
        UserError: the launcher does not say where to meet, or the others do not come.
    """
    try:
        workers = _meet()
    except (RuntimeError, ValueError, ImportError) as error:  # torch's own errors of connecting are RuntimeErrors
        raise UserError(f"the processes that the launcher has started cannot meet: {error}") from error
    yield workers
    if isinstance(workers, Counting):
        workers.leave()


def _meet() -> Workers:
    if all(name in os.environ for name in TORCHRUN[:2]):
        if "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ:  # torchrun's child, or deepspeed's
            end_with_the_launcher()
        return _meet_at_master(TORCHRUN)
    if "SLURM_STEP_NUM_TASKS" in os.environ and not any(name in os.environ for name in MPI_SIGNS[:2]):
        return _meet_at_master(SRUN)
    return _meet_by_mpi() if any(name in os.environ for name in MPI_SIGNS) else Alone()


def _meet_at_master(names: tuple[str, str, str]) -> Workers:
    rank, size, local_rank = (int(os.environ.get(name, "0")) for name in names)
    if size == 1:
        return Alone()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"{size} processes, but no {name}: export MASTER_ADDR=the first host, MASTER_PORT=29500")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    store, *_ = next(rendezvous("env://", timeout=MEETING))  # where torchrun keeps a store, that one
    return Counting(store, rank, size, local_rank)


def _meet_by_mpi() -> Workers:
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI

    MPI.Init()
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    local_rank = world.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()
    host = "127.0.0.1" if world.allreduce(local_rank, MPI.MAX) == size - 1 else socket.gethostname()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=MEETING) if rank == 0 else None
    host, port = world.bcast((host, store.port) if store else None)
    MPI.Finalize()
    end_with_the_launcher()
    os.environ["RANK"] = str(rank)  # tells run_command who speaks first
    return Counting(store or TCPStore(host, port, timeout=MEETING), rank, size, local_rank)
