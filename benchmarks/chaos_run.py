"""A run that is looked at from outside: what lies at its checkpoints, and the processes that live for it."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

from diffussm.data.store import open_store
from diffussm.errors import UserError
from diffussm.files import TEMPORARY_FOLDER
from diffussm.training import checkpoint

KEEP = 2  # checkpoints
TAIL = 8192  # bytes: some records
PATIENCE = 120.0  # seconds to wait for a moment or an end
MARK = "DIFFUSSM_CHAOS"  # in the environment of all that a life has started


@dataclass
class State:
    """What lies at a run's checkpoints.

    Attributes:
        folders: checkpoint, whole or not → names of its files.
        latest: its content; "" where it is not.
        hidden: a file is on its way.
    """

    folders: dict[str, set[str]]
    latest: str
    hidden: bool

    @property
    def published(self) -> list[str]:
        return sorted(name for name, files in self.folders.items() if checkpoint.MANIFEST in files)

    @property
    def newest(self) -> str:
        return max(self.published, default="")

    def saving(self) -> bool:
        return any(name > self.newest for name in self.folders)

    def publishing(self) -> bool:
        return self.newest > self.latest

    def pruning(self, every_images: int) -> bool:
        """``every_images`` is a multiple of what lies between two saves."""
        kept = self.published[-KEEP:]
        kept += [name for name in self.published if images_of(name) % every_images == 0]
        return self.newest == self.latest and any(name < self.newest and name not in kept for name in self.folders)


def images_of(name: str) -> int:
    return int(name.removeprefix(checkpoint.PREFIX))


@dataclass
class Run:
    """A run's places."""

    folder: Path
    checkpoints: str

    @property
    def seen(self) -> int:
        """Images of the last record, by the end of the log."""
        with contextlib.suppress(FileNotFoundError), open(self.folder / "log.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            for line in reversed(file.read().splitlines(keepends=True)):
                if line.endswith(b"\n") and line.startswith(b"{"):
                    return json.loads(line)["images"]
        return 0

    def published(self) -> list[checkpoint.Checkpoint]:
        return checkpoint.complete(open_store(self.checkpoints))

    def owner(self) -> bytes | None:
        """What names the process that publishes."""
        with contextlib.suppress(FileNotFoundError):
            return bytes(open_store(self.checkpoints).read("owner"))
        return None

    def state(self) -> State:
        """Raises FileNotFoundError where what was listed is gone."""
        store, folders, latest = open_store(self.checkpoints), collections.defaultdict(set), ""
        for name in store.list():
            folder, _, file = name.rpartition("/")
            if folder:
                folders[folder].add(file)
            elif name == "latest":
                latest = bytes(store.read(name)).decode().strip()
        # of S3 there is no such folder: nothing is to be seen of what is on its way
        hidden = [p for p in Path(self.checkpoints).rglob(".*") if TEMPORARY_FOLDER.fullmatch(p.name)]
        for path in hidden:
            if path.parent.name.startswith(checkpoint.PREFIX):
                folders[path.parent.name].add(path.name)
        return State(dict(folders), latest, bool(hidden))


class Life:
    """A process of the run, from its start to its end, and all that it has started. To be left dead.

    Attributes:
        log: what it says.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        self.log, self._mark = log, uuid.uuid4().hex
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", MARK: self._mark}
        with open(log, "w") as file:
            self.launcher = psutil.Popen(
                command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill(self.launcher)
        self.launcher.wait()
        while family := self.family():  # it may have started one more while it was killed
            for process in family:
                self.kill(process)
            psutil.wait_procs(family, timeout=1)

    @property
    def over(self) -> bool:
        return self.launcher.poll() is not None

    @property
    def announced(self) -> bool:
        """It has read its checkpoint, and begins with steps."""
        return "; from the start\n" in (text := self.log.read_text()) or "; going on at " in text

    def ranks(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return self.launcher.children()
        return []

    def family(self) -> list[psutil.Process]:
        """All that live of those that it has started, also where their parent is gone."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def stop(self) -> None:
        self.signal(signal.SIGSTOP, self.ranks())

    def go_on(self) -> None:
        self.signal(signal.SIGCONT, self.ranks())

    def kill(self, process: psutil.Process) -> None:
        self.signal(signal.SIGKILL, [process])

    def signal(self, number: int, processes: list[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def end(self) -> None:
        """Wait until all of it has ended by itself.

        Raises:
            UserError: that does not come.
        """
        deadline = time.monotonic() + PATIENCE
        while not self.over or self.family():
            if time.monotonic() > deadline:
                raise UserError(f"a run of which a rank was killed has not ended in {PATIENCE:.0f} s: {self.tail()}")
            time.sleep(0.1)

    def tail(self) -> str:
        return self.log.read_text()[-3000:]
