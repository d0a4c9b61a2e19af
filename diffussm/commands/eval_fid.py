"""Score samples against real images: `tools/eval_fid.py`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from diffussm.commands.common import Parser, emit_json
from diffussm.commands.scores import SAMPLES, newest_samples, print_report, read_record
from diffussm.data.workers import Workers
from diffussm.errors import UserError
from diffussm.evaluation.extractors import EXTRACTORS, make_extractor
from diffussm.evaluation.features import Extractor
from diffussm.evaluation.scoring import Scoring
from diffussm.files import write_json
from diffussm.training.cluster import choose_device
from diffussm.training.workers import join

EXAMPLES = """\
python tools/eval_fid.py --max-reference 2000
  torchrun --nproc-per-node 8 tools/eval_fid.py samples.npz --extractor inception-2015 --reference imagenet256.npz
  python tools/eval_fid.py --reference imagenet/train --size 256 --write-reference imagenet256.npz"""
STREAM = "-"


def main() -> None:
    with join() as workers:
        arguments = parse_arguments()
        device = choose_device(workers.local_rank)
        extractor = make_extractor(arguments.extractor, arguments.inception_weights, device)
        if arguments.write_reference:
            if arguments.reference is None:
                raise UserError("--write-reference needs --reference REAL, the images to make it of")
            scoring = Scoring(extractor, workers, Path(arguments.write_reference).parent / "scoring", arguments.size)
            scoring.write_reference(arguments.reference, arguments.max_reference, arguments.write_reference)
            return
        evaluate(arguments, extractor, workers)


def evaluate(arguments: argparse.Namespace, extractor: Extractor, workers: Workers) -> None:
    samples = arguments.samples or newest_samples()
    stream = samples == Path(STREAM)
    record = {} if stream else read_record(samples)
    reference = arguments.reference or record.get("data", {}).get("reference")
    floor = arguments.floor or record.get("data", {}).get("path")
    against = list(arguments.against)
    if record.get("untrained"):
        against.insert(0, ("untrained", samples.parent / record["untrained"]))
    if reference is None:
        raise UserError(f"nothing to compare {samples} with: give --reference DATASET_OR_NPZ")

    scoring = Scoring(extractor, workers, samples.parent / "scoring", arguments.size, arguments.bootstrap)
    title = "stdin" if stream else "trained" if record else samples.stem
    if stream:
        scoring.add_stream(title, sys.stdin.buffer)
    else:
        scoring.add(title, samples)
    if floor:
        scoring.add(f"real {Path(floor).name} (floor)", floor, scoring.count, first=True)
    for name, path in against:  # as many: FID depends on their number
        scoring.add(name, path, scoring.count)
    scoring.compare_with(reference, arguments.max_reference)
    rows = scoring.run()
    if rows is None:
        return
    report = {
        "extractor": extractor.name,
        "reference": {"path": str(reference), "images": scoring.reference_count},
        "samples": {"path": str(samples), **record},
        "rows": rows,
    }
    if arguments.json != "-":
        print_report(report)
    if record and samples.parent.name == "samples":
        write_json(samples.parent.parent / "scores.json", report)
    emit_json(arguments.json, report)
    scoring.remove()


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "Score samples: FID, sFID, inception score, precision and recall, by any number of processes. Untrained "
        "samples and other real images, scored beside them, say what a figure means. A run's figures are also written "
        "to its scores.json. What was interrupted is run again, and goes on.",
        EXAMPLES,
    )
    named = {"type": named_file, "action": "append", "default": [], "metavar": "NAME=FILE"}
    samples = f"an .npz, a folder of image files, or {STREAM} for arrays by numpy.save from a pipe (default: {SAMPLES})"
    parser.add_argument("samples", nargs="?", type=Path, metavar="SAMPLES", help=samples)
    real = "real images: an .npz, a folder, an encoded data set; or a reference file (default: what the run names)"
    parser.add_argument("--reference", metavar="REAL", help=real)
    parser.add_argument("--floor", metavar="REAL", help="real images to score like samples (default: likewise)")
    parser.add_argument("--against", **named, help="further samples to score beside them; may be repeated")
    parser.add_argument("--extractor", choices=EXTRACTORS, help="(default: the first, or what the weights are of)")
    weights = "pytorch-fid's pt_inception-2015-12-05-6726825d.pth (default: downloaded once, to ~/.cache/diffussm)"
    parser.add_argument("--inception-weights", metavar="FILE", help=weights)
    parser.add_argument("--max-reference", type=int, metavar="N", help="of real images take N at random (default: all)")
    parser.add_argument("--size", type=int, metavar="PX", help="crop and resize images of folders, as ADM did")
    parser.add_argument("--bootstrap", type=int, metavar="N", help="95 %% interval of FID from N sets drawn anew")
    written = "write the real images' statistics in ADM's layout, and score nothing"
    parser.add_argument("--write-reference", metavar="FILE", help=written)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's; the environment's counts
    parser.add_json_option()
    arguments = parser.parse_args()
    for name, least in ("max_reference", 2), ("size", 1), ("bootstrap", 20):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return arguments


def named_file(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, path
