"""Checkpoints that are complete or invisible, in a folder or below an s3:// URL.

    checkpoints/latest                  one line: the name of the newest
    checkpoints/best                    likewise, of the best by train.keep_best
    checkpoints/images-000000048000/
        rank-00000-1f6b3a90.safetensors ...   fp32: the pieces of parameters that each rank's optimizer held, of each
                                        kind; the second number is the writer's, so that none writes over another's
        meta.json                       what the weights are: model, data, codec, config, progress
        manifest.json                   written last: size and sha256 of each file, and where each piece lies

Each file appears whole, and a checkpoint exists once its manifest does: whatever is killed in between, a reader meets
the old state or the new one. Kinds are ``weight``, Adam's ``exp_avg`` and ``exp_avg_sq``, and ``ema-LENGTH`` for each
average. Pieces have names of parameters, so any number of ranks at any ZeRO stage reads them. Nothing is pickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from diffussm.config import from_dict
from diffussm.data.store import Store, open_store
from diffussm.errors import UserError
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.training.tensor_file import Entry, read_header, read_ranges

FORMAT = "diffussm-checkpoint/2"
PREFIX, MANIFEST, META = "images-", "manifest.json", "meta.json"
PIECE_BYTES = 16 << 20  # read at once to verify
Piece = tuple[str, int, int]  # parameter, first element, elements
Wanted = tuple[str, str, int, Tensor]  # kind, parameter, first element, flat tensor to fill


def name_of(images: int) -> str:
    """Of the checkpoint at ``images`` seen."""
    return f"{PREFIX}{images:012d}"


def rank_file(rank: int, writer: str) -> str:
    """Of a rank in the launch that is called ``writer``: what a rank of another still writes, it writes elsewhere."""
    return f"rank-{rank:05d}-{writer}.safetensors"


def ema_kind(length: float) -> str:
    """The kind of tensors that an average over ``length`` images is."""
    return f"ema-{length:.0f}"


class Checkpoint:
    """A published checkpoint, ``name`` in ``store``. What is read of it is as large as what is asked for."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self._headers: dict[str, dict[str, Entry]] = {}

    @classmethod
    def at(cls, place: str | Path) -> Checkpoint:
        """The checkpoint at a path or an s3:// URL."""
        parent, _, name = str(place).rstrip("/").rpartition("/")
        return cls(open_store(parent or "."), name)

    def __str__(self) -> str:
        return f"{self.store}/{self.name}"

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """``files`` {name: {size, sha256}}, ``pieces`` {rank file: [Piece, ...]}, ``shapes`` {parameter: [...]}.

        Raises:
            UserError: there is none, or it is not of this format.
        """
        try:
            table = json.loads(bytes(self._read(MANIFEST)))
            names = table["files"].keys() | table["pieces"].keys()
            if table["format"] != FORMAT:
                raise UserError(f"{self} is of format {table['format']!r}, this version reads {FORMAT!r}")
            sound = META in table["files"] and all(len(PurePosixPath(name).parts) == 1 for name in names)
            sound = sound and table["pieces"].keys() <= table["files"].keys() and ".." not in names
            sound = sound and all(type(f["size"]) is int and type(f["sha256"]) is str for f in table["files"].values())
            sound = sound and _tiled(table["shapes"], table["pieces"])
        except FileNotFoundError:
            raise UserError(f"{self} is not a complete checkpoint: it has no {MANIFEST}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{self} is torn: {MANIFEST} cannot be read ({error})") from None
        if not sound:
            raise UserError(f"{self} is torn: {MANIFEST} does not list the files of a checkpoint")
        return table

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """images, world_size, zero_stage and config of the run; channels, num_classes, class_names, codec,
        latent_shape, scale and shift of its data; metrics. UserError if it is none."""
        try:
            meta = json.loads(bytes(self._read(META)))
            if meta["format"] != FORMAT:
                raise UserError(f"{self} is of format {meta['format']!r}, this version reads {FORMAT!r}")
            if type(meta["images"]) is not int:
                raise TypeError("images is not a number")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{self} is not a checkpoint of diffussm: {META}: {error}") from None
        return meta

    @property
    def digest(self) -> str:
        """Hex sha256 of what the manifest says, that is of every file: the same wherever the checkpoint lies."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    @property
    def kinds(self) -> list[str]:
        """Of tensors that it holds."""
        return ["weight", "exp_avg", "exp_avg_sq", *map(ema_kind, self.meta["ema_images"])]

    def check_kind(self, kind: str) -> None:
        """Raise UserError, which tells those that it has, unless it has this kind of tensors."""
        if kind not in self.kinds:
            raise UserError(f"{self} has no weights {kind}, but {', '.join(self.kinds)}")

    def verify(self, share: slice = slice(None)) -> None:
        """Read its files, or every so many of them, and raise UserError, naming it, if one is not as it was written."""
        for name in sorted(self.manifest["files"])[share]:
            expected = self.manifest["files"][name]
            digest = hashlib.sha256()
            try:
                if self.store.stat(f"{self.name}/{name}").size != expected["size"]:
                    raise UserError(f"{self} is torn: {name} is not the file that was saved")
                for start in range(0, expected["size"], PIECE_BYTES):
                    digest.update(self._read(name, start, min(PIECE_BYTES, expected["size"] - start)))
            except FileNotFoundError:
                raise UserError(f"{self} is torn: {name} is missing") from None
            if digest.hexdigest() != expected["sha256"]:
                raise UserError(f"{self} is torn: {name} is not the file that was saved")

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """All of a kind by parameter name, fp32 on the CPU. Raises as :meth:`fill`."""
        shapes = {name: torch.Size(shape) for name, shape in self.manifest["shapes"].items()}
        flat = {name: torch.empty(shape.numel()) for name, shape in shapes.items()}
        self.fill((kind, name, 0, tensor) for name, tensor in flat.items())
        return {name: tensor.view(shapes[name]) for name, tensor in flat.items()}

    def one_by_one(self, kind: str) -> Iterator[Tensor]:
        """Those of :meth:`tensors`, in the order of the manifest's shapes; few are in memory at once."""
        batch: dict[str, Tensor] = {}
        shapes = self.manifest["shapes"]
        for number, (name, shape) in enumerate(shapes.items(), 1):
            batch[name] = torch.empty(math.prod(shape))
            if number == len(shapes) or sum(tensor.nbytes for tensor in batch.values()) >= PIECE_BYTES:
                self.fill((kind, name, 0, tensor) for name, tensor in batch.items())
                yield from (tensor.view(shapes[name]) for name, tensor in batch.items())
                batch = {}

    def fill(self, wanted: Iterable[Wanted]) -> None:
        """Fill flat tensors, on any device, with parts of parameters, whichever ranks' files hold them.

        Raises:
            UserError: it does not hold all of that.
        """
        holders = defaultdict(list)  # parameter: (file, first element, elements)
        for file, pieces in self.manifest["pieces"].items():
            for name, start, size in pieces:
                holders[name].append((file, start, size))
        reads = defaultdict(list)  # file: (tensor's name in it, elements to pass over, where to put it)
        for kind, name, start, target in wanted:
            found = 0
            for file, first, size in holders[name]:
                begin, end = max(start, first), min(start + target.numel(), first + size)
                if begin < end:
                    reads[file].append((f"{kind}:{name}", begin - first, target[begin - start : end - start]))
                    found += end - begin
            if found != target.numel():
                raise UserError(f"{self} holds {found:,} of {target.numel():,} elements of {name}, {kind}")
        for file, parts in reads.items():
            self._fill_from(file, parts)

    def _fill_from(self, file: str, parts: list[tuple[str, int, Tensor]]) -> None:
        entries = self._entries(file)
        staged = []
        for name, skip, target in parts:
            entry = entries.get(name)
            if entry is None or entry.dtype != torch.float32:
                raise UserError(f"{self}: {file} has no fp32 tensor {name}")
            start = entry.start + skip * entry.dtype.itemsize
            if start + target.nbytes > entry.end:
                raise UserError(f"{self}: {file} has less of {name} than {MANIFEST} says")
            staged.append((start, target if target.device.type == "cpu" else torch.empty(target.numel()), target))
        try:
            read_ranges(functools.partial(self._read, file), [(start, stage) for start, stage, _ in staged])
        except (OSError, EOFError) as error:
            raise UserError(f"{self}: {file} cannot be read: {error}") from error
        for _, stage, target in staged:
            if stage is not target:
                target.copy_(stage)

    def _entries(self, file: str) -> dict[str, Entry]:
        if file not in self._headers:
            size = self.manifest["files"][file]["size"]
            self._headers[file] = read_header(functools.partial(self._read, file), size, f"{self}/{file}")
        return self._headers[file]

    def _read(self, file: str, start: int = 0, length: int | None = None) -> Any:
        return self.store.read(f"{self.name}/{file}", start, length)


def _tiled(shapes: dict[str, list[int]], pieces: dict[str, list[Piece]]) -> bool:
    """Whether each element of each parameter is in exactly one piece."""
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
    for name, start, size in (piece for of_file in pieces.values() for piece in of_file):
        spans[name].append((start, start + size))
    for name, shape in shapes.items():
        end = 0
        for start, stop in sorted(spans[name]):
            if start != end or stop < start:
                return False
            end = stop
        if end != math.prod(shape):
            return False
    return True


def complete(store: Store) -> list[Checkpoint]:
    """The published checkpoints of a run's `checkpoints/`, the newest first."""
    names = [PurePosixPath(name) for name in store.list(PREFIX)]
    return [Checkpoint(store, path.parent.name) for path in sorted(names, reverse=True) if path.name == MANIFEST]


def find(store: Store, verify: Callable[[Checkpoint], None] = Checkpoint.verify) -> Checkpoint | None:
    """The newest whole checkpoint, or None. Torn ones are passed over, with a warning."""
    for candidate in complete(store):
        try:
            verify(candidate)
            return candidate
        except UserError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
    return None


def surplus(checkpoints: list[Checkpoint], last: int, every_images: int, best: str | None) -> list[Checkpoint]:
    """Those to remove: neither of the ``last`` newest, nor the first past a multiple of ``every_images``, nor the best.

    Args:
        checkpoints: the newest first.
        every_images: 0: no multiples count.
        best: name of a metric, of which less is better; None: no best.
    """
    kept = set(checkpoints[:last])
    passed = 0
    for checkpoint in reversed(checkpoints) if every_images else ():
        if checkpoint.meta["images"] // every_images > passed:
            kept.add(checkpoint)
            passed = checkpoint.meta["images"] // every_images
    if best and (found := best_of(checkpoints, best)):
        kept.add(found)
    return [checkpoint for checkpoint in checkpoints if checkpoint not in kept]


def best_of(checkpoints: list[Checkpoint], metric: str) -> Checkpoint | None:
    """That with the least value of a metric, of equals the newest; None where no checkpoint has the metric."""
    scored = [(c.meta["metrics"].get(metric), c) for c in checkpoints]
    scored = [(value, c) for value, c in scored if value is not None and math.isfinite(value)]
    return min(scored, key=lambda item: item[0])[1] if scored else None


def make_model(meta: dict[str, Any]) -> DiffuSSM:
    """The untrained network that a checkpoint's weights fit."""
    return DiffuSSM(from_dict(meta["config"]["model"], ModelConfig), meta["channels"], meta["num_classes"])


def load_model(checkpoint: Checkpoint, kind: str | None = None) -> DiffuSSM:
    """The network with a kind of weights, by default the first average, in eval mode.

    Raises:
        UserError: the checkpoint is foreign, or has no such kind.
    """
    kind = kind or ema_kind(checkpoint.meta["ema_images"][0])
    checkpoint.check_kind(kind)
    model = make_model(checkpoint.meta)
    try:
        model.load_state_dict(checkpoint.tensors(kind))
    except RuntimeError as error:
        raise UserError(f"{checkpoint}: its weights do not fit the model of its {META}: {error}") from None
    return model.eval()
