"""Sets of images to encode: a module a kind. `open_source` is the door."""

from __future__ import annotations

from pathlib import Path

from diffussm.data.sources.base import ImageSource
from diffussm.data.sources.fashion_mnist import SPLITS, load_fashion_mnist
from diffussm.data.sources.folder import FolderImages
from diffussm.data.sources.lsun import open_lsun
from diffussm.data.sources.tars import TarImages
from diffussm.errors import UserError

__all__ = ["SOURCES", "SPLITS", "ImageSource", "open_source"]

SOURCES = ("fashion-mnist", "folder", "lsun", "webdataset")


def open_source(
    kind: str,
    input: str | None = None,
    *,
    split: str = "train",
    size: int = 256,
    resize: str = "adm",
    raw: Path | None = None,
    classes: int | None = None,
) -> ImageSource:
    """The images of a source of ``SOURCES``.

    Args:
        input: where they are: a folder, an LMDB, tars; not for fashion-mnist.
        split, raw: of fashion-mnist: train or test, and a folder for its files.
        size, resize: side of the square that an image becomes, and how; fashion-mnist stays as it is.
        classes: of webdataset: how many its labels name.

    Raises:
        UserError: they are not there, or not what ``kind`` says.
    """
    if kind == "fashion-mnist":
        return load_fashion_mnist(split, raw or Path("data/fashion-mnist-raw"))
    if not input:
        raise UserError(f"--source {kind} needs --input: where the images are")
    if kind == "folder":
        return FolderImages(input, size, resize)
    if kind == "lsun":
        return open_lsun(input, size, resize)
    return TarImages(input, classes, size, resize)
