"""What a run shows: a log of scalars (JSON lines and TensorBoard), pictures, and a line of progress on the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from diffussm.errors import needs
from diffussm.files import write_atomically

QUIET_SECONDS = 20  # between two lines of progress where stderr is a file


class Monitor:
    """The records of a run, written by one rank.

    A run that resumes from a checkpoint loses the records after it: log and curves are those of one unbroken run.

    Args:
        run: folder of the run.
        images: images seen at the start.
        total_images: at the end.
    """

    def __init__(self, run: Path, images: int, total_images: int) -> None:
        with needs("training", "train"):
            from torch.utils.tensorboard import SummaryWriter

        self.path = run / "log.jsonl"
        kept = [line for line in _complete_lines(self.path) if json.loads(line)["images"] <= images]
        write_atomically(self.path, "".join(kept))
        self.file = open(self.path, "a")  # noqa: SIM115
        self.lock = threading.Lock()
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=images + 1)
        on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total_images,
            initial=images,
            dynamic_ncols=True,
            disable=not on_terminal,
            bar_format="{percentage:3.0f}%|{bar}| {n:,}/{total:,} images{postfix}",
        )
        self.quiet = not on_terminal
        self.said = -math.inf

    def scalars(self, images: int, values: dict[str, float]) -> None:
        """Record values at ``images`` seen; one that is not finite is null in the JSON. For any thread."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.lock:
            self.file.write(json.dumps({"images": images, **finite}) + "\n")
            self.file.flush()
        for name, value in values.items():
            self.writer.add_scalar(name, value, images)

    def progress(self, images: int) -> None:
        """Move the bar."""
        self.bar.update(images - self.bar.n)

    def report(self, images: int, **values: str) -> None:
        """Show values beside the bar; where stderr is no terminal, print a line now and then."""
        self.bar.set_postfix(values)
        if self.quiet and (time.monotonic() - self.said > QUIET_SECONDS or images >= self.bar.total):
            self.said = time.monotonic()
            self.say(f"{images:,} of {self.bar.total:,} images  " + "  ".join(f"{k} {v}" for k, v in values.items()))

    def picture(self, name: str, images: int, picture_HWC: np.ndarray) -> None:
        """Show a uint8 picture in TensorBoard."""
        self.writer.add_image(name, picture_HWC, images, dataformats="HWC")
        self.writer.flush()

    def say(self, line: str) -> None:
        """A line that leaves the bar intact."""
        self.bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.writer.close()
        self.bar.close()


def _complete_lines(path: Path) -> list[str]:
    """The log's whole lines: a kill can leave half of one at the end."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def duration(seconds: float) -> str:
    """3725 → 1:02:05."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def log_of(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl."""
    return [json.loads(line) for line in _complete_lines(Path(run) / "log.jsonl")]
