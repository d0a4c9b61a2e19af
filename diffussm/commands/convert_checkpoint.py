"""Convert a checkpoint for diffusers, or to plain weights: `tools/convert_checkpoint.py`."""

from __future__ import annotations

import argparse
import re

from diffussm.autoencoders.codec import codec_from_spec
from diffussm.commands.common import Parser, emit_json
from diffussm.convert import check_fit, check_meta, check_target, new_target, scores_of, write_folder, write_weights
from diffussm.data.workers import Alone
from diffussm.errors import UserError, needs
from diffussm.sample_request import find_checkpoint
from diffussm.training.checkpoint import Checkpoint, ema_kind
from diffussm.training.foreign import refuse_foreign

EXAMPLES = """\
python tools/convert_checkpoint.py runs/fashion32 --out fashion32-pipeline
  python tools/convert_checkpoint.py runs/xl256/checkpoints/images-000001280000 --raw --out s3://bucket/xl256.safetensors"""


def main() -> None:
    arguments = parse_arguments()
    to_file = arguments.out.endswith(".safetensors")
    if not to_file:
        with needs("a pipeline, unlike a .safetensors file,", "hub"):
            import diffussm.hub  # noqa: F401
    if arguments.source is not None:
        refuse_foreign(arguments.source)
    check_target(arguments.out)
    found = find_checkpoint(arguments.source, Alone())
    meta, config = found.meta, check_meta(found)
    kind, weights = chosen_weights(arguments, found)
    check_fit(found)
    with new_target(arguments.out) as path:
        if to_file:
            write_weights(found, kind, path)
        else:
            codec = codec_from_spec(meta["codec"], arguments.autoencoder or config.data.autoencoder)
            scores = scores_of(found, arguments.source, weights)
            write_folder(found, kind, weights, codec, scores, arguments.license, path)
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


def chosen_weights(arguments: argparse.Namespace, found: Checkpoint) -> tuple[str, str]:
    """Their kind, and what to call them. UserError where the checkpoint has none such."""
    if arguments.raw:
        return "weight", "as trained, not averaged"
    average = arguments.ema_images
    if average is None:
        if not found.meta["ema_images"]:
            raise UserError(f"{found} has no averages: say --raw")
        average = found.meta["ema_images"][0]
    found.check_kind(ema_kind(average))
    return ema_kind(average), f"EMA of {average:,.0f} images"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "Write the weights of a checkpoint as one .safetensors file, or, to any other name, as a folder that diffusers "
        "loads: network, scheduler, autoencoder, model card. Training takes the weights back by train.init_from.",
        EXAMPLES,
    )
    parser.add_source_argument()
    parser.add_argument("--out", required=True, metavar="OUT", help="NAME.safetensors or a folder, here or in s3://")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--raw", action="store_true", help="the weights as trained, not an average of them")
    which.add_argument(
        "--ema-images", type=float, metavar="N", help="length of the average, of those kept (default: the first)"
    )
    parser.add_argument("--autoencoder", metavar="ID", help="hub id or folder of its weights (default: the run's)")
    parser.add_argument(
        "--license",
        metavar="ID",
        default="apache-2.0",
        help="of the weights, for the model card (default: %(default)s)",
    )
    parser.add_json_option()
    arguments = parser.parse_args()
    arguments.out = re.sub(r"(?<=[^:/])/+$", "", arguments.out)
    return arguments
