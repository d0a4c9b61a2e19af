"""Data sets that a run can make for itself."""

from __future__ import annotations

from pathlib import Path

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.encode import encode
from diffussm.data.index import INDEX_NAME, Index
from diffussm.data.sources import SPLITS
from diffussm.data.sources.fashion_mnist import load_fashion_mnist
from diffussm.data.store import open_store
from diffussm.errors import UserError

PREPARABLE = {"fashion-mnist": load_fashion_mnist}


def prepare(name: str, path: str | Path) -> None:
    """See to it that data set ``name`` lies encoded, as its own pixels, in ``path/train`` and ``path/test``.

    Processes may do so at the same time. What is there already, however sharded, is taken as it is.

    Raises:
        UserError: the name is unknown, the images can be had nowhere, or ``path`` holds another data set.
    """
    if name not in PREPARABLE:
        raise UserError(f"unknown data set {name!r}: this version can prepare {', '.join(PREPARABLE)}")
    for split in SPLITS:
        store = open_store(f"{path}/{split}")
        if store.exists(INDEX_NAME):
            found = Index.load(store).source.get("name")
            if found != f"{name}/{split}":
                raise UserError(f"{store} holds {found}, not {name}/{split}: choose another folder")
            continue
        source = PREPARABLE[name](split, raw_folder(path, name))
        encode(source, PixelCodec(*source.images.shape[1:]), store)


def ensure_encoded(name: str, path: str | Path) -> None:
    """Have ``path``, the folder of one split of data set ``name``, encoded if it holds no data set yet; and the other
    split beside it.

    Raises:
        UserError: as :func:`prepare`; or the folder is not named as a split is.
    """
    store = open_store(path)
    if store.exists(INDEX_NAME):
        return
    folder = Path(str(store))
    if folder.name not in SPLITS:
        raise UserError(
            f"no {INDEX_NAME} in {store}, and {name} can be prepared only in a folder {' or '.join(SPLITS)}"
        )
    prepare(name, folder.parent)


def raw_folder(out: str | Path, name: str) -> Path:
    """Where the files of source ``name`` are looked for, and downloaded to, when ``out`` is to be made from them."""
    return Path(str(open_store(out))).parent / f"{name}-raw"
