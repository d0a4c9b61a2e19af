"""What DeepSpeed has torch compile on a CPU, and the locks that killed compilations leave behind."""

from __future__ import annotations

import contextlib
import glob
import os
import sys
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root


def extensions() -> Path:
    """Where torch keeps what DeepSpeed has it compile."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def announce_compilation() -> None:
    """Say that the first start takes longer, where it does."""
    if not any(extensions().rglob("deepspeed_shm_comm.so")):
        print("compiling DeepSpeed's CPU communication, once: about a minute", file=sys.stderr, flush=True)


def remove_stale_locks(folder: Path) -> None:
    """Remove the `lock` files of compilations that were killed: torch would wait for them for ever.

    A compilation that is under way keeps its lock file open, which only Linux tells us.
    """
    if sys.platform == "linux":
        for lock in folder.rglob("deepspeed_shm_comm/lock"):
            if not _is_open(lock):
                lock.unlink(missing_ok=True)


def _is_open(path: Path) -> bool:
    target = os.path.realpath(path)
    for descriptor in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # closed meanwhile, or another user's
            if os.readlink(descriptor) == target:
                return True
    return False
