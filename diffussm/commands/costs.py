"""What `tools/count_flops.py` prints and draws: every preset, DiT-XL, the published figures, one model by part."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from diffussm.models.diffussm import PRESETS, ModelConfig
from diffussm.models.macs import (
    DIT_SIZES,
    dit_macs,
    dit_parameter_counts,
    forward_macs,
    kernel_macs,
    mix_into_down_macs,
    parameter_counts,
)

CHANNELS, CLASSES = 4, 1000  # ImageNet through the Stable Diffusion autoencoder, 8 × 8 pixels to a position
PIXELS = (256, 512, 1024)
MODELS = {  # name: (MACs, parameters) by part
    **{
        f"DiffuSSM-{name}": (partial(forward_macs, ModelConfig(name)), partial(parameter_counts, ModelConfig(name)))
        for name in PRESETS
    },
    **{name: (partial(dit_macs, size), partial(dit_parameter_counts, size)) for name, size in DIT_SIZES.items()},
}
PUBLISHED = (  # model, px or None for its parameters, figure, source: arXiv 2311.18257 and 2212.09748
    ("DiffuSSM-XL", None, 673e6, "paper"),
    ("DiffuSSM-XL", 256, 1.85e20 / 660e6, "paper: total ÷ images"),
    ("DiffuSSM-XL", 512, 3.22e20 / 302e6, "paper: total ÷ images"),
    ("DiffuSSM-XL", 256, 295.6e9, "paper: formula"),
    ("DiffuSSM-XL", 512, 1182.3e9, "paper: formula"),
    ("DiT-XL/2", None, 675e6, "DiT's paper"),
    ("DiT-XL/2", 256, 118.6e9, "DiT's paper"),
    ("DiT-XL/2", 512, 524.6e9, "DiT's paper"),
)


def image_macs(model: str, px: int) -> int:
    """MACs of one forward pass of one image of px × px."""
    macs, _ = MODELS[model]
    return sum(macs(CHANNELS, (px // 8) ** 2).values())


def parameters(model: str) -> int:
    _, counts = MODELS[model]
    return sum(counts(CHANNELS, CLASSES).values())


def sizes() -> list[dict[str, Any]]:
    """A row for each model and resolution."""
    return [
        {"model": model, "px": px, "parameters": parameters(model), **macs_and_flops(image_macs(model, px))}
        for model in MODELS
        for px in PIXELS
    ]


def macs_and_flops(macs: float) -> dict[str, float]:
    return {"macs": macs, "flops": 2 * macs}


def published() -> list[dict[str, Any]]:
    """The published figures beside ours; the difference is ours from theirs."""
    rows = []
    for model, px, figure, source in PUBLISHED:
        ours = image_macs(model, px) if px else parameters(model)
        row = {"model": model, "px": px, "figure": "macs" if px else "parameters", "source": source}
        rows.append(row | {"published": figure, "ours": ours, "difference_percent": 100 * (ours / figure - 1)})
    return rows


def against_dit() -> dict[str, Any]:
    """MACs of each DiT-XL over those of DiffuSSM-XL by resolution; and from which resolution DiT-XL/2 too does more."""
    px = 16
    while image_macs("DiT-XL/2", px) < image_macs("DiffuSSM-XL", px):
        px += 16  # two patches of 8 pixels
    ratios = {dit: {str(px): image_macs(dit, px) / image_macs("DiffuSSM-XL", px) for px in PIXELS} for dit in DIT_SIZES}
    return {"macs_over_diffussm_xl": ratios, "dit_xl_2_does_more_from_px": px}


def by_part(name: str, config: ModelConfig, latent: tuple[int, ...], classes: int, batch: int) -> dict[str, Any]:
    """One model's parameters and MACs by part; what a batch of images shares; and so what is run for an image."""
    channels, height, width = latent
    config, length = config.resolved(), height * width
    counts, macs = parameter_counts(config, channels, classes), forward_macs(config, channels, length)
    total, shared = sum(macs.values()), {"kernel generation": sum(kernel_macs(config, length).values())}
    run = total
    if batch * length > 2 * config.width:
        shared["SSM mix into W_down"] = mix_into_down_macs(config)
        run -= macs["SSM mix"]
    return {
        "model": name,
        "config": asdict(config),
        "latent": list(latent),
        "classes": classes,
        "parts": [
            {"part": part, "parameters": counts.get(part, 0), **macs_and_flops(macs.get(part, 0))}
            for part in dict.fromkeys([*macs, *counts])
        ],
        "total": {"parameters": sum(counts.values()), **macs_and_flops(total)},
        "batch": batch,
        "once_a_batch": [{"part": part, **macs_and_flops(macs)} for part, macs in shared.items()],
        "run_an_image": macs_and_flops(run + sum(shared.values()) / batch),
    }
