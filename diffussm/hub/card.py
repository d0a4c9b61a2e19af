"""The README.md of a pipeline's folder: the hub's front matter, what the model is, and how it is used."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from diffussm.autoencoders.kl import AutoencoderKLCodec
from diffussm.config import from_dict
from diffussm.models.diffussm import ModelConfig
from diffussm.models.macs import forward_macs, parameter_counts

PRIVATE = ("checkpoints", "resume", "init_from")  # of the configuration: places on the trainer's machines
SHOWN_CLASSES = 20
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def model_card(meta: dict[str, Any], weights: str, scores: str, license: str) -> str:
    """Markdown.

    Args:
        meta: of the checkpoint.
        weights: which they are, in words.
        scores: :func:`score_table` of these weights, or empty.
        license: of the weights, the hub's identifier.
    """
    config, names = meta["config"], meta["class_names"]
    size = from_dict(config["model"], ModelConfig)
    channels, height, width = meta["latent_shape"]
    preset = config["model"]["preset"]
    title = f"DiffuSSM-{preset}" if preset != "custom" else f"DiffuSSM {size.resolved().width}×{size.resolved().depth}"
    macs = sum(forward_macs(size, channels, height * width).values())
    parameters = sum(parameter_counts(size, channels, meta["num_classes"]).values())
    front = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffussm", "diffusion", "state-space-model", "arxiv:2311.18257"]
        + ["class-conditional-image-generation"] * bool(names),
    )
    codec = {key: value for key, value in meta["codec"].items() if key != "location"}
    shown = {
        "model": config["model"],
        "diffusion": config["diffusion"],
        "sample": config["sample"],
        "train": {key: value for key, value in config["train"].items() if key not in PRIVATE},
        "codec": codec,
    }
    rows = [
        ("parameters", f"{parameters:,}"),
        ("MACs of a forward pass, an image", f"{macs / 1e9:,.4g} G"),
        ("latents", f"{channels}×{height}×{width}"),
        ("compute of training: 3 forward passes an image, 2 FLOPs a MAC", f"{6 * macs * meta['images']:.3g} FLOPs"),
        ("classes", f"{len(names):,}" if names else "none"),
        ("weights", weights),
        ("images seen in training", f"{meta['images']:,}"),
        ("data index, sha256", f"`{meta.get('stream', {}).get('data', 'unknown')}`"),
    ]
    call, sample = ("0, " if names else ""), config["sample"]
    parts = [
        f"---\n{front.to_yaml()}\n---\n",
        f"# {title}\n",
        "A diffusion model without attention: [Yan, Gu and Rush](https://arxiv.org/abs/2311.18257), trained with the "
        "`diffussm` package. To load it, install that with its extra `hub`.\n",
        _table(("", ""), rows),
        "## Use\n",
        "```python\nfrom diffussm.hub import DiffuSSMPipeline\n\n"
        'pipeline = DiffuSSMPipeline.from_pretrained("FOLDER_OR_HUB_ID")\n'
        f"image = pipeline({call}num_inference_steps={sample['steps']}"
        + (f", guidance_scale={sample['guidance']:g}" if names else "")
        + ").images[0]\n```\n",
        'Or by diffusers alone: `DiffusionPipeline.from_pretrained("FOLDER_OR_HUB_ID", custom_pipeline="pipeline", '
        "trust_remote_code=True)`.\n",
    ]
    if names:
        more = f" and {len(names) - SHOWN_CLASSES:,} more" if len(names) > SHOWN_CLASSES else ""
        parts.append(f"Classes: {', '.join(map(_plain, names[:SHOWN_CLASSES]))}{more}.\n")
    if scores:
        parts += ["## Scores\n", scores]
    parts += ["## Configuration\n", f"```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```\n", "## Licence\n"]
    parts.append(f"Of the network's weights: {_plain(license)}.\n")
    if meta["codec"].get("name") == AutoencoderKLCodec.name:
        location = meta["codec"]["location"]
        origin = f" from `{location}`" if HUB_ID.fullmatch(location) and not Path(location).exists() else ""
        parts.append(f"The autoencoder in `vae` was taken{origin} as it is, and its own licence holds.\n")
    return "\n".join(parts)


def score_table(report: dict[str, Any]) -> str:
    """Markdown of a report of tools/eval_fid.py: what was scored together, and how the samples were drawn."""
    extractor, samples = report["extractor"], report["samples"]
    metrics = [key for key in report["rows"][0] if key.endswith(f"({extractor})")]
    rows = [
        (_plain(row["name"]), *(_number(row.get(key)) for key in metrics), f"{row['images']:,}")
        for row in report["rows"]
    ]
    drawn = f"{samples['sampler']}, {samples['steps']} steps, guidance {samples['guidance']:g}"
    names = [key.removesuffix(f" ({extractor})") for key in metrics]
    return f"By {extractor}; samples drawn with {drawn}.\n\n" + _table(("", *names, "images"), rows)


def _plain(text: str) -> str:
    """As one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]|<>&#])", r"\\\1", " ".join(text.split()))


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
