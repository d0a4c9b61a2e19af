"""Score samples against real images: `tools/eval_fid.py`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from diffussm.commands.common import Parser, emit_json
from diffussm.errors import UserError
from diffussm.evaluation.extractors import EXTRACTORS, make_extractor
from diffussm.evaluation.images import read_images, read_reference
from diffussm.evaluation.score import METRICS, prepare_reference, score
from diffussm.files import write_json

SAMPLES = "runs/*/samples/samples.npz"
ENOUGH = 10_000  # images from which the bias of FID is small


def main() -> None:
    arguments = parse_arguments()
    samples = arguments.samples or newest_samples()
    record = read_record(samples)
    reference = arguments.reference or record.get("data", {}).get("reference")
    floor = arguments.floor or record.get("data", {}).get("path")
    against = list(arguments.against)
    if record.get("untrained"):
        against.insert(0, ("untrained", samples.parent / record["untrained"]))
    if reference is None:
        raise UserError(f"nothing to compare {samples} with: give --reference DATASET_OR_NPZ")

    images = read_images(samples)
    extractor = make_extractor(arguments.extractor, arguments.inception_weights)  # what it lacks is told at once
    sets = [("trained" if record else samples.stem, images)]
    sets += [(name, read_images(path, len(images))) for name, path in against]  # as many: FID depends on their number
    if floor:
        sets.insert(0, (f"real {Path(floor).name} (floor)", read_images(floor, len(images))))
    real = read_reference(reference, arguments.max_reference)
    prepared = prepare_reference(real, extractor)
    report = {
        "extractor": extractor.name,
        "reference": {"path": str(reference), "images": prepared.count},
        "samples": {"path": str(samples), **record},
        "rows": [{"name": name, **score(images, prepared, extractor, name)} for name, images in sets],
    }
    if arguments.json != "-":
        print_report(report)
    if record and samples.parent.name == "samples":
        write_json(samples.parent.parent / "scores.json", report)
    emit_json(arguments.json, report)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "Score samples: FID, sFID, inception score, precision and recall. Untrained samples and other real images, "
        "scored beside them, say what a figure means. A run's figures are also written to its scores.json.",
        "python tools/eval_fid.py --max-reference 2000",
    )
    named = {"type": named_file, "action": "append", "default": [], "metavar": "NAME=FILE"}
    parser.add_argument("samples", nargs="?", type=Path, metavar="SAMPLES", help=f"an .npz (default: newest {SAMPLES})")
    parser.add_argument("--reference", metavar="REAL", help="real images (default: those that the run names)")
    parser.add_argument("--floor", metavar="REAL", help="real images to score like samples (default: likewise)")
    parser.add_argument("--against", **named, help="further samples to score beside them; may be repeated")
    parser.add_argument("--extractor", choices=EXTRACTORS, help="(default: the first, or what the weights are of)")
    weights = "pytorch-fid's pt_inception-2015-12-05-6726825d.pth (default: downloaded once, to ~/.cache/diffussm)"
    parser.add_argument("--inception-weights", metavar="FILE", help=weights)
    parser.add_argument("--max-reference", type=int, default=10_000, metavar="N", help="at most (default: %(default)s)")
    parser.add_json_option()
    arguments = parser.parse_args()
    if arguments.max_reference < 2:
        parser.error("--max-reference must be at least 2")
    return arguments


def named_file(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, path


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
    path = samples.with_suffix(".json")
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: draw the samples again with python tools/sample.py") from None


def print_report(report: dict[str, Any]) -> None:
    reference, rows = report["reference"], report["rows"]
    count = f"{reference['images']:,} images" if reference["images"] else "statistics"
    print(f"features of {report['extractor']}, against {reference['path']} ({count})")
    width = max(len(row["name"]) for row in rows)
    print(" " * width, *(f"{heading:>9}" for heading in (*METRICS, "images")))
    for row in rows:
        values = [row[f"{metric} ({report['extractor']})"] for metric in METRICS]
        cells = ["–".rjust(9) if value is None else f"{value:9.3f}" for value in values]
        print(row["name"].ljust(width), *cells, f"{row['images']:9,}")
    if any(row["images"] < ENOUGH for row in rows):
        print(f"FID of fewer than {ENOUGH:,} images comes out too high: compare only rows of as many images.")
    print(f"Figures by {report['extractor']} compare with no other extractor's.")
