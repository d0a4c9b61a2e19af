"""Convert a checkpoint for diffusers, or to plain weights: `tools/convert_checkpoint.py`."""

from __future__ import annotations

import argparse
import importlib.util

from diffussm.autoencoders.codec import codec_from_spec
from diffussm.commands.common import Parser, emit_json
from diffussm.config import from_dict
from diffussm.convert import check_fit, check_target, new_target, scores_of, write_folder, write_weights
from diffussm.data.workers import Alone
from diffussm.errors import UserError
from diffussm.sample_request import find_checkpoint
from diffussm.training.checkpoint import ema_kind
from diffussm.training.foreign import refuse_foreign

EXAMPLES = """\
python tools/convert_checkpoint.py runs/fashion32 --out fashion32-pipeline
  python tools/convert_checkpoint.py runs/xl256/checkpoints/images-000001280000 --raw --out s3://bucket/xl256.safetensors"""


def main() -> None:
    arguments = parse_arguments()
    to_file = arguments.out.endswith(".safetensors")
    if not to_file and importlib.util.find_spec("diffusers") is None:
        raise UserError("a pipeline needs diffusers: pip install diffussm[hub], or convert to a .safetensors file")
    if arguments.source is not None:
        refuse_foreign(arguments.source)
    check_target(arguments.out)
    found = find_checkpoint(arguments.source, Alone())
    meta, config = found.meta, from_dict(found.meta["config"])
    average = arguments.ema_images or meta["ema_images"][0]
    kind = "weight" if arguments.raw else ema_kind(average)
    weights = "as trained, not averaged" if arguments.raw else f"EMA of {average:,.0f} images"
    found.check_kind(kind)
    check_fit(found)
    with new_target(arguments.out) as path:
        if to_file:
            write_weights(found, kind, path)
        else:
            codec = codec_from_spec(meta["codec"], arguments.autoencoder or config.data.autoencoder)
            write_folder(found, kind, weights, codec, scores_of(found, arguments.source, weights), path)
    record = {
        "out": arguments.out,
        "format": "safetensors" if to_file else "diffusers",
        "checkpoint": str(found),
        "images_seen": meta["images"],
        "weights": weights,
    }
    if arguments.json != "-":
        print(f"{arguments.out}: {found} (after {meta['images']:,} images), weights {weights}")
    emit_json(arguments.json, record)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "Write the weights of a checkpoint as one .safetensors file, or, to any other name, as a folder that diffusers "
        "loads: network, scheduler, autoencoder, model card. Training takes the weights back by train.init_from.",
        EXAMPLES,
    )
    parser.add_argument(
        "source", nargs="?", help="a run's folder, a checkpoint, or checkpoints in S3 (default: newest in runs/)"
    )
    parser.add_argument("--out", required=True, metavar="OUT", help="NAME.safetensors or a folder, here or in s3://")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--raw", action="store_true", help="the weights as trained, not an average of them")
    which.add_argument(
        "--ema-images", type=float, metavar="N", help="length of the average, of those kept (default: the first)"
    )
    parser.add_argument("--autoencoder", metavar="ID", help="hub id or folder of its weights (default: the run's)")
    parser.add_json_option()
    return parser.parse_args()
