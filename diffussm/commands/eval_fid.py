"""Score samples against real images: `tools/eval_fid.py`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from diffussm.commands.common import emit_json
from diffussm.commands.eval_arguments import STREAM, parse_arguments
from diffussm.commands.scores import newest_samples, notes_on, print_report, read_record
from diffussm.data.workers import Workers, from_first
from diffussm.errors import UserError
from diffussm.evaluation.extractors import make_extractor
from diffussm.evaluation.features import Extractor
from diffussm.evaluation.scoring import Scoring
from diffussm.files import write_json
from diffussm.training.cluster import choose_device
from diffussm.training.workers import join


def main() -> None:
    with join() as workers:
        arguments = parse_arguments()
        device = choose_device(workers.local_rank)
        wanted = arguments.extractor, arguments.inception_weights, device
        made: list[Extractor] = []
        from_first(workers, "extractor", lambda: made.append(make_extractor(*wanted)) or 0)  # one downloads weights
        extractor = made[0] if made else make_extractor(*wanted)
        if arguments.write_reference:
            target = Path(arguments.write_reference)
            folder = scratch(arguments, target.parent) / target.name
            with Scoring(extractor, workers, folder, arguments.size) as scoring:
                scoring.write_reference(arguments.reference, arguments.max_reference, target)
        else:
            evaluate(arguments, extractor, workers)


def evaluate(arguments: argparse.Namespace, extractor: Extractor, workers: Workers) -> None:
    samples = arguments.samples or newest_samples()
    stream = samples == Path(STREAM)
    record = {} if stream else read_record(samples)
    reference = arguments.reference or record.get("data", {}).get("reference")
    if reference is None:
        raise UserError(f"nothing to compare {samples} with: give --reference DATASET_OR_NPZ")
    title = "stdin" if stream else "trained" if record else samples.stem or samples.resolve().name

    folder = scratch(arguments, samples.parent) / (samples.name or title)
    with Scoring(extractor, workers, folder, arguments.size, arguments.bootstrap) as scoring:
        scoring.compare_with(reference, arguments.max_reference)
        if arguments.check:
            return
        if stream:
            scoring.add_stream(title, sys.stdin.buffer)
        else:
            scoring.add(title, samples)
        add_floor(scoring, arguments.floor, record.get("data", {}).get("path"), workers)
        if record.get("untrained"):
            scoring.add("untrained", samples.parent / record["untrained"], scoring.count)
        for name, path in arguments.against:  # as many: FID depends on their number
            scoring.add(name, path, scoring.count)
        rows = scoring.run()
        if rows is None:
            return
        report = {
            "extractor": extractor.name,
            "reference": {"path": str(reference), "images": scoring.reference_count},
            "samples": {"path": str(samples), **record},
            "rows": rows,
            "notes": notes_on(rows, scoring.reference_count, extractor.name),
        }
        if arguments.json == "-":
            print(*report["notes"], sep="\n", file=sys.stderr)
        else:
            print_report(report)
        if record and samples.parent.name == "samples":
            write_json(samples.parent.parent / "scores.json", report)
        emit_json(arguments.json, report)
        scoring.remove()


def scratch(arguments: argparse.Namespace, beside: Path) -> Path:
    return Path(arguments.scratch or beside / "scoring")


def add_floor(scoring: Scoring, asked: str | None, known: str | None, workers: Workers) -> None:
    """Real images as a row: those asked for; or else those that the run was trained on, if they are here as images."""
    try:
        if path := asked or known:
            scoring.add(f"real {Path(path).name} (floor)", path, scoring.count, first=True)
    except UserError as error:
        if asked:
            raise
        if workers.rank == 0:
            print(f"note: no floor of real images: {error}", file=sys.stderr)
