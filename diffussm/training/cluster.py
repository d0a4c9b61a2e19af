"""Which rank this process is, and on which device: the one place that asks the launcher."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.cpp_extension import get_default_build_root

from diffussm.errors import UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cluster:
    """This process among the others.

    Attributes:
        rank: 0..world_size - 1.
        world_size: number of processes.
        local_rank: its number on this host, which picks the device; never the global rank.
        device: where it computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def from_main(self, function: Callable[[], Result]) -> Result:
        """What ``function`` returns on rank 0, on every rank; a UserError that it raises there, likewise."""
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]


def connect() -> Cluster:
    """Join the group that the launcher (deepspeed, torchrun, or none: one process) describes in the environment."""
    import deepspeed  # slow to import: bad arguments are reported before it
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names that DeepSpeed uses
    if "RANK" not in os.environ:
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
    elif "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ:  # torchrun's child, or deepspeed's
        end_with_the_launcher()
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"the launcher set RANK but not {name}: start with deepspeed or torchrun, or export it")
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"local rank {local_rank} has no GPU: this host shows {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
    if device.type == "cpu":
        _announce_compilation(rank)
        remove_stale_locks(_extensions())
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    if (joined := dist.get_world_size()) != world_size:
        raise UserError(f"joined a group of {joined} ranks where the launcher announced {world_size}")
    return Cluster(rank, world_size, local_rank, device)


def end_with_the_launcher() -> None:
    """Have the system end this process when its launcher is killed: a rank left over would go on writing."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _extensions() -> Path:
    """Where torch keeps what DeepSpeed has it compile."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _announce_compilation(rank: int) -> None:
    if rank == 0 and not any(_extensions().rglob("deepspeed_shm_comm.so")):
        print("compiling DeepSpeed's CPU communication, once: about a minute", file=sys.stderr, flush=True)


def remove_stale_locks(extensions: Path) -> None:
    """Remove the `lock` files of compilations that were killed: torch would wait for them for ever.

    A compilation that is under way keeps its lock file open, which only Linux tells us.
    """
    if sys.platform == "linux":
        for lock in extensions.rglob("deepspeed_shm_comm/lock"):
            if not _is_open(lock):
                lock.unlink(missing_ok=True)


def _is_open(path: Path) -> bool:
    target = os.path.realpath(path)
    for descriptor in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # closed meanwhile, or another user's
            if os.readlink(descriptor) == target:
                return True
    return False
