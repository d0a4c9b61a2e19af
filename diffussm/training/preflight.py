"""The check before a run: the ranks meet in a store, and in each phase every one reports to rank 0, which judges.

Nobody waits without a deadline. Work that may hang, in a file system or a collective, has a thread of its own, so a
rank whose work hangs still says so; one that says nothing has died, or is cut off. How a thing is measured is in
preflight_measures.py; what follows from the reports, in preflight_judge.py.

come        who is here, on which device, with how many CPUs
compute     a product of integers, exact, and the speed of a large one
data        one rank a node reads the shards, all nodes at once
disk        checkpoints and cache: room, permission, and one file system for all nodes
clocks      against rank 0's
link N      a ring of nodes, each rank with its counterpart on the next node; every node takes part in two of the rounds
all-reduce  of all ranks
"""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffussm.config import Config
from diffussm.data.store import LocalStore, open_store
from diffussm.data.stream import READERS
from diffussm.errors import UserError, fail
from diffussm.training.cluster import Identity, choose_device, choose_interface, hosts_of_step
from diffussm.training.hardware import multiplies_bf16
from diffussm.training.preflight_judge import judge, ring
from diffussm.training.preflight_measures import (
    Report,
    look,
    measure_all_reduce,
    measure_matmul,
    measure_reading,
    one_line,
    within,
)
from diffussm.training.preflight_verdict import Verdict

GRACE = 3.0  # seconds that rank 0 waits beyond a deadline of the others
POLL_SECONDS = 0.02
PINGS = 8
SEEN_SECONDS = 3.0  # in which a new file shows on the other nodes


class Preflight:
    """This rank's part: `Preflight(config, ds_config, identify(), 120, 600).run()`.

    Args:
        config: checked.
        ds_config: DeepSpeed's, from :func:`diffussm.training.engine.read_ds_config`.
        timeout: seconds of a phase.
        joining: seconds of the first, in which ranks may still be starting.

    Raises:
        UserError: there is no rank 0 to meet.
    """

    def __init__(
        self,
        config: Config,
        ds_config: dict[str, Any],
        identity: Identity,
        timeout: float,
        joining: float,
    ) -> None:
        self.config, self.ds_config, self.timeout, self.joining = config, ds_config, timeout, joining
        self.rank, self.size, self.local_rank = identity.rank, identity.world_size, identity.local_rank
        self.node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()  # what sbatch --exclude calls it
        self.device = choose_device(identity.local_rank)
        self._network = choose_interface(identity)
        self.nodes: dict[str, list[int]] = {}  # their ranks, once all have come
        self.connected = True  # no link has failed
        self.reports: dict[str, list[Report | None]] = {}  # rank 0's: by phase and rank; None: it gave no sign
        self._hosts: list[str] = []
        self._here = f"rank {self.rank} on {self.node}"
        self._store = self._meet(*identity.master)

    def run(self) -> Verdict | None:
        """All phases; what rank 0 makes of them. None on other ranks.

        Raises:
            UserError: rank 0 has ended, or gives no sign.
        """
        try:
            for name, work in self._phases():
                with self._patience():
                    go = self._phase(name, work)
                if not go:
                    break
            self._leave()
        except RuntimeError as error:  # torch's own errors of a store
            raise UserError(f"{self._here} has lost rank 0: {one_line(error)}") from error
        return self._judge() if self.rank == 0 else None

    # Meeting

    def _meet(self, address: str, port: int) -> dist.Store:
        """The store, which torchrun keeps, or else rank 0. It does not wait for the ranks: they are to be counted."""
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        wait = timedelta(seconds=self.joining)
        try:
            with self._patience():
                keeps = self.rank == 0 and not kept
                store = dist.TCPStore(address, port, None, keeps, wait, wait_for_workers=False)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{self._here} cannot meet rank 0 at {address}:{port} within {self.joining:g} s: {one_line(error)}"
            ) from error
        return dist.PrefixStore(f"preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """End this process when it has waited too long for rank 0: in the store, too, it may hang."""
        error = f"{self._here} has waited in vain for rank 0, which gives no sign"
        timer = threading.Timer(2 * (max(self.timeout, self.joining) + GRACE), end, [error])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _phases(self) -> Iterator[tuple[str, Callable[[], Report]]]:
        yield "come", self._come
        yield "compute", partial(measure_matmul, self.device, self.rank)
        yield "data", self._data
        yield "disk", self._disk
        yield "clocks", self._clocks
        for number, pairs in enumerate(ring(list(self.nodes))):
            yield f"link {number}", partial(self._link, number, pairs)
        if self.size > 1 and self.connected:
            yield "all-reduce", lambda: self._all_reduce("all", list(range(self.size)))

    def _phase(self, name: str, work: Callable[[], Report]) -> bool:
        """Work, and report; whether to go on, as rank 0 has decided by all reports."""
        begun = time.monotonic()
        self._send(f"{name}/{self.rank}", {"node": self.node} | within(work, self.timeout, self.device))
        if self.rank == 0:
            keys = [f"{name}/{rank}" for rank in range(self.size)]
            self._await(keys, begun + (self.joining if name == "come" else self.timeout) + GRACE)
            came = [self._receive(key) if self._store.check([key]) else None for key in keys]
            self.reports[name] = came
            if name == "come" and None in came:
                self._hosts = hosts_of_step()
            verdict = self._judge()
            failed = {problem.check for problem in verdict.problems}
            hangs = any("stuck" in report for report in came if report) and not name.startswith("link")
            go = None not in came and not hangs and "come" not in failed
            self._send(f"{name}/word", {"go": go, "nodes": verdict.ranks, "connected": "link" not in failed})
        self._await([f"{name}/word"], math.inf)
        word = self._receive(f"{name}/word")
        self.nodes, self.connected = word["nodes"], word["connected"]
        return word["go"]

    def _leave(self) -> None:
        """Rank 0, which may keep the store, goes last."""
        last = next(reversed(self.reports.values())) if self.rank == 0 else []
        deadline = time.monotonic() + GRACE
        left = self._store.add("left", 1)
        while self.rank == 0 and left < self.size - last.count(None) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            left = self._store.add("left", 0)

    def _judge(self) -> Verdict:
        return judge(self.config, self.ds_config, self.reports, self._hosts, self.timeout, self.joining)

    def _send(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def _receive(self, key: str) -> Any:
        return json.loads(self._store.get(key))

    def _await(self, keys: list[str], deadline: float, pause: float = POLL_SECONDS) -> bool:
        """Whether all are there by then. A blocking `wait` of the store would keep this rank's other thread out."""
        while not (there := self._store.check(keys)) and time.monotonic() < deadline:
            time.sleep(pause)
        return there

    @property
    def _leads(self) -> bool:
        return self.nodes[self.node][0] == self.rank

    @property
    def _others(self) -> list[str]:
        return [node for node in self.nodes if node != self.node]

    # Phases

    def _come(self) -> Report:
        slurm, torchrun = os.environ.get("SLURM_CPUS_PER_TASK"), os.environ.get("LOCAL_WORLD_SIZE")
        facts = {
            "local_rank": self.local_rank,
            "network": self._network,
            "node_ranks": int(torchrun) if torchrun else None,
            "cpus": sorted(os.sched_getaffinity(0)),
            "cpus_per_task": int(slurm) if slurm else None,
            "slurm": "SLURM_JOB_ID" in os.environ,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gpus": torch.cuda.device_count() if self.device.type == "cuda" else 0,
            "device": "cpu",
            "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        }
        if self.device.type == "cpu":
            return facts | {"bf16": multiplies_bf16(self.device)}
        free, total = torch.cuda.mem_get_info(self.device)
        properties = torch.cuda.get_device_properties(self.device)
        gpu = {"device": properties.name, "uuid": str(properties.uuid), "memory": total, "free": free}
        return facts | gpu | {"bf16": multiplies_bf16(self.device)}

    def _data(self) -> Report:
        """Of one rank a node, all nodes at once."""
        if not self._leads:
            return {}
        os.environ.setdefault("DIFFUSSM_S3_DEADLINE", str(self.timeout / 2))  # of a store that cannot be reached
        threads, number = READERS * len(self.nodes[self.node]), list(self.nodes).index(self.node)
        return measure_reading(self.config.data, number, len(self.nodes), threads, self.timeout / 2)

    def _disk(self) -> Report:
        """{"places": {key of the configuration: what :func:`look` sees}, "shared": whether rank 0's file is seen}."""
        if not self._leads:
            return {}
        config, places = self.config, {}
        url = config.train.checkpoints or f"{config.run_dir}/checkpoints"
        store = open_store(url)
        local = isinstance(store, LocalStore)
        if not local:
            name = f".preflight-{uuid.uuid4().hex}"
            store.put(name, b"")
            store.delete(name)
        if config.train.checkpoints and self.rank == 0:
            places["run_dir"] = look(Path(config.run_dir))
        if config.data.cache:
            places["data.cache"] = look(Path(config.data.cache))
        shared = True
        if local and self.rank == 0:
            places["checkpoints"] = self._show(Path(str(store)))
        elif local:
            places["checkpoints"], shared = self._see()
        return {"places": {key: seen for key, seen in places.items() if seen}, "shared": shared}

    def _show(self, path: Path) -> Report:
        """Rank 0's part of one file system for all: a file, for as long as the others look for it."""
        seen = look(path)
        with ExitStack() as stack:
            file = None
            if not seen["error"]:
                file = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".preflight-", dir=seen["folder"]))
            self._send("disk/file", {"folder": seen["folder"], "file": file and file.name})
            self._await([f"disk/seen/{node}" for node in self._others], time.monotonic() + self.timeout * 0.8)
        return seen

    def _see(self) -> tuple[Report | None, bool]:
        """The others' part, in rank 0's folder: whatever else exists here does not matter."""
        if not self._await(["disk/file"], time.monotonic() + self.timeout * 0.8):
            return None, True  # rank 0 says itself what is wrong there
        told = self._receive("disk/file")
        try:
            found, deadline = not told["file"], time.monotonic() + SEEN_SECONDS
            while not (found := found or os.path.exists(told["file"])) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            return look(Path(told["folder"]), whole=False), found
        finally:
            self._send(f"disk/seen/{self.node}", True)

    def _clocks(self) -> Report:
        """Seconds that this node's clock is ahead of rank 0's, by the quickest of a few questions and answers."""
        deadline, pause = time.monotonic() + self.timeout * 0.8, 0.001
        if self.rank == 0:
            for key in (f"clocks/{node}/{ping}" for node in self._others for ping in range(PINGS)):
                if self._await([key], deadline, pause):
                    self._send(f"{key}/answer", time.time())
            return {"ahead": 0.0}
        if not self._leads:
            return {}
        answers = []
        for key in (f"clocks/{self.node}/{ping}" for ping in range(PINGS)):
            asked = time.time()
            self._send(key, True)
            if not self._await([f"{key}/answer"], deadline, pause):
                return {}  # rank 0 says itself what is wrong there
            took = time.time() - asked
            answers.append((took, asked + took / 2 - self._receive(f"{key}/answer")))
        return {"ahead": min(answers)[1]}

    def _link(self, number: int, pairs: list[tuple[str, str]]) -> Report:
        for nodes in pairs:
            for group in zip(*(self.nodes[node] for node in nodes), strict=False):
                if self.rank in group:
                    return self._all_reduce(f"link {number}/{group[0]}", list(group))
        return {}

    def _all_reduce(self, name: str, group: list[int]) -> Report:
        store = dist.PrefixStore(name, self._store.clone())  # it may block its connection
        return measure_all_reduce(store, group.index(self.rank), len(group), self.device, self.timeout * 0.7)


def end(error: str = "") -> None:
    """End this process whatever its threads do, with exit code 2 where there is an error."""
    if error:
        with suppress(SystemExit):
            fail(error)
    sys.stdout.flush()
    os._exit(2 if error else 0)
