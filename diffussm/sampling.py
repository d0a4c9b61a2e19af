"""Images from a checkpoint's model: drawn by all processes, stored as ADM stores them, and laid out to be looked at."""

from __future__ import annotations

import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffussm.autoencoders.codec import Codec
from diffussm.data.workers import Progress, Workers, from_first
from diffussm.diffusion.generate import generate
from diffussm.diffusion.schedule import Schedule
from diffussm.files import write_json
from diffussm.pictures import grid, save_png
from diffussm.sample_parts import Parts
from diffussm.sample_request import Request
from diffussm.threads import map_batches

PARTS, RECORD, GRID = "parts", "samples.json", "grid.png"
GRID_PER_CLASS, GRID_UNCONDITIONAL, GRID_CLASSES = 10, 64, 20  # images shown


def draw(
    request: Request, codec: Codec, device: torch.device, out: Path, title: str, workers: Workers
) -> tuple[Parts, float]:
    """Draw what is asked for in parts below ``out``, but for those that are there, together with the other workers.

    Args:
        codec: that decodes the model's latents.
        title: of the parts and of the progress bar.
        workers: those who share the work; each calls this function with the same arguments.

    Returns:
        The parts, on rank 0 all of them; and how many images a second all workers have drawn.

    Raises:
        UserError: the checkpoint has no such weights, or another process is lost.
    """
    model = request.model().to(device).freeze()
    parts = Parts(out / PARTS, title, request.count, {**request.description(), "device": device.type})
    kept = from_first(workers, f"{title}: kept", parts.prepare)
    began = time.perf_counter()
    with Progress(title, len(parts), request.count, workers, begin=kept, steps=request.settings.steps) as progress:
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        draw_batch = functools.partial(_draw_batch, request, model, codec, progress)
        _fill(parts, draw_batch, request.batch, threads, progress)
        if workers.rank == 0:
            progress.wait_for_shards()
    return parts, (request.count - kept) / (time.perf_counter() - began)


def _fill(
    parts: Parts, draw_batch: Callable[[range], np.ndarray], batch: int, threads: int, progress: Progress
) -> None:
    """Claim parts until there are none left, and draw those that are missing, by as many batches at once as threads."""
    at_once = math.ceil(threads / len(parts.batches(0, batch)))
    missing = _claim_missing(parts, progress)
    while numbers := list(islice(missing, at_once)):
        batches = [parts.batches(number, batch) for number in numbers]
        images = iter(list((map_batches if threads > 1 else map)(draw_batch, chain(*batches))))
        for number, of_part in zip(numbers, batches, strict=True):
            parts.save(number, np.concatenate(list(islice(images, len(of_part)))))
            progress.add_shard()


def _claim_missing(parts: Parts, progress: Progress) -> Iterator[int]:
    while (number := progress.claim()) is not None:
        parts.check()  # now: whoever comes so late that nothing is left to claim may find them merged and removed
        if number in parts:
            progress.add_shard()
        else:
            yield number


def _draw_batch(request: Request, model: nn.Module, codec: Codec, progress: Progress, indices: range) -> np.ndarray:
    """uint8 images [len(indices), H, W, channels]; each sampling step is counted."""

    def count_steps(steps: range) -> Iterator[int]:
        for step in steps:
            yield step
            progress.add_steps(len(indices))

    meta, settings, device = request.checkpoint.meta, request.settings, next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=request.precision == "bf16"):
        latents = generate(
            model,
            Schedule.linear(meta["config"]["diffusion"]["steps"]).respace(settings.steps),
            meta["latent_shape"],
            indices,
            request.labels(indices),
            num_classes=meta["num_classes"],
            sampler=settings.sampler,
            guidance=settings.guidance,
            guidance_channels=request.guidance_channels,
            seed=request.seed,
            device=device,
            progress=count_steps,
        )
    return codec.decode(latents, request.rounding)


def drawn_before(out: Path, identity: str) -> dict[str, Any] | None:
    """The record of samples that are there already, if they are those of ``identity``."""
    try:
        record = json.loads((out / RECORD).read_text())
        files = [record[name] for name in ("samples", "untrained") if name in record]
        whole = record["identity"] == identity and all((out / file).is_file() for file in (*files, GRID))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if whole else None


def publish(sets: dict[str, Parts], request: Request, out: Path, record: dict[str, Any]) -> None:
    """Make NAME.npz of each set's parts, grid.png and, last, samples.json; then remove the parts.

    Raises:
        UserError: a part is missing or damaged.
    """
    (out / RECORD).unlink(missing_ok=True)  # it describes the images that are about to be replaced
    labels = request.labels(range(request.count))
    for title, parts in sets.items():
        parts.merge(out / f"{title}.npz", labels)
    save_png(out / GRID, class_rows(sets["samples"], labels, shown_classes(request)))
    write_json(out / RECORD, record)
    shutil.rmtree(out / PARTS)


def shown_classes(request: Request) -> list[int]:
    """Those that have a row in grid.png: the first that have images."""
    drawn = set(request.labels(range(request.count)) or ())
    return [c for c in request.classes if c in drawn][:GRID_CLASSES]


def class_rows(parts: Parts, labels: list[int] | None, classes: list[int]) -> np.ndarray:
    """A picture with a row for each of ``classes``, which all have images; without labels, rows of 8."""
    columns, indices = 8, np.arange(min(parts.count, GRID_UNCONDITIONAL))
    if labels is not None:
        of_class = [np.flatnonzero(np.array(labels) == c) for c in classes]
        columns = min(GRID_PER_CLASS, *map(len, of_class))
        indices = np.concatenate([images[:columns] for images in of_class])
    images = parts.read(indices)
    return grid(images, columns, zoom=max(1, 64 // images.shape[1]))
