"""A set of images on its way into one .npz: drawn part by part, by any number of processes in as many goes as it takes.

    samples/parts/samples-0f3a51c29be7d804/     named by a digest of what is drawn
        description.json                        what that is
        part-00000.npy ...                      uint8 [PART, H, W, 3], each complete or absent

So a part that is there is one that was to be drawn, whoever drew it; what a killed run has left of something else, or a
process that outlived it still writes, is in another folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from diffussm.errors import UserError
from diffussm.files import atomic_path, remove_temporaries_of, write_array, write_json

PART = 128  # images of a part, whatever the number of processes: parts of one go are good for the next


class Parts:
    """The parts of ``count`` images.

    Args:
        folder: for the parts of all sets.
        title: of this set.
        count: images.
        description: all that the images depend on, as JSON: sets that agree in it, and in ``count``, are the same.
    """

    def __init__(self, folder: Path, title: str, count: int, description: dict[str, Any]) -> None:
        self.title, self.count = title, count
        self._all, self._description = folder, {"count": count, "part": PART, **description}
        digest = hashlib.sha256(json.dumps(self._description, sort_keys=True).encode()).hexdigest()
        self._folder = folder / f"{title}-{digest[:16]}"

    def __len__(self) -> int:
        return -(-self.count // PART)

    def __contains__(self, number: int) -> bool:
        """Whether a part is drawn."""
        return self._path(number).exists()

    def batches(self, number: int, size: int) -> list[range]:
        """The numbers of a part's images, up to ``size`` at once: no batch has images of two parts."""
        end = min((number + 1) * PART, self.count)
        return [range(start, min(start + size, end)) for start in range(number * PART, end, size)]

    def prepare(self) -> int:
        """Remove parts of other sets of this title; the number of images that are drawn already."""
        for folder in self._all.glob(f"{self.title}-*"):
            if folder != self._folder:
                shutil.rmtree(folder)
        write_json(self._folder / "description.json", self._description)
        there = {path.name for path in self._folder.iterdir()}  # over NFS a file that was asked for in vain stays away
        return sum(len(self.batches(n, PART)[0]) for n in range(len(self)) if self._path(n).name in there)

    def check(self) -> None:
        """UserError where another process has prepared to draw something else, or on another kind of processor."""
        if not self._folder.exists():
            raise UserError(
                f"{self._folder} is not there: the processes see different folders, would draw different images, or "
                f"only some have a GPU"
            )

    def save(self, number: int, images_NHWC: np.ndarray) -> None:
        """Keep a part's uint8 images of 1 or 3 channels; grey becomes RGB, as all readers of an .npz expect."""
        colour = images_NHWC if images_NHWC.shape[3] == 3 else images_NHWC.repeat(3, axis=3)
        with atomic_path(self._path(number)) as temporary:
            np.save(temporary, colour)

    def read(self, indices: Iterable[int]) -> np.ndarray:
        """Some of the images, uint8 [len(indices), H, W, 3]. Raises as :meth:`merge`."""
        return np.stack([np.array(self._load(index // PART, mmap_mode="r")[index % PART]) for index in indices])

    def merge(self, path: Path, labels: list[int] | None) -> None:
        """Write ADM's layout: ``arr_0`` uint8 [count, H, W, 3], and ``arr_1`` the labels where there are some.

        No more than a part is in memory.

        Raises:
            UserError: a part is missing or damaged.
        """
        remove_temporaries_of(path)
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            shape = self.count, *self._load(0).shape[1:]
            write_array(archive, "arr_0", shape, np.dtype(np.uint8), map(self._load, range(len(self))))
            if labels is not None:
                values = np.array(labels)
                write_array(archive, "arr_1", values.shape, values.dtype, [values])

    def _load(self, number: int, mmap_mode: str | None = None) -> np.ndarray:
        try:
            return np.load(self._path(number), mmap_mode=mmap_mode, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{self._path(number)} cannot be read ({error}): delete it, if it is there, and run the same command "
                f"again, which draws it anew"
            ) from error

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.npy"
