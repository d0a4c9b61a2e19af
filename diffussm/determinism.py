"""Arithmetic whose results do not depend on the moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def same_bits_each_time() -> Iterator[None]:
    """On a GPU: full fp32, by algorithms that are neither chosen by a stopwatch nor add up in any order."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
