"""Files that are complete or absent: write to a temporary name, fsync, rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from diffussm.errors import UserError

TEMPORARY_FOLDER = re.compile(r"\.(.+)\.[a-z0-9_]{8}")  # of atomic_path; it holds a file of that name, or nothing yet
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def atomic_path(path: str | Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is fsynced and renamed to ``path``, on failure removed.

    A process that is killed meanwhile leaves a hidden folder: :func:`remove_temporaries`.

    Raises:
        FileExistsError: ``path`` exists, and ``replace`` is False, or a folder was made.
        OSError: the disk or the quota is full; it names ``path``.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            fsync(temporary)
            if replace or temporary.is_dir():  # which takes the place of nothing but an empty folder
                os.replace(temporary, path)
            else:
                os.link(temporary, path)
        fsync(path.parent)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR) and str(error.filename2) == str(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        raise


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Replace the content of ``path`` in one step: a reader sees the old bytes or the new ones, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def write_array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]
) -> None:
    """Add an array to an .npz that is being written, from its rows block by block: no more than one is in memory."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, which does not exist yet, or copy it: to another disk, or where it is another user's.

    As a new file would have them are owner, group and permissions of ``target``, and, where it is one file with
    ``source``, of that.
    """
    target.touch()
    new, old = target.stat(), source.stat()
    if (old.st_dev, old.st_uid, old.st_gid) == (new.st_dev, new.st_uid, new.st_gid):
        target.unlink()
        with suppress(OSError):  # a file system without links, or a file that has too many
            os.link(source.resolve(), target)
    if target.exists() and target.samefile(source):
        target.chmod(stat.S_IMODE(new.st_mode))
    else:
        shutil.copyfile(source, target)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes have left of :func:`atomic_path`, at any depth, as far as this user may.

    Nobody may be writing there meanwhile.
    """
    for parent, folders, _ in os.walk(folder):
        for name in folders:
            path, match = Path(parent, name), TEMPORARY_FOLDER.fullmatch(name)
            if match and not path.is_symlink():
                with suppress(FileNotFoundError, PermissionError):
                    inside = list(path.iterdir())
                    if all(file.name == match[1] and file.is_file() for file in inside):
                        shutil.rmtree(path)
        folders[:] = [name for name in folders if name[0] != "."]


def remove_temporaries_of(path: Path) -> None:
    """Likewise, of one file, beside which others may be being written."""
    for folder in path.parent.glob(f".{path.name}.*"):
        if (match := TEMPORARY_FOLDER.fullmatch(folder.name)) and match[1] == path.name and folder.is_dir():
            shutil.rmtree(folder)


def fsync(path: str | Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """Hex sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep the other threads and processes out that call this for the same ``path``, which they wait for.

    An empty hidden file beside it stays: were it removed, two could hold the lock, each on a file of its own.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hold_lock(path: str | Path, note: str = "", gives_way: Callable[[str], bool] = lambda holder: False) -> IO[str]:
    """Lock a file for as long as the result is open; the system unlocks it however this process ends.

    Args:
        note: what the file says of this process beside its number and host.
        gives_way: whether the one that holds the lock, by what the file says, has lost the right to it. It keeps its
            lock on a file that no longer has this name.

    Raises:
        UserError: another process holds it; the line names that process.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        if gives_way(holder):
            path.unlink(missing_ok=True)
            return hold_lock(path, note)
        raise UserError(f"{path.parent} is in use by {holder}: wait until it ends, or stop it") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}{note and f' ({note})'}\n")
    file.flush()
    return file
