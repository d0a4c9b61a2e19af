"""Checkpoints that are complete or invisible.

    checkpoints/latest                 one line: the name of the newest, for people and other programs
    checkpoints/images-000048000/
        meta.json                      what the weights are: model, data, codec, config, progress
        ema.safetensors                the averaged weights, fp32, by parameter name
        deepspeed/                     DeepSpeed's own shards: weights and optimizer of each rank
        manifest.json                  size and sha256 of each of these files; written last

A checkpoint is written under a temporary name, and renamed once its manifest is on the disk; then `latest` is replaced.
Whatever is killed in between, a reader meets the old state or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from diffussm.config import from_dict
from diffussm.errors import UserError
from diffussm.files import fsync, sha256_of, write_atomically, write_json
from diffussm.models.diffussm import DiffuSSM, ModelConfig

FORMAT = "diffussm-checkpoint/1"
ENGINE = "deepspeed"  # the tag under which DeepSpeed writes into the folder


def save(
    folder: Path, meta: dict[str, Any], ema: dict[str, Tensor], save_engine: Callable[[Path], None],
    is_main: bool, barrier: Callable[[], None], keep: int,
) -> Path:  # fmt: skip
    """Save a checkpoint, publish it, and remove all but the newest ``keep``. Collective: every rank calls it.

    Args:
        folder: the run's `checkpoints/`.
        meta: JSON types; see :func:`load_meta`.
        ema: averaged weights by parameter name.
        save_engine: makes the engine write its shards into a folder; collective too.
        is_main: true on the one rank that writes what is common.
        barrier: waits for all ranks.
        keep: at least 1.

    Returns:
        The published folder.
    """
    final = folder / f"images-{meta['images']:012d}"
    partial = folder / f".{final.name}.partial"
    if is_main:
        for leftover in folder.glob(".*"):  # of a killed run: the lock on the run says that it has ended
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    save_engine(partial)
    if is_main:
        save_file(ema, partial / "ema.safetensors")
        write_json(partial / "meta.json", meta)
    barrier()  # all shards are written
    if is_main:
        files = {}
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            fsync(path)
            files[path.relative_to(partial).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        write_json(partial / "manifest.json", files)
        if final.exists():  # a torn one of the same progress, which loading has passed over
            shutil.rmtree(final)
        os.replace(partial, final)
        fsync(folder)
        write_atomically(folder / "latest", final.name + "\n")
        for old in [path for path in _by_progress(folder) if path < final][keep - 1 :]:
            shutil.rmtree(old)
    barrier()
    return final


def find(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run's `checkpoints/`, or None. Torn ones are passed over, with a warning."""
    for candidate in _by_progress(folder):
        try:
            verify(candidate)
            return candidate
        except UserError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
    return None


def verify(checkpoint: Path) -> None:
    """Raise UserError, naming the file, unless every file of the checkpoint is as it was written."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())
        expected = [(checkpoint / name, entry["size"], entry["sha256"]) for name, entry in files.items()]
    except FileNotFoundError:
        raise UserError(f"{checkpoint} is not a complete checkpoint: it has no manifest.json") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{checkpoint} is torn: manifest.json cannot be read ({error})") from None
    if not {"meta.json", "ema.safetensors"} <= files.keys() or any(".." in Path(name).parts for name in files):
        raise UserError(f"{checkpoint} is torn: manifest.json does not list the files of a checkpoint")
    for path, size, sha256 in expected:
        if not path.is_file():
            raise UserError(f"{checkpoint} is torn: {path.name} is missing")
        if path.stat().st_size != size or sha256_of(path) != sha256:
            raise UserError(f"{checkpoint} is torn: {path.name} is not the file that was saved")


def load_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json: images, world_size, zero_stage and config of the run; channels, num_classes, class_names, codec,
    latent_shape, scale and shift of its data. UserError if it is none."""
    try:
        meta = json.loads((checkpoint / "meta.json").read_text())
        if meta["format"] != FORMAT:
            raise UserError(f"{checkpoint} has format {meta['format']}, which this version does not read")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{checkpoint} is not a checkpoint of diffussm: meta.json: {error}") from None
    return meta


def load_ema(checkpoint: Path) -> dict[str, Tensor]:
    """The averaged weights by parameter name, fp32 on the CPU."""
    return load_file(checkpoint / "ema.safetensors")


def make_model(meta: dict[str, Any]) -> DiffuSSM:
    """The untrained network that a checkpoint's weights fit."""
    return DiffuSSM(from_dict(meta["config"]["model"], ModelConfig), meta["channels"], meta["num_classes"])


def load_model(checkpoint: Path) -> tuple[DiffuSSM, dict[str, Any]]:
    """(network with the averaged weights, in eval mode; meta). UserError if the checkpoint is torn or foreign."""
    verify(checkpoint)
    meta = load_meta(checkpoint)
    model = make_model(meta)
    try:
        model.load_state_dict(load_ema(checkpoint))
    except RuntimeError as error:
        raise UserError(f"{checkpoint}: ema.safetensors does not fit the model of its meta.json: {error}") from None
    return model.eval(), meta


def _by_progress(folder: Path) -> list[Path]:
    """Published checkpoints, the newest first."""
    return sorted(folder.glob("images-*"), reverse=True)
