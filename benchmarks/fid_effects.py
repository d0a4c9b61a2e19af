"""What changes FID, and by how much: one thing at a time, on a run of the demo.

    python -m benchmarks.fid_effects runs/fashion32 --json effects.json          about 30 minutes on 2 cores
    python -m benchmarks.fid_effects runs/fashion32 --quick

By EfficientNet-Lite0, whose figures compare with no other extractor's; against test images. Each row changes one thing
about the same samples: how images are resized on their way into the extractor (of both sides alike, or of the samples
alone, as when statistics come from another program), how pixels are rounded, how many samples there are, which channels
are guided, how many steps are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common import Report, make_parser, say
from diffussm.autoencoders.codec import codec_from_spec
from diffussm.config import SampleConfig, from_dict
from diffussm.data.workers import Alone
from diffussm.errors import UserError, run_command
from diffussm.evaluation import efficientnet
from diffussm.evaluation.efficientnet import EfficientNetLite0
from diffussm.evaluation.frechet import Gaussian, frechet_distance
from diffussm.evaluation.images import open_images
from diffussm.evaluation.inception import resize as resize_as_tensorflow
from diffussm.evaluation.summary import measure_stream
from diffussm.sample_request import Request, find_checkpoint
from diffussm.sampling import draw
from diffussm.threads import map_batches
from diffussm.training.checkpoint import ema_kind

Resize = Callable[[Tensor, int], Tensor]
BATCH = 100

RESIZES: dict[str, Resize] = {  # float32 [N, C, H, W] → [N, C, size, size]
    "bilinear, averaging where it shrinks": lambda x, size: functional.interpolate(
        x, (size, size), mode="bilinear", antialias=True
    ),
    "bilinear, half-pixel centres": lambda x, size: functional.interpolate(x, (size, size), mode="bilinear"),
    "bilinear as TensorFlow 1": lambda x, size: (
        resize_as_tensorflow(x.permute(0, 2, 3, 1), size).permute(0, 3, 1, 2).contiguous()
    ),
    "bicubic": lambda x, size: functional.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 255),
    "nearest": lambda x, size: functional.interpolate(x, (size, size), mode="nearest"),
}


class Resized(EfficientNetLite0):
    """The extractor, of images that were resized by another method before."""

    def __init__(self, resize: Resize) -> None:
        super().__init__()
        self._resize = resize

    def __call__(self, images: np.ndarray):
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        return super().__call__(self._resize(x, self.IMAGE_SIZE).permute(0, 2, 3, 1).contiguous().numpy())


def main() -> None:
    parser = make_parser("fid_effects", "What changes FID, and by how much, on a run.")
    parser.add_argument("run", type=Path, help="its folder; its data.reference is what samples are compared with")
    arguments = parser.parse_args()
    report = Report("FID", torch.device("cpu"))
    report.rows = list(effects(arguments.run, *((60, 120) if arguments.quick else (300, 2000))))
    report.finish(arguments.json)


def effects(run: Path, count: int, reference_count: int):
    """Rows, each with the thing changed and the figure."""
    torch.manual_seed(0)
    drawing = Drawing(run, count)
    meta = drawing.checkpoint.meta
    reference = meta["config"]["data"]["reference"]
    if not reference:
        raise UserError(f"{run} names no data.reference")
    real = open_images(reference, reference_count)
    real_images = real.read(range(len(real)))
    samples = drawing.images()
    extractor = EfficientNetLite0()
    base = features(extractor, real_images)
    drawn = features(extractor, samples)
    whole = fid(drawn, base)
    yield row("as it is", whole, f"{count} samples against {len(real)}")

    for name, resize in list(RESIZES.items())[1:]:
        other = Resized(resize)
        theirs = features(other, samples)
        yield row(f"resize: {name}", fid(theirs, features(other, real_images)), "of both sides")
        yield row(f"resize: {name}", fid(theirs, base), "of the samples alone")

    yield row("pixels rounded down", fid(features(extractor, drawing.images(rounding="down")), base), "as ADM")

    floor = open_images(meta["config"]["data"]["path"], 10 * count)
    floor_features = features(extractor, floor.read(range(len(floor))))
    for number in sorted({count // 10, count // 3, count, 3 * count, len(floor)}):
        if number <= len(drawn):
            yield row(f"{number} samples", fid(drawn[:number], base), "of the model")
        if number <= len(floor):
            yield row(f"{number} samples", fid(floor_features[:number], base), "of the training images")

    channels = meta["channels"]
    for guidance in (1.0, 2.0, 4.0):
        for guided in (channels, 3) if guidance != 1 and channels > 3 else (channels,):
            images = drawing.images(guidance=guidance, channels=guided)
            yield row(f"guidance {guidance:g}, {guided} of {channels} channels", fid(features(extractor, images), base))
    for sampler, steps in ("ancestral", 25), ("ddim", 50), ("dpm++", 25):
        images = drawing.images(sampler=sampler, steps=steps)
        yield row(f"{sampler}, {steps} steps", fid(features(extractor, images), base))


class Drawing:
    """Samples of a run's newest checkpoint, from the same noise each time."""

    def __init__(self, run: Path, count: int) -> None:
        self.checkpoint, self._run, self._count = find_checkpoint(str(run), Alone()), run, count

    def images(
        self,
        rounding: str = "nearest",
        guidance: float | None = None,
        channels: int | None = None,
        sampler: str | None = None,
        steps: int | None = None,
    ) -> np.ndarray:
        """uint8 [count, H, W, 3]."""
        meta = self.checkpoint.meta
        sample = from_dict(meta["config"]).sample
        settings = SampleConfig(
            sampler or sample.sampler, steps or sample.steps, sample.guidance if guidance is None else guidance
        )
        classes = list(range(meta["num_classes"]))
        request = Request(
            self.checkpoint, ema_kind(meta["ema_images"][0]), settings, classes, self._count, 32, 0, channels,
            rounding=rounding,
        )  # fmt: skip
        codec = codec_from_spec(meta["codec"])
        title = "-".join(map(str, (settings.sampler, settings.steps, settings.guidance, channels, rounding)))
        parts, _ = draw(request, codec, torch.device("cpu"), self._run / "effects", title, Alone())
        return parts.read(range(self._count))


def features(extractor: EfficientNetLite0, images: np.ndarray) -> Tensor:
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    return torch.cat([m.features for m in map_batches(lambda batch: measure_stream([batch], extractor), batches)])


def fid(samples: Tensor, real: Tensor) -> float:
    return frechet_distance(Gaussian.of_samples(samples), Gaussian.of_samples(real))


def row(name: str, value: float, note: str = "") -> dict:
    say(f"{name} {note}: {value:.2f}")
    return {"name": name, "note": note, f"FID ({efficientnet.EfficientNetLite0.name})": value}


if __name__ == "__main__":
    run_command(main)
