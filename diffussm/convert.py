"""A checkpoint as a .safetensors file, or as a folder that diffusers loads: in the memory of a few tensors."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import torch

from diffussm.autoencoders.codec import Codec
from diffussm.config import Config, from_dict, to_dict
from diffussm.data.store import Store, open_store
from diffussm.diffusion.samplers import SAMPLERS
from diffussm.errors import UserError
from diffussm.files import atomic_path, fsync
from diffussm.training.checkpoint import Checkpoint, make_model
from diffussm.training.tensor_file import write

INDEX = "model_index.json"  # of a pipeline: without it there is none
NEEDED = {  # of meta.json
    "images": int, "config": dict, "channels": int, "num_classes": int, "class_names": list, "latent_shape": list,
    "codec": dict, "ema_images": list,
}  # fmt: skip
TOLD = ("images", "channels", "num_classes", "class_names", "latent_shape", "codec", "scale", "shift")


def check_meta(found: Checkpoint) -> Config:
    """The run's configuration; a checkpoint's meta.json has it whole afterwards, with keys that its version lacked.

    Raises:
        UserError: meta.json does not tell what a conversion needs.
    """
    meta = found.meta
    for key, kind in NEEDED.items():
        if type(meta.get(key)) is not kind:
            raise UserError(f"{found}: its meta.json has no {key}: it is damaged, or another version's")
    try:
        config: Config = from_dict(meta["config"])
    except (TypeError, AttributeError):
        raise UserError(f"{found}: the config of its meta.json is damaged") from None
    if config.sample.sampler not in SAMPLERS:
        raise UserError(f"{found}: sampler {config.sample.sampler!r} is none of {', '.join(SAMPLERS)}")
    meta["config"] = to_dict(config)
    return config


def check_fit(found: Checkpoint) -> None:
    """Raise UserError unless a checkpoint's weights are those of the network that it describes."""
    with torch.device("meta"):
        own = {name: list(parameter.shape) for name, parameter in make_model(found.meta).named_parameters()}
    if own != found.manifest["shapes"]:
        different = sorted(name for name, shape in own.items() if found.manifest["shapes"].get(name) != shape)
        problem = different[0] if different else "there are more"
        raise UserError(f"{found}: its weights do not fit the model of its meta.json: {problem}")


def write_weights(found: Checkpoint, kind: str, path: Path) -> None:
    """A kind of a checkpoint's tensors, by parameter name, fp32. Its metadata tell the network's size and its data."""
    told = {key: found.meta[key] for key in TOLD if key in found.meta}
    told["codec"] = {key: value for key, value in told["codec"].items() if key != "location"}
    told |= {"model": found.meta["config"]["model"], "weights": kind}
    with open(path, "wb") as file:
        write(file, found.manifest["shapes"], found.one_by_one(kind), {"diffussm": json.dumps(told)})


def write_folder(
    found: Checkpoint, kind: str, weights: str, codec: Codec, scores: str, license: str, folder: Path
) -> None:
    """A pipeline of diffusers. ``weights`` tells their kind in words, ``scores`` is Markdown, ``license`` the hub's."""
    from diffussm.hub.card import model_card  # imports diffusers, which a file of weights does not need
    from diffussm.hub.export import write_pipeline

    card = model_card(found.meta, weights, scores, license)
    write_pipeline(folder, found.meta, codec, lambda path: write_weights(found, kind, path), card)


def scores_of(found: Checkpoint, source: str | None, weights: str) -> str:
    """The run's scores.json as Markdown, if it is of samples by these weights of this checkpoint; else empty."""
    from diffussm.hub.card import score_table

    for run in filter(None, (source, str(found.store).rstrip("/").rpartition("/")[0])):
        store = open_store(run)
        if store.exists("scores.json"):
            try:
                report = json.loads(bytes(store.read("scores.json")))
                samples = report["samples"]
                if (samples.get("manifest"), samples["weights"]) == (found.digest, weights):
                    return score_table(report)
            except (ValueError, TypeError, KeyError, AttributeError, IndexError):
                raise UserError(f"{store}/scores.json is damaged: delete it, or run tools/eval_fid.py again") from None
    return ""


def check_target(target: str) -> None:
    """Raise UserError where :func:`new_target` could not write."""
    there = "://" not in target and Path(target).exists()
    if "://" in target:
        if "/" not in target.split("://")[1].rstrip("/"):
            raise UserError(f"{target} is a bucket: add a name in it, such as {target.rstrip('/')}/model")
        store, name = _place(target)
        there = store.exists(name) or bool(store.list(f"{name}/"))
    if there:
        raise UserError(f"{target} exists: remove it, or choose another --out")


@contextmanager
def new_target(target: str) -> Iterator[Path]:
    """A path for a new file or folder, which in the end is complete at ``target``, a path or URL, or not there.

    Nothing is left where SIGTERM ends the process, which is its main thread's alone.

    Raises:
        UserError: somebody else has made ``target`` meanwhile.
    """
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        if "://" not in target:
            with atomic_path(target, replace=False) as temporary:
                yield temporary
                for file in (file for file in temporary.rglob("*") if file.is_file()):
                    fsync(file)
        else:
            store, name = _place(target)
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder) / name
                _upload(Path(folder) / name, store, name)
    except FileExistsError:
        raise UserError(f"{target} has been made by somebody else meanwhile: choose another --out") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _place(target: str) -> tuple[Store, str]:
    """The store that a URL is in, and its name there."""
    parent, _, name = target.rstrip("/").rpartition("/")
    return open_store(parent), name


def _upload(path: Path, store: Store, name: str) -> None:
    """Put a file, or a folder's files: the index last, none over another, and none of them where one fails."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()] or [path]
    done = []
    try:
        for file in sorted(files, key=lambda file: file.name == INDEX):
            place = (PurePosixPath(name) / file.relative_to(path).as_posix()).as_posix()
            store.put(place, file, if_absent=True)
            done.append(place)
    except BaseException:
        for place in done:
            with suppress(UserError, OSError):
                store.delete(place)
        raise
