"""Verify an encoded data set: `tools/verify_shards.py`."""

from __future__ import annotations

import argparse

import numpy as np
import torch

from diffussm.autoencoders.codec import Codec, codec_from_spec
from diffussm.commands.common import Parser, emit_json
from diffussm.commands.figures import data_figures, print_data_figures
from diffussm.data.index import INDEX_NAME, Index
from diffussm.data.normalisation import scaling_warning
from diffussm.data.reader import SampleReader
from diffussm.data.store import Store, open_store
from diffussm.data.verify import Findings, codec_problems, verify
from diffussm.data.verify_shard import Problem
from diffussm.errors import UserError
from diffussm.pictures import grid, save_png

QUICK_SHARDS = 8
SHEET_SAMPLES, SHEET_COLUMNS = 64, 8


def main() -> None:
    arguments = parse_arguments()
    store = open_store(arguments.dataset)
    index = Index.read(store)
    findings = verify(store, index, QUICK_SHARDS if arguments.quick else None)
    found, codec = look_at_codec(index, arguments.autoencoder)
    findings.problems += found
    failure = use_codec(store, index, codec, arguments) if codec else None
    figures = data_figures(store, index, findings.statistics)
    warning = scaling_warning(index, findings.statistics) if findings.statistics else None
    if arguments.json != "-":
        print_data_figures(figures)
        print_findings(findings, warning)
    problems = [vars(problem) for problem in findings.problems]
    emit_json(arguments.json, {**figures, "problems": problems, "notes": findings.notes, "warning": warning})
    if findings.problems:
        objects = {problem.name for problem in findings.problems}
        raise UserError(
            f"{store} has {len(findings.problems)} problems in {len(objects)} objects ({', '.join(sorted(objects)[:5])}"
            f"{', ...' if len(objects) > 5 else ''}): restore them, or delete index.json and encode again"
        )
    if failure:
        raise failure


def look_at_codec(index: Index, location: str | None) -> tuple[list[Problem], Codec | None]:
    """What is wrong with the codec that the index names; and that codec, unless there is none such."""
    try:
        codec = codec_from_spec(index.codec, location)
    except UserError as error:
        return [Problem(INDEX_NAME, None, str(error))], None
    return codec_problems(index, codec), codec


def use_codec(store: Store, index: Index, codec: Codec, arguments: argparse.Namespace) -> UserError | None:
    """Do what was asked for that takes the codec's weights; why it could not be done."""
    try:
        if arguments.autoencoder:
            codec.load()
        if arguments.sheet:
            save_png(arguments.sheet, contact_sheet(store, index, codec))
    except UserError as error:
        return error
    return None


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "Compare a data set with its index: every shard, as a tar and sample by sample. Exit code 2 where they differ.",
        "python tools/verify_shards.py data/fashion32/train --sheet sheet.png\n"
        "  python tools/verify_shards.py s3://bucket/imagenet256 --quick --json -",
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder or s3://bucket/prefix with an index.json")
    parser.add_argument("--quick", action="store_true", help=f"read {QUICK_SHARDS} shards; compare the others' sizes")
    parser.add_argument("--sheet", metavar="FILE.png", help=f"draw {SHEET_SAMPLES} samples, spread over the data set")
    parser.add_argument("--autoencoder", metavar="ID", help="hub id or folder of its weights, to be checked")
    parser.add_json_option()
    return parser.parse_args()


def contact_sheet(store: Store, index: Index, codec: Codec) -> np.ndarray:
    """Decoded samples from the first to the last of the data set, in rows: uint8 [H', W', 3]."""
    ids = np.linspace(0, len(index) - 1, min(len(index), SHEET_SAMPLES)).astype(np.int64)
    moments, _ = SampleReader(store, index).read(ids)
    means = torch.from_numpy(moments[:, : index.latent_shape[0]]).float()
    return grid(codec.decode((means - index.shift) * index.scale), SHEET_COLUMNS)


def print_findings(findings: Findings, warning: str | None) -> None:
    for note in findings.notes:
        print(f"note: {note}")
    if warning:
        print(f"WARNING: {warning}")
    for problem in findings.problems:
        print(f"PROBLEM: {problem}")
    if not findings.problems:
        print("sound")
