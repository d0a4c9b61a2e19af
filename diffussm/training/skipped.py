"""Steps that were not taken since their loss or gradient was not finite: of which images, and how many in a row."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from diffussm.data.order import SampleOrder
from diffussm.data.reader import SampleReader
from diffussm.errors import UserError
from diffussm.files import write_atomically
from diffussm.training.cluster import Cluster

SHOWN = 5  # keys in the line on stderr


class Skipped:
    """The run's `skipped.jsonl`, a line a step: images seen before it, its cause, keys of the images.

    Where single images have a loss that is not finite, those are named; else, all of the batch.

    Args:
        run: folder of the run.
        images: seen at the start, here.
        state: what :meth:`state` was in the checkpoint; {} at the start of the run.
        most: steps in a row before the run stops.
        mine: this rank's part of a global batch.
    """

    def __init__(
        self,
        run: Path,
        images: int,
        state: dict[str, int],
        most: int,
        cluster: Cluster,
        order: SampleOrder,
        reader: SampleReader,
        mine: slice,
    ) -> None:
        self._path, self._most, self._mine = run / "skipped.jsonl", most, mine
        self._cluster, self._order, self._reader = cluster, order, reader
        self.total, self.in_a_row = state.get("total", 0), state.get("in_a_row", 0)
        if cluster.is_main and self._path.exists():  # a run that resumes meets again what it met after its checkpoint
            lines = self._path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["images"] < images]
            write_atomically(self._path, "".join(kept))

    def state(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def none(self) -> None:
        """The last step was taken."""
        self.in_a_row = 0

    def one(self, images: int, finite: torch.Tensor) -> None:
        """The step after ``images`` seen was not taken. Collective.

        Args:
            finite: bool [this rank's part of the batch], whether an image's loss is.

        Raises:
            UserError: there have been too many in a row.
        """
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        ids = self._order.step_ids(images // self._order.global_batch)
        parts: list[Any] = [None] * self._cluster.world_size
        dist.all_gather_object(parts, ids[self._mine][~finite.cpu().numpy()].tolist(), group=self._cluster.control)
        bad = [number for part in parts for number in part]
        cause = "loss" if bad else "gradient"
        if self._cluster.is_main:
            keys = self._reader.keys(np.array(bad) if bad else ids)
            with open(self._path, "a") as file:
                file.write(json.dumps({"images": images, "cause": cause, "keys": keys}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            more = f", ... ({len(keys)} images: {self._path})" if len(keys) > SHOWN else ""
            print(
                f"warning: the step after {images:,} images is skipped, its {cause} is not finite: "
                f"{', '.join(keys[:SHOWN])}{more}",
                file=sys.stderr,
                flush=True,
            )
        if self.in_a_row > self._most:
            raise UserError(
                f"{self.in_a_row} steps in a row had a {cause} that is not finite, the last after {images:,} images "
                f"({self._path} has their images' keys): go on from an older checkpoint with a lower train.lr or "
                f"train.clip, look at those images, or raise train.max_skipped"
            )
