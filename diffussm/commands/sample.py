"""Draw samples from a trained model: `tools/sample.py`."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from diffussm.autoencoders.codec import codec_from_spec
from diffussm.commands.common import Parser, emit_json
from diffussm.config import Config, SampleConfig, from_dict
from diffussm.data.store import open_store
from diffussm.diffusion.samplers import SAMPLERS
from diffussm.errors import UserError
from diffussm.files import write_json
from diffussm.pictures import save_png
from diffussm.sampling import GRID_CLASSES, class_rows, draw_images, save_npz
from diffussm.training import checkpoint
from diffussm.training.checkpoint import MANIFEST, META, Checkpoint, ema_kind

RUNS = "runs/*/checkpoints/latest"


def main() -> None:
    arguments = parse_arguments()
    found = find_checkpoint(arguments.source)
    meta = found.meta
    average = arguments.ema_images or meta["ema_images"][0]
    model = checkpoint.load_model(found, ema_kind(average))
    config: Config = from_dict(meta["config"])
    settings = SampleConfig(
        sampler=arguments.sampler or config.sample.sampler,
        steps=arguments.steps or config.sample.steps,
        guidance=config.sample.guidance if arguments.guidance is None else arguments.guidance,
    )
    classes = chosen_classes(arguments.classes, meta["class_names"])
    labels = [classes[i % len(classes)] for i in range(arguments.count)] if classes else None
    if settings.steps > config.diffusion.steps:
        raise UserError(f"--steps {settings.steps} is not in 1..{config.diffusion.steps}, the model's")
    if arguments.guidance_channels is not None and not 1 <= arguments.guidance_channels <= meta["channels"]:
        raise UserError(
            f"--guidance-channels {arguments.guidance_channels} is not in 1..{meta['channels']}, the latent's"
        )

    codec = codec_from_spec(meta["codec"], arguments.autoencoder or config.data.autoencoder)
    codec.load()

    def draw(network: nn.Module, settings: SampleConfig, title: str) -> np.ndarray:
        network = network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        return draw_images(
            network,
            codec,
            meta,
            labels,
            settings,
            count=arguments.count,
            batch=arguments.batch,
            seed=arguments.seed,
            guidance_channels=arguments.guidance_channels,
            title=title,
        )

    out = arguments.out or samples_folder(arguments.source, found)
    record = {
        "samples": "samples.npz",
        "checkpoint": str(found),
        "images_seen": meta["images"],
        "weights": f"EMA of {average:,.0f} images",
        "data": {"path": config.data.path, "reference": config.data.reference},
        "count": arguments.count,
        "classes": [meta["class_names"][c] for c in classes],
        "sampler": settings.sampler,
        "steps": settings.steps,
        "guidance": settings.guidance if classes else 1.0,
        "guidance_channels": arguments.guidance_channels,
        "seed": arguments.seed,
    }
    (out / "samples.json").unlink(missing_ok=True)  # it would describe the images that are about to be replaced
    if arguments.untrained:
        torch.manual_seed(config.train.seed)
        unguided = replace(settings, guidance=1.0)  # it predicts 0 for every class: guidance would change nothing
        save_npz(out / "untrained.npz", draw(checkpoint.make_model(meta), unguided, "untrained"), labels)
        record["untrained"] = "untrained.npz"
    began = time.perf_counter()
    images = draw(model, settings, "samples")
    record["images_per_second"] = arguments.count / (time.perf_counter() - began)
    save_npz(out / "samples.npz", images, labels)
    save_png(out / "grid.png", class_rows(images, labels, classes))
    write_json(out / "samples.json", record)
    if arguments.json != "-":
        print(f"{arguments.count} images of {found} (after {meta['images']:,}), {settings.sampler}, {settings.steps}")
        print(f"steps, guidance {record['guidance']:g}: {record['images_per_second']:.1f} images/s")
        for row, c in enumerate(classes[:GRID_CLASSES]):
            print(f"  row {row + 1:2}  {meta['class_names'][c]}")
        print(f"  {out / 'samples.npz'}\n  {out / 'grid.png'}")
    emit_json(arguments.json, record)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "Draw samples with the averaged (EMA) weights: samples.npz in ADM's layout and grid.png, a row a class.",
        "python tools/sample.py runs/fashion32 --classes Sandal,Bag --count 64 --out sandals-and-bags",
    )
    parser.add_argument(
        "source", nargs="?", help="a run's folder, a checkpoint, or checkpoints in S3 (default: newest in runs/)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the files (default: RUN/samples)")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="images (default: %(default)s)")
    parser.add_argument(
        "--classes", metavar="LIST", help="ids or names, separated by commas, drawn in turns (default: all)"
    )
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), help="(default: the run's)")
    parser.add_argument("--steps", type=int, metavar="N", help="of the sampler (default: the run's)")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="classifier-free; 1: none (default: the run's)")
    parser.add_argument("--guidance-channels", type=int, metavar="K", help="guide only the first K, as DiT did with 3")
    parser.add_argument(
        "--ema-images", type=float, metavar="N", help="length of the average, of those kept (default: the first)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="image i is a function of it (default: 0)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images a batch (default: %(default)s)")
    parser.add_argument("--autoencoder", metavar="ID", help="hub id or folder of its weights (default: the run's)")
    parser.add_argument("--untrained", action="store_true", help="also draw from the untrained model, for comparison")
    parser.add_json_option()
    arguments = parser.parse_args()
    if arguments.count < 1 or arguments.batch < 1 or (arguments.steps is not None and arguments.steps < 1):
        parser.error("--count, --batch and --steps are at least 1")
    if not 0 <= arguments.seed < 2**64:
        parser.error("--seed must be from 0 to 2^64 - 1")
    return arguments


def find_checkpoint(source: str | None) -> Checkpoint:
    """The checkpoint that ``source`` is, or the newest complete one of the run that it is, or of the newest run."""
    if source is None:
        runs = sorted(Path().glob(RUNS), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError(f"no checkpoint: no {RUNS} here: train first, or name a run or a checkpoint")
        source = str(runs[-1].parent)
    store = open_store(source)
    if store.exists(MANIFEST) or store.exists(META):
        found = Checkpoint.at(source)
        found.verify()
        return found
    if store.exists("config.yaml"):
        values = yaml.safe_load(bytes(store.read("config.yaml")))
        store = open_store(values["train"].get("checkpoints") or f"{source}/checkpoints")
    found = checkpoint.find(store)
    if found is None:
        raise UserError(
            f"{source} holds no complete checkpoint: it is neither a checkpoint nor a run that has saved one"
        )
    return found


def samples_folder(source: str | None, found: Checkpoint) -> Path:
    """Where samples go by default: samples/ in the run's folder; here, where only a checkpoint elsewhere was named."""
    for run in (Path(str(found.store)).parent, Path(source or "")):
        if (run / "config.yaml").is_file():
            return run / "samples"
    return Path("samples")


def chosen_classes(text: str | None, names: list[str]) -> list[int]:
    """Ids of the classes asked for, as ids or names; of all if ``text`` is None."""
    if text is None:
        return list(range(len(names)))
    if not names:
        raise UserError("--classes: the model is unconditional, it has none")
    chosen = []
    for item in text.split(","):
        if item.strip() in names:
            chosen.append(names.index(item.strip()))
        elif item.strip().isdecimal() and int(item) < len(names):
            chosen.append(int(item))
        else:
            known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise UserError(f"--classes {item!r} is not one of 0..{len(names) - 1} or a name ({known})")
    return chosen
