"""What `tools/eval_fid.py` finds of a run to score, and the table that it prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from diffussm.errors import UserError
from diffussm.evaluation.score import METRICS

SAMPLES = "runs/*/samples/samples.npz"
ENOUGH = 10_000  # images from which the bias of FID is small


def newest_samples() -> Path:
    """The samples of the run that drew some last."""
    found = sorted(Path().glob(SAMPLES), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"nothing to score: no {SAMPLES} here: draw some with python tools/sample.py, or name a file")
    samples = found[-1]
    for latest in Path().glob("runs/*/checkpoints/latest"):
        run = latest.parent.parent
        if run != samples.parent.parent and latest.stat().st_mtime > samples.stat().st_mtime:
            print(f"note: {run} is newer, and has no samples: python tools/sample.py {run}", file=sys.stderr)
    return samples


def read_record(samples: Path) -> dict[str, Any]:
    """What tools/sample.py wrote beside a run's samples on how it drew them; empty for other samples."""
    path = samples.parent / f"{samples.stem}.json"
    if samples.suffix != ".npz" or not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        if isinstance(record, dict) and record.get("samples") != samples.name:
            return {}  # of something else
        for place in (record["data"]["path"], record["data"]["reference"], record.get("untrained")):
            if not isinstance(place, str | None):
                raise TypeError(place)
        return record
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is damaged: draw the samples again with python tools/sample.py") from None


def print_report(report: dict[str, Any]) -> None:
    reference, rows, extractor = report["reference"], report["rows"], report["extractor"]
    count = f"{reference['images']:,} images" if reference["images"] else "statistics"
    print(f"features of {extractor}, against {reference['path']} ({count})")
    width = max(len(row["name"]) for row in rows)
    print(" " * width, *(f"{heading:>9}" for heading in (*METRICS, "images")))
    for row in rows:
        values = [row[f"{metric} ({extractor})"] for metric in METRICS]
        cells = ["–".rjust(9) if value is None else f"{value:9.3f}" for value in values]
        print(row["name"].ljust(width), *cells, f"{row['images']:9,}")
    for row in rows:
        if ends := row.get(f"FID 95% ({extractor})"):
            print(
                f"FID of {row['name']}: {ends[0]:.3f} to {ends[1]:.3f} (95 % of sets of as many images, by bootstrap)"
            )
    for note in report["notes"]:
        print(note)


def notes_on(rows: list[dict[str, Any]], reference_count: int | None, extractor: str) -> list[str]:
    """What the figures do not say."""
    notes = []
    if any(row["images"] < ENOUGH for row in rows):
        notes.append(f"FID of fewer than {ENOUGH:,} images comes out too high: compare only rows of as many images.")
    if reference_count is not None and reference_count < ENOUGH:
        notes.append(f"So does a reference of fewer than {ENOUGH:,}: compare only figures against this one.")
    return [*notes, f"Figures by {extractor} compare with no other extractor's."]
