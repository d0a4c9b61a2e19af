"""The command line of `tools/eval_fid.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffussm.commands.common import Parser
from diffussm.commands.scores import SAMPLES
from diffussm.evaluation.extractors import EXTRACTORS

EXAMPLES = """\
python tools/eval_fid.py --max-reference 2000
  torchrun --nproc-per-node 8 tools/eval_fid.py samples.npz --extractor inception-2015 --reference imagenet256.npz
  python tools/eval_fid.py --reference imagenet/train --size 256 --write-reference imagenet256.npz"""
STREAM = "-"


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
    bootstrap = "95 %% interval of FID from N sets drawn anew; of 50,000 images a set takes seconds"
    parser.add_argument("--bootstrap", type=int, metavar="N", help=bootstrap)
    written = "write the real images' statistics in ADM's layout, and score nothing"
    parser.add_argument("--write-reference", metavar="FILE", help=written)
    parser.add_argument("--check", action="store_true", help="open the extractor and the reference, and score nothing")
    kept = "for what lets it be broken off; all processes see it (default: scoring/ beside SAMPLES)"
    parser.add_argument("--scratch", metavar="FOLDER", help=kept)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's; the environment's counts
    parser.add_json_option()
    arguments = parser.parse_args()
    for name, least in ("max_reference", 2), ("size", 1), ("bootstrap", 20):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if arguments.write_reference:
        if arguments.reference is None:
            parser.error("--write-reference needs --reference REAL, the images to make it of")
        for name in ("samples", "floor", "against", "bootstrap", "json"):
            if getattr(arguments, name):
                parser.error(f"--write-reference scores nothing: leave {name} out")
    return arguments


def named_file(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, path
