"""What a run begins with: its newest whole checkpoint, or weights from elsewhere, at any number of ranks and stage.

Weights go into the plain model before DeepSpeed takes it apart; Adam's moments and the averages go, piece by piece, to
where this rank's optimizer keeps them. So no stage needs a loader of its own, and nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffussm.config import Config, to_dict
from diffussm.data.store import Store, open_store
from diffussm.errors import UserError
from diffussm.training import checkpoint
from diffussm.training.checkpoint import MANIFEST, Checkpoint, ema_kind
from diffussm.training.cluster import Cluster
from diffussm.training.ema import ShardedEMA
from diffussm.training.partition import MOMENTS, Partition
from diffussm.training.tensor_file import read_header, read_ranges

NESTED = ("ema", "model", "state_dict", "module")  # keys under which weights are often kept
SHOWN = 3  # names in a message
IN_TRANSFORMER = "diffusion_pytorch_model.safetensors"  # of a pipeline of diffusers


def find_checkpoint(store: Store, resume: str, cluster: Cluster) -> Checkpoint | None:
    """What to go on from by ``train.resume``. Each rank verifies its share of the files. Collective.

    Raises:
        UserError: ``resume`` is no whole checkpoint, or does not go with what the run has.
    """
    names = cluster.from_main(lambda: [found.name for found in checkpoint.complete(store)])
    verify = functools.partial(_verify, cluster=cluster)
    if resume != "auto" and names and (resume == "none" or str(Checkpoint.at(resume)) != f"{store}/{names[0]}"):
        raise UserError(f"train.resume {resume}, but {store}/{names[0]} exists: say auto, or choose another --run_dir")
    if resume == "none":
        return None
    if resume != "auto":
        found = Checkpoint.at(resume)
        if problem := verify(found):
            raise UserError(problem)
        return found
    for found in (Checkpoint(store, name) for name in names):
        problem = verify(found)
        if not problem:
            return found
        if cluster.is_main:
            print(f"warning: {problem}; trying the one before", file=sys.stderr, flush=True)
    return None


def _verify(found: Checkpoint, cluster: Cluster) -> str:
    """What is wrong with a checkpoint, or "". Collective."""
    problem = ""
    try:
        found.verify(slice(cluster.rank, None, cluster.world_size))
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{found} cannot be read: {error}"
    problems: list[Any] = [None] * cluster.world_size
    dist.all_gather_object(problems, problem, group=cluster.control)
    return next(filter(None, problems), "")


def check_fit(found: Checkpoint, config: Config) -> None:
    """Raise UserError unless a run with ``config`` goes on as the checkpoint's would have."""
    saved, now = found.meta["config"], to_dict(config)
    for name in ("model", "diffusion"):
        if saved[name] != now[name]:
            raise UserError(
                f"{found} was saved with {name} {saved[name]}, this run has {now[name]}: restore that, or change "
                f"--run_dir"
            )


def load_weights(model: nn.Module, read: Callable[[], dict[str, Tensor]], title: str, cluster: Cluster) -> None:
    """Give every rank's ``model`` the weights that ``read`` returns on rank 0. Collective.

    Raises:
        UserError: they are not this model's, or cannot be read.
    """

    def load() -> None:
        weights = read()
        own = {name: parameter.shape for name, parameter in model.named_parameters()}
        there = {name: tensor.shape for name, tensor in weights.items()}
        for problem, names in (
            ("lacks", own.keys() - there.keys()),
            ("has beside this model's", there.keys() - own.keys()),
            ("has of another size", {name for name in own.keys() & there.keys() if own[name] != there[name]}),
        ):
            if names:
                listed = ", ".join(
                    f"{name} {list(there.get(name, own.get(name)))}" for name in sorted(names)[:SHOWN]
                ) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
                raise UserError(f"{title} {problem} {listed}: it is of another model")
        for name, parameter in model.named_parameters():
            parameter.data.copy_(weights[name])

    cluster.from_main(load)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)


def weights_from(place: str) -> dict[str, Tensor]:
    """The weights of ``train.init_from`` by parameter name, fp32 on the CPU.

    Raises:
        UserError: there are none, or they could not be read without unpickling objects.
    """
    parent, _, name = place.rstrip("/").rpartition("/")
    store = open_store(parent or ".")
    if store.exists(f"{name}/{MANIFEST}"):
        found = Checkpoint.at(place)
        found.verify()
        return found.tensors(ema_kind(found.meta["ema_images"][0]))
    for weights in (IN_TRANSFORMER, f"transformer/{IN_TRANSFORMER}"):
        if store.exists(f"{name}/{weights}"):
            return _read_safetensors(store, f"{name}/{weights}")
    if not store.exists(name):
        raise UserError(
            f"train.init_from {place}: there is neither a checkpoint nor a file, nor a pipeline of diffusers"
        )
    if name.endswith(".safetensors"):
        return _read_safetensors(store, name)
    if "://" in place:
        raise UserError(f"train.init_from {place} is neither a checkpoint nor a .safetensors file, nor a pipeline")
    return _read_torch(Path(place))


def _read_safetensors(store: Store, name: str) -> dict[str, Tensor]:
    read = functools.partial(store.read, name)
    entries = read_header(read, store.stat(name).size, f"{store}/{name}")
    tensors = {key: torch.empty(entry.shape, dtype=entry.dtype) for key, entry in entries.items()}
    read_ranges(read, [(entries[key].start, tensor.view(-1)) for key, tensor in tensors.items()])
    return {key: tensor.float() for key, tensor in tensors.items()}


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        table = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is refused: it does not load as plain tensors, and objects are never unpickled "
            f"({type(error).__name__}): convert it to safetensors where you trust it"
        ) from error
    for key in NESTED:
        if isinstance(table, dict) and isinstance(table.get(key), dict):
            table = table[key]
    if not isinstance(table, dict) or not all(isinstance(tensor, Tensor) for tensor in table.values()):
        raise UserError(f"{path} is not a table of tensors by parameter name")
    return {str(key): tensor.float() for key, tensor in table.items()}


def restore(found: Checkpoint, partition: Partition, ema: ShardedEMA) -> list[float]:
    """Adam's state and the averages of a checkpoint, on this rank; the weights are the model's already. Collective.

    Returns:
        Lengths of averages that it does not have: they begin with its weights.
    """
    there = {ema_kind(length) for length in found.meta["ema_images"]}
    missing = [length for length in ema.shadows if ema_kind(length) not in there]
    kinds = {key: partition.moments(key) for key in MOMENTS}
    kinds |= {ema_kind(length): shadow for length, shadow in ema.shadows.items() if length not in missing}
    found.fill((kind, f.name, f.start, f.of(flats)) for kind, flats in kinds.items() for f in partition.fragments)
    for flats in kinds.values():
        partition.complete(flats)
    partition.steps = found.meta["adam_steps"]
    return missing
