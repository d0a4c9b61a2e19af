"""What is noted of each finished shard while an encoding is under way: an object a shard, until there is an index."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diffussm.data.index import SAMPLE_DTYPE, Shard
from diffussm.data.sources.base import Version
from diffussm.data.store import Store
from diffussm.errors import UserError

RECORD_PREFIX = "finished-"


@dataclass(frozen=True)
class LeftOut:
    """An image that could not be decoded."""

    name: str
    problem: str


@dataclass(frozen=True)
class Record:
    """A finished shard. ``shard`` is None where no image could be decoded: then none is written."""

    description: dict[str, Any]  # of the whole encoding
    shard: Shard | None
    rows: np.ndarray  # of SAMPLE_DTYPE: the shard's part of the table of samples
    left_out: list[LeftOut]
    versions: list[Version]  # of the files that it was made of


def save_record(store: Store, number: int, record: Record) -> None:
    """Note that the shard numbered ``number`` is finished."""
    table = {
        "description": record.description,
        "shard": record.shard and asdict(record.shard),
        "rows": record.rows.tolist(),
        "left_out": [asdict(bad) for bad in record.left_out],
        "versions": record.versions,
    }
    store.put(record_name(number), json.dumps(table).encode())


def load_record(store: Store, number: int) -> Record | None:
    """The record of the shard numbered ``number``; None unless it is finished, and there at its full size."""
    try:
        table = json.loads(bytes(store.read(record_name(number))))
        shard = None if table["shard"] is None else Shard(**table["shard"])
        rows = np.array([tuple(row) for row in table["rows"]], SAMPLE_DTYPE)
        left_out = [LeftOut(**bad) for bad in table["left_out"]]
        record = Record(table["description"], shard, rows, left_out, list(table["versions"]))
        return record if shard is None or store.stat(shard.name).size == shard.size else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def remove_records(store: Store) -> None:
    """Remove all records: the index tells what they told. Processes may do so at the same time."""
    for name in store.list(RECORD_PREFIX):
        store.delete(name)


def refuse_another(store: Store, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """UserError unless ``found``, which describes the encoding in ``store``, agrees with ``wanted``.

    Weights are the same wherever they lie: the codec's own hash of them tells.
    """
    for key, value in wanted.items():
        if _without_location(found.get(key)) != _without_location(value):
            raise UserError(
                f"{store} already holds another encoding: its {key} is {found.get(key)}, not {value}: "
                f"choose another folder or delete this one"
            )


def record_name(number: int) -> str:
    """The name of the record of the shard numbered ``number``."""
    return f"{RECORD_PREFIX}{number:05d}.json"


def _without_location(value: Any) -> Any:
    return {key: part for key, part in value.items() if key != "location"} if isinstance(value, dict) else value
