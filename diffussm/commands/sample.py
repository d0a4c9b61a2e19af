"""Draw samples from a trained model: `tools/sample.py`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffussm.autoencoders.codec import codec_from_spec
from diffussm.autoencoders.rounding import ROUNDINGS
from diffussm.commands.common import Parser, emit_json
from diffussm.config import Config, SampleConfig, from_dict
from diffussm.data.workers import Workers, from_first
from diffussm.diffusion.samplers import SAMPLERS
from diffussm.sample_parts import PART
from diffussm.sample_request import RANDOM, Request, chosen_classes, find_checkpoint, samples_folder
from diffussm.sampling import draw, drawn_before, publish, shown_classes
from diffussm.training.checkpoint import ema_kind
from diffussm.training.cluster import choose_device
from diffussm.training.workers import join

EXAMPLES = """\
python tools/sample.py runs/fashion32 --classes Sandal,Bag --count 64 --out sandals-and-bags
  torchrun --nproc-per-node 8 tools/sample.py runs/xl256 --count 50000"""


def main() -> None:
    with join() as workers:
        sample(parse_arguments(), workers)


def sample(arguments: argparse.Namespace, workers: Workers) -> None:
    found = find_checkpoint(arguments.source, workers)
    meta = found.meta
    config: Config = from_dict(meta["config"])
    average = meta["ema_images"][0] if arguments.ema_images is None else arguments.ema_images
    classes = chosen_classes(arguments.classes, meta["class_names"])
    settings = SampleConfig(
        sampler=arguments.sampler or config.sample.sampler,
        steps=arguments.steps or config.sample.steps,
        guidance=(config.sample.guidance if arguments.guidance is None else arguments.guidance) if classes else 1.0,
    )
    request = Request(
        found, ema_kind(average), settings, classes, arguments.count, min(arguments.batch, PART), arguments.seed,
        arguments.guidance_channels, arguments.classes == RANDOM, arguments.precision, arguments.rounding,
    )  # fmt: skip
    device = choose_device(workers.local_rank)
    codec = codec_from_spec(meta["codec"], arguments.autoencoder or config.data.autoencoder)
    codec.load()

    out = arguments.out or samples_folder(arguments.source, found)
    identity = request.identity(device, arguments.untrained)
    if from_first(workers, "drawn before", lambda: drawn_before(out, identity) is not None):
        if workers.rank == 0:
            report(arguments, request, out, drawn_before(out, identity))
        return
    samples, images_per_second = draw(request, codec, device, out, "samples", workers)
    sets = {"samples": samples}
    if arguments.untrained:  # it predicts 0 for every class: guidance would change nothing
        unguided = replace(request, weights=None, settings=replace(settings, guidance=1.0))
        sets["untrained"], _ = draw(unguided, codec, device, out, "untrained", workers)
    if workers.rank == 0:
        record = {
            "samples": "samples.npz",
            "checkpoint": str(found),
            "images_seen": meta["images"],
            "weights": f"EMA of {average:,.0f} images",
            "data": {"path": config.data.path, "reference": config.data.reference},
            "classes": [meta["class_names"][c] for c in classes],
            **request.record(),
            **({"untrained": "untrained.npz"} if arguments.untrained else {}),
            "images_per_second": images_per_second,
            "identity": identity,
        }
        publish(sets, request, out, record)
        report(arguments, request, out, record)


def report(arguments: argparse.Namespace, request: Request, out: Path, record: dict[str, Any]) -> None:
    if arguments.json != "-":
        meta, settings = request.checkpoint.meta, request.settings
        print(f"{request.count} images of {request.checkpoint} (after {meta['images']:,}), {settings.sampler},")
        print(f"{settings.steps} steps, guidance {settings.guidance:g}: {record['images_per_second']:.1f} images/s")
        for row, c in enumerate(shown_classes(request)):
            print(f"  row {row + 1:2}  {meta['class_names'][c]}")
        print(f"  {out / 'samples.npz'}\n  {out / 'grid.png'}")
    emit_json(arguments.json, record)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "Draw samples with the averaged (EMA) weights, by any number of processes: samples.npz in ADM's layout and "
        "grid.png, a row a class. What was interrupted is run again, by as many as you like, and goes on.",
        EXAMPLES,
    )
    parser.add_source_argument()
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the files (default: RUN/samples)")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="images (default: %(default)s)")
    parser.add_argument(
        "--classes",
        metavar="LIST",
        help="ids or names, by commas, in turns; or: random, of all (default: all in turns)",
    )
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), help="(default: the run's)")
    parser.add_argument("--steps", type=int, metavar="N", help="of the sampler (default: the run's)")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="classifier-free; 1: none (default: the run's)")
    parser.add_argument("--guidance-channels", type=int, metavar="K", help="guide only the first K, as DiT did with 3")
    parser.add_argument(
        "--ema-images", type=float, metavar="N", help="length of the average, of those kept (default: the first)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="image i is a function of it (default: 0)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help=f"images at once, to {PART} (default: 32)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model (default: fp32)")
    rounding = "of pixels: to the nearest as DiT, or down as ADM (default: nearest)"
    parser.add_argument("--rounding", choices=ROUNDINGS, default="nearest", help=rounding)
    parser.add_argument("--autoencoder", metavar="ID", help="hub id or folder of its weights (default: the run's)")
    parser.add_argument("--untrained", action="store_true", help="also draw from the untrained model, for comparison")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's; the environment's counts
    parser.add_json_option()
    arguments = parser.parse_args()
    if arguments.count < 1 or arguments.batch < 1 or (arguments.steps is not None and arguments.steps < 1):
        parser.error("--count, --batch and --steps are at least 1")
    if not 0 <= arguments.seed < 2**64:
        parser.error("--seed must be from 0 to 2^64 - 1")
    return arguments
