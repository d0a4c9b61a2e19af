"""Which rank this process is, and on which device: the one place that asks the launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from diffussm.errors import UserError

PREPARATION_TIMEOUT = timedelta(hours=6)  # of a barrier: rank 0 may be encoding the data set meanwhile


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
    else:
        _end_with_the_launcher()
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
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=PREPARATION_TIMEOUT)
    if (joined := dist.get_world_size()) != world_size:
        raise UserError(f"joined a group of {joined} ranks where the launcher announced {world_size}")
    return Cluster(rank, world_size, local_rank, device)


def _end_with_the_launcher() -> None:
    """Have the system end this process when its launcher is killed: a rank left over would go on writing."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
