"""How a preflight measures: a device, the reading of data, a collective, a folder. Each for itself, on one rank."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffussm.config import DataConfig
from diffussm.data.index import INDEX_NAME, Index, Shard
from diffussm.data.reader import RANGE_BYTES
from diffussm.data.store import open_store
from diffussm.errors import UserError
from diffussm.training.hardware import multiplies_bf16

Report = dict[str, Any]  # of one rank in one phase, JSON types

THREAD = "preflight"
READ_SECONDS, READ_BYTES, MAX_READERS = 5.0, 512 << 20, 32
REDUCED_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
GLOO_BYTES = 16 << 10  # beside NCCL
REPETITIONS = 3
EXACT_EDGE, EXACT_TERMS = (
    {"cuda": 4096, "cpu": 256},
    256,
)  # bf16 holds integers up to 256, in whatever order they add up
TIMED_EDGE, TIMES = {"cuda": 8192, "cpu": 512}, 10


def within(work: Callable[[], Report], seconds: float, device: torch.device) -> Report:
    """What ``work`` returns, and its "seconds"; or "error": what it raised; or "stuck": where, after ``seconds``."""
    outcome: Report = {}

    def run() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            outcome.update(work())
        except Exception as error:
            outcome["error"] = one_line(error)

    thread, begun = threading.Thread(target=run, name=THREAD, daemon=True), time.monotonic()
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        stack = traceback.extract_stack(sys._current_frames().get(thread.ident))
        return {"stuck": f"{stack[-1].name} ({Path(stack[-1].filename).name}:{stack[-1].lineno})" if stack else ""}
    return outcome | {"seconds": round(time.monotonic() - begun, 3)}


def hangs() -> bool:
    """Whether work of this process still hangs, so that it would not end by itself."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def measure_matmul(device: torch.device, seed: int) -> Report:
    """{"correct": whether sums of integers are exact, before and after it got warm; "flops": of a large product}."""
    dtype = torch.bfloat16 if device.type == "cuda" and multiplies_bf16(device) else torch.float32
    random = torch.Generator().manual_seed(seed)
    edge, large = EXACT_EDGE[device.type], TIMED_EDGE[device.type]
    a, b = (
        torch.randint(0, 2, shape, generator=random) * 2.0 - 1 for shape in ((edge, EXACT_TERMS), (EXACT_TERMS, edge))
    )
    truth = a @ b if device.type == "cuda" else a.double() @ b.double()
    a, b = a.to(device, dtype), b.to(device, dtype)

    def exact() -> bool:
        return torch.equal((a @ b).to("cpu", truth.dtype), truth)

    correct = exact()
    x = torch.ones(large, large, device=device, dtype=dtype)
    times = []
    for _ in range(TIMES):
        begun = time.perf_counter()
        (x @ x)[0, 0].item()
        times.append(time.perf_counter() - begun)
    return {"correct": correct and exact(), "flops": 2 * large**3 / min(times)}


def measure_reading(data: DataConfig, number: int, nodes: int, threads: int, seconds: float) -> Report:
    """What the data set is, and how fast this node, ``number`` of ``nodes``, reads shards that no other node reads.

    Raises:
        UserError: it cannot be read.
    """
    store = open_store(data.path)
    if data.prepare and not store.exists(INDEX_NAME):
        return {"prepare": data.prepare}
    index = Index.load(store)
    mine = index.shards[number::nodes] or index.shards
    ranges = ((shard, start) for shard in mine for start in range(0, shard.size, RANGE_BYTES))
    begun = time.monotonic()

    def read(place: tuple[Shard, int]) -> int:
        shard, start = place
        if time.monotonic() - begun > min(READ_SECONDS, seconds):
            return 0
        return len(store.read(shard.name, start, RANGE_BYTES, shard.etag))

    with ThreadPoolExecutor(min(MAX_READERS, threads)) as pool:
        count = sum(pool.map(read, islice(ranges, READ_BYTES // RANGE_BYTES)))
    return {
        "bytes_per_second": count / (time.monotonic() - begun),
        "latent": list(index.latent_shape),
        "classes": len(index.class_names),
        "sample_bytes": math.prod(index.moments_shape) * index.dtype.itemsize,
        "total_bytes": sum(shard.size for shard in index.shards),
    }


def measure_all_reduce(store: dist.Store, rank: int, size: int, device: torch.device, seconds: float) -> Report:
    """{"correct": whether every sum of integers is; "bytes_per_second": of the bus, 2(n - 1)/n · bytes / time}.

    On GPUs by NCCL, and a small one by gloo, which carries training's messages.
    """
    # NCCL is to raise what fails, not to end the process
    os.environ |= {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(seconds=seconds)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
        correct, times = True, []
        places = [(torch.device("cpu"), GLOO_BYTES)] * (device.type == "cuda") + [(device, REDUCED_BYTES[device.type])]
        for place, count in places:
            base = torch.arange(count // 4, device=place, dtype=torch.int32) % 1000
            truth = base * (size * (size + 1) // 2)
            times = []
            for _ in range(1 + REPETITIONS):
                summed = base * (rank + 1)
                dist.all_reduce(torch.zeros(1, device=place))  # all begin at once
                _synchronize(place)
                begun = time.perf_counter()
                dist.all_reduce(summed)
                _synchronize(place)
                times.append(time.perf_counter() - begun)
                correct &= torch.equal(summed, truth)
        return {"correct": correct, "bytes_per_second": 2 * (size - 1) / size * count / min(times)}
    except dist.DistStoreError as error:
        raise UserError(f"no answer within {seconds:g} s") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.distributed_c10d._world.group_count = 0  # a start that fails is counted, and would give the next a name


def look(path: Path, whole: bool = True) -> Report:
    """What there is for a folder that may not exist yet, at its nearest parent that does. Nothing is left there.

    Returns:
        {"folder", "free": bytes, "held": bytes of the files already in ``path``, if asked for the "whole",
        "error": why one cannot write, or ""}.
    """
    path = path.absolute()
    seen = {"folder": str(path), "free": 0, "held": 0, "whole": whole, "error": ""}
    try:
        folder = next(place for place in (path, *path.parents) if place.exists())
        seen["folder"] = str(folder)
        if whole and path.is_dir():
            seen["held"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        seen["free"] = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        with tempfile.NamedTemporaryFile(prefix=".preflight-", dir=folder) as file:
            file.write(b"preflight")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        seen["error"] = error.strerror or str(error)
    return seen


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
