"""Writes checkpoints in the background, so that training goes on, and outlasts what may pass: a full disk, a network.

A save copies this rank's pieces to the host's memory; a thread writes them. When all ranks have written theirs, rank 0
publishes the checkpoint. Where that fails, training goes on and the thread tries again, until the next save: that one
is written at once, and if it fails as well, the run ends. So no more is lost than what lies between two saves.

`checkpoints/owner` names the process that may publish: one that was cut off, and replaced meanwhile, finds another's.
What such a one was writing bears its own name, and is in no manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
import threading
import uuid
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from diffussm.data.store import Store
from diffussm.errors import UserError
from diffussm.training import checkpoint
from diffussm.training.checkpoint import FORMAT, MANIFEST, META, Checkpoint, rank_file
from diffussm.training.cluster import Attempt, Cluster
from diffussm.training.partition import Partition
from diffussm.training.tensor_file import pack

RETRY_SECONDS = 10  # between two tries to write
LAST_TRIES = 3  # of a save that training waits for
Score = Callable[[], dict[str, float]]
OWNER, LATEST, BEST = "owner", "latest", "best"


class Replaced(UserError):
    """Another process saves where this one did: no try of this one will succeed."""


class Saver:
    """A run's checkpoints, as every rank saves them.

    Args:
        store: of `checkpoints/`.
        surplus: which checkpoints to remove, of all, the newest first.
        best: name of the metric whose best checkpoint `best` names.

    Attributes:
        lost: why no more will be saved, as soon as rank 0 has met it in the background; "" while it has not.

    Made by every rank; rank 0 takes possession of the place.

    Raises:
        UserError: another process did so at the same time, or a later attempt of the same job has done so.
    """

    def __init__(
        self,
        store: Store,
        cluster: Cluster,
        partition: Partition,
        surplus: Callable[[list[Checkpoint]], list[Checkpoint]],
        best: str | None,
    ) -> None:
        self._store, self._cluster, self._partition = store, cluster, partition
        self._surplus, self._best = surplus, best
        self._job: _Job | None = None
        self.lost = ""
        self._attempt = Attempt.here()
        self._token = f"{cluster.host} {uuid.uuid4().hex} {self._attempt}"
        self._writer = cluster.from_main(self._take_over)

    def save(
        self, meta: dict[str, Any], kinds: dict[str, list[Tensor]], wait: bool, score: Score | None = None
    ) -> None:
        """Begin to save a checkpoint; where the one before could not be written, or with ``wait``, end it, too.

        Collective: every rank calls it, and what it raises, it raises on every rank.

        Args:
            meta: JSON types; see :attr:`Checkpoint.meta`.
            kinds: flat tensors, laid out as the partition's masters.
            score: computes further metrics of this checkpoint: rank 0's thread calls it before it publishes.

        Raises:
            UserError: the checkpoint cannot be written, or another process writes checkpoints to this place.
        """
        failed = self.settle()
        name = checkpoint.name_of(meta["images"])
        content = pack(
            {f"{kind}:{f.name}": f.of(flats) for kind, flats in kinds.items() for f in self._partition.fragments}
        )
        waiting = wait or bool(failed)
        self._job = _Job(self, name, meta, score, content, LAST_TRIES if wait else 1 if failed else math.inf)
        if waiting and (failed := self.settle()):
            raise UserError(failed)

    def settle(self) -> str:
        """Let the save under way end, if there is one. Collective. Returns what has kept it from that, or ""."""
        job, self._job = self._job, None
        if job is None:
            return ""
        while job.thread.is_alive():
            if job.failing:  # on any rank: the threads of the others wait for this one's
                job.give_up.set()
            job.thread.join(0.02)
        return job.outcome

    def make_room(self, name: str) -> None:
        """Remove a torn checkpoint of that name, which loading passed over.

        Raises:
            UserError: another process has taken over: it may have published one of that name.
        """
        self._own()
        if self._store.exists(f"{name}/{MANIFEST}"):
            self.discard(name)

    def publish(self, name: str, meta: dict[str, Any], records: list[dict[str, Any]]) -> None:
        """Make a checkpoint exist whose rank files are all there.

        Raises:
            UserError: another process has published in the meantime.
        """
        text = (json.dumps(meta, indent=1) + "\n").encode()
        files = {META: {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}}
        files |= {record["name"]: record["file"] for record in records}
        manifest = {
            "format": FORMAT,
            "files": files,
            "shapes": {name: list(shape) for name, shape in self._partition.shapes.items()},
            "pieces": {record["name"]: record["pieces"] for record in records},
        }
        self._sign(self._own(), name)  # at each try: while a cut network failed the one before, another may have begun
        self._create(f"{name}/{META}", text)
        self._create(f"{name}/{MANIFEST}", (json.dumps(manifest) + "\n").encode())
        self._own()
        self._store.put(LATEST, f"{name}\n".encode())
        if self._best and (found := checkpoint.best_of(self._up_to(name), self._best)):
            self._store.put(BEST, f"{found.name}\n".encode())

    def look(self) -> None:
        """Set ``lost`` if another process has taken over; trouble of the store says nothing. For rank 0's threads."""
        with contextlib.suppress(OSError, UserError):
            try:
                self._own()
            except Replaced as error:
                self.lost = str(error)

    def _create(self, name: str, content: bytes) -> None:
        """Put an object where there is none. A process that was held up for long may find its successor's there, and
        leaves that alone; else it is its own, of a try before, or one that its predecessor was late to write."""
        try:
            self._store.put(name, content, if_absent=True)
        except FileExistsError:
            self._own()
            self._store.put(name, content)

    def tidy(self, name: str) -> None:
        """Remove checkpoints that are surplus now that ``name`` exists."""
        for old in self._surplus(self._up_to(name)):
            self.discard(old.name)

    def write(self, name: str, content: bytearray) -> dict[str, Any]:
        """Write this rank's file; what the manifest says of it."""
        file = rank_file(self._cluster.rank, self._writer)
        self._store.put(f"{name}/{file}", content)
        return {
            "name": file,
            "file": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()},
            "pieces": [(f.name, f.start, f.size) for f in self._partition.fragments],
        }

    def discard(self, name: str) -> None:
        """Remove a checkpoint, or what there is of one."""
        self._store.delete_all(f"{name}/", first=f"{name}/{MANIFEST}")

    def withdraw(self, name: str) -> None:
        """Remove what there is of a checkpoint that could not be published. Raises as :meth:`make_room`."""
        self._own()
        self.discard(name)

    def _up_to(self, name: str) -> list[Checkpoint]:
        there = []
        for found in checkpoint.complete(self._store):
            if found.name <= name:
                with contextlib.suppress(UserError):  # a torn one counts as nothing, and is left to be looked at
                    _ = found.meta
                    there.append(found)
        return there

    def _take_over(self) -> str:
        """Take possession, and remove what killed processes have left. Returns what names the files of this launch."""
        before = _read(self._store, OWNER)
        if Attempt.in_text((before or b"").decode()).replaces(self._attempt):
            raise self._replaced()
        self._sign(before, "")
        self._store.sweep()
        published = {c.name for c in checkpoint.complete(self._store)}
        for name in {path.split("/")[0] for path in self._store.list(checkpoint.PREFIX)} - published:
            self.discard(name)
        return self._token.split()[1][:8]

    def _sign(self, before: bytes | None, name: str) -> None:
        """Say in `owner` that this process publishes ``name``, if that is still ``before``."""
        try:
            self._store.swap(OWNER, before, f"{self._token} {name}\n".encode())
        except FileExistsError:
            raise self._replaced() from None

    def _own(self) -> bytes:
        """What `owner` says, which is this process; UserError where another has taken its place."""
        owner = _read(self._store, OWNER) or b""
        if not owner.startswith(self._token.encode()):
            raise self._replaced()
        return owner

    def _replaced(self) -> Replaced:
        return Replaced(
            f"another process has begun to save into {self._store}: only one may train a run: stop one of them"
        )


def _read(store: Store, name: str) -> bytes | None:
    try:
        return bytes(store.read(name))
    except FileNotFoundError:
        return None


class _Job:
    """One save, in a thread.

    Attributes:
        failing: the last try has failed, and others follow until ``give_up`` is set.
        outcome: once the thread has ended, what has failed, the same on all ranks; or "".
    """

    def __init__(
        self, saver: Saver, name: str, meta: dict[str, Any], score: Score | None, content: bytearray, tries: float
    ) -> None:
        self._saver, self._cluster = saver, saver._cluster
        self._name, self._meta, self._score, self._content, self._tries = name, meta, score, content, tries
        self.give_up = threading.Event()
        self.failing = False
        self.outcome = ""
        self.thread = threading.Thread(target=self._run, name="saver", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self._save()
        except Exception as error:  # such as a collective's, as a rank is gone
            self.outcome = f"checkpoint {self._name} was not saved: {error}"

    def _save(self) -> str:
        problem = self._tell(self._cluster.is_main and self._try(lambda: self._saver.make_room(self._name)))
        if problem:
            return problem
        record = self._try(lambda: self._saver.write(self._name, self._content))
        del self._content
        records: list[Any] = [None] * self._cluster.world_size
        dist.all_gather_object(records, record, group=self._cluster.saving)
        problem = next((r for r in records if isinstance(r, str)), "")
        if self._cluster.is_main:
            if self._score and not problem:
                self._meta["metrics"] |= self._scored(self._score)
            problem = problem or self._try(lambda: self._saver.publish(self._name, self._meta, records))
            if problem:
                with contextlib.suppress(OSError, UserError):  # else the next start does it
                    self._saver.withdraw(self._name)
            else:
                self._tidy()
        return self._tell(problem)

    def _scored(self, score: Score) -> dict[str, float]:
        """What ``score`` finds; nothing where it fails: the others wait for what comes after it."""
        try:
            return score()
        except Exception as error:
            self._warn(f"checkpoint {self._name} has no score: {error}", "it is saved without one")
            return {}

    def _tell(self, problem: Any) -> str:
        """Rank 0's ``problem``, on every rank; "" where it has none."""
        told = [problem or ""]
        dist.broadcast_object_list(told, group=self._cluster.saving)
        return told[0]

    def _try(self, action: Callable[[], Any]) -> Any:
        """What ``action`` returns, once it does not fail; or, when given up, what has failed."""
        tries = 0
        while True:
            try:
                result = action()
                self.failing = False
                return result
            except Replaced as error:
                self._saver.lost = str(error)
                return self._saver.lost
            except (OSError, UserError) as error:
                problem = f"checkpoint {self._name} cannot be written: {_text(error)}"
            tries += 1
            if tries >= self._tries:
                return problem
            if self._tries == math.inf:
                self.failing = True
                outlook = "training goes on until the next checkpoint, and ends if that fails as well"
            else:
                outlook = f"{self._tries - tries} tries are left"
            self._warn(problem, f"trying again in {RETRY_SECONDS} s; {outlook}")
            if self.give_up.wait(RETRY_SECONDS):
                return problem

    def _tidy(self) -> None:
        try:
            self._saver.tidy(self._name)
        except (OSError, UserError) as error:
            self._warn(f"checkpoints before {self._name} cannot be removed: {_text(error)}", "the next start does it")

    def _warn(self, problem: str, outlook: str) -> None:
        who = f"rank {self._cluster.rank} on {self._cluster.host}"
        print(f"warning: {who}: {problem}: {outlook}", file=sys.stderr, flush=True)


def _text(error: OSError | UserError) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
