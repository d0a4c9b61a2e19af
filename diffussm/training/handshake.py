"""The start-up check: all ranks are of the same mind before any of them trains."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import diffussm
from diffussm.errors import UserError
from diffussm.training.cluster import Cluster

NAMED = 4  # odd ranks, in the message
ADVICE = {
    "code": "give every host the same checkout",
    "python": "give every host the same environment",
    "torch": "give every host the same environment",
    "deepspeed": "give every host the same environment",
    "configuration": "start every rank with the same command, configuration and environment",
    "data index": "have every host see the same data.path",
    "world size": "start all ranks by one launcher",
    "visible devices": "look at CUDA_VISIBLE_DEVICES and the launcher's GPUs a node",
}


def check_agreement(cluster: Cluster, facts: dict[str, str]) -> None:
    """Raise the same UserError on every rank unless all agree on ``facts``, code, versions, world size and devices.

    Collective. The message names the ranks that differ from the most by rank and host.
    """
    mine = {
        "host": cluster.host,
        "device": _device(cluster),
        "code": code_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "world size": os.environ.get("WORLD_SIZE", "1"),
        "visible devices": str(torch.cuda.device_count()),
    } | facts
    ranks: list[Any] = [None] * cluster.world_size
    dist.all_gather_object(ranks, mine, group=cluster.control)
    if problem := disagreement(ranks):
        raise UserError(problem)


def disagreement(ranks: list[dict[str, str]]) -> str:
    """What differs between ranks, each a table of facts with ``host`` and ``device``; "" where nothing does."""
    for fact in [name for name in ranks[0] if name not in ("host", "device")]:
        values = Counter(rank.get(fact, "nothing") for rank in ranks)
        if len(values) > 1:
            right = values.most_common(1)[0][0]
            odd = [number for number, rank in enumerate(ranks) if rank.get(fact, "nothing") != right]
            named = ", ".join(
                f"rank {n} on {ranks[n]['host']} has {ranks[n].get(fact, 'nothing')}" for n in odd[:NAMED]
            )
            more = f" and {len(odd) - NAMED} more ranks differ" if len(odd) > NAMED else ""
            advice = ADVICE.get(fact, "start every rank alike")
            return f"the ranks do not agree on {fact}: {named}{more}, the others have {right}: {advice}"
    users: dict[tuple[str, str], int] = {}
    for number, rank in enumerate(ranks):
        place = rank["host"], rank["device"]
        if rank["device"] != "cpu" and place in users:
            return (
                f"ranks {users[place]} and {number} on {rank['host']} both use GPU {rank['device']}: start one rank a "
                f"GPU, each with its own LOCAL_RANK (srun: as many --ntasks-per-node as --gpus-per-node)"
            )
        users[place] = number
    return ""


def code_hash() -> str:
    """Of the package's source files."""
    digest = hashlib.sha256()
    root = Path(diffussm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _device(cluster: Cluster) -> str:
    if cluster.device.type == "cpu":
        return "cpu"
    return str(torch.cuda.get_device_properties(cluster.device).uuid)
