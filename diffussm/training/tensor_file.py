"""Safetensors files as bytes: written in one copy, and read by ranges from any store. Nothing is ever unpickled.

The format: 8 bytes, the header's length (little endian); the header, JSON {name: {dtype, shape, data_offsets}}; data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from diffussm.data.store import Buffer
from diffussm.errors import UserError

MAX_HEADER_BYTES = 100 << 20
GAP_BYTES = 1 << 20  # between two ranges: reading over it is cheaper than asking again
FP32_BYTES = 4
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def pack(tensors: dict[str, Tensor]) -> bytearray:
    """A safetensors file of fp32 tensors, which may live on any device and be views."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    head = _head(shapes, {})
    content = bytearray(len(head) + sum(tensor.numel() for tensor in tensors.values()) * FP32_BYTES)
    content[: len(head)] = head
    offset = len(head)
    for tensor in tensors.values():
        if tensor.numel():
            torch.frombuffer(content, dtype=torch.float32, count=tensor.numel(), offset=offset).copy_(tensor.flatten())
            offset += tensor.numel() * FP32_BYTES
    return content


def write(
    file: IO[bytes], shapes: Mapping[str, Sequence[int]], tensors: Iterable[Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file of fp32 tensors on the CPU that come one by one, in the order of ``shapes``."""
    file.write(_head(shapes, metadata))
    for shape, tensor in zip(shapes.values(), tensors, strict=True):
        if list(tensor.shape) != list(shape) or tensor.dtype != torch.float32:
            raise ValueError(f"a tensor of {tensor.dtype} {list(tensor.shape)} where float32 {list(shape)} was told")
        file.write(tensor.contiguous().numpy().data)


def _head(shapes: Mapping[str, Sequence[int]], metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * FP32_BYTES
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


Read = Callable[[int, int], Buffer]  # start, length → bytes


def read_header(read: Read, size: int, title: str) -> dict[str, Entry]:
    """The tensors of a safetensors file of ``size`` bytes.

    Raises:
        UserError: it is none, or its header points beyond it.
    """
    length, table = _table(read, size, title)
    try:
        entries = {name: _entry(item, size - 8 - length) for name, item in table.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{title} is not a safetensors file: {error}") from error
    return {
        name: Entry(entry.dtype, entry.shape, entry.start + 8 + length, entry.end + 8 + length)
        for name, entry in entries.items()
    }


def read_names(read: Read, size: int, title: str) -> list[str]:
    """Those of its tensors, whatever their types. UserError where it is no safetensors file."""
    return list(_table(read, size, title)[1])


def _table(read: Read, size: int, title: str) -> tuple[int, dict[str, Any]]:
    """The header's length in bytes, and what it says of each tensor."""
    try:
        (length,) = struct.unpack("<Q", bytes(read(0, 8)))
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError("its header is longer than it")
        table = json.loads(bytes(read(8, length)))
        return length, {name: item for name, item in table.items() if name != "__metadata__"}
    except (ValueError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise UserError(f"{title} is not a safetensors file: {error}") from error


def _entry(item: dict[str, object], data_bytes: int) -> Entry:
    shape, (start, end) = tuple(item["shape"]), item["data_offsets"]  # type: ignore[misc]
    dtype = DTYPES[item["dtype"]]  # type: ignore[index]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or not start <= end <= data_bytes:
        raise ValueError("a tensor lies outside it")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's size is not its shape's")
    return Entry(dtype, shape, start, end)


def read_ranges(read: Read, wanted: Iterable[tuple[int, Tensor]]) -> None:
    """Fill contiguous tensors on the CPU with the bytes from ``start`` on: neighbours by one read.

    Args:
        wanted: (start, tensor to fill) of one file.
    """
    group: list[tuple[int, Tensor]] = []
    for start, target in sorted(wanted, key=lambda item: item[0]):
        if group and start - _end(group[-1]) > GAP_BYTES:
            _read_group(read, group)
            group = []
        group.append((start, target))
    if group:
        _read_group(read, group)


def _end(item: tuple[int, Tensor]) -> int:
    return item[0] + item[1].nbytes


def _read_group(read: Read, group: list[tuple[int, Tensor]]) -> None:
    first, end = group[0][0], max(map(_end, group))
    data = bytearray(read(first, end - first))
    if len(data) < end - first:
        raise EOFError("the file ends short")
    for start, target in group:
        if target.numel():
            target.copy_(torch.frombuffer(data, dtype=target.dtype, count=target.numel(), offset=start - first))
