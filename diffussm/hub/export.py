"""A pipeline's folder from what a checkpoint says of itself.

model_index.json    pipeline.py    README.md
transformer/        config.json, diffusion_pytorch_model.safetensors
scheduler/          scheduler_config.json, by the run's sampler
vae/                of a run on an AutoencoderKL's latents
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from diffussm.autoencoders.codec import Codec
from diffussm.autoencoders.kl import AutoencoderKLCodec
from diffussm.config import from_dict
from diffussm.errors import UserError
from diffussm.hub.model import DiffuSSMModel
from diffussm.hub.pipeline import DiffuSSMPipeline
from diffussm.hub.schedulers import scheduler_for
from diffussm.models.diffussm import ModelConfig


def empty_model(meta: dict[str, Any]) -> DiffuSSMModel:
    """The network that a checkpoint's weights fit, without memory for them."""
    size = from_dict(meta["config"]["model"], ModelConfig).resolved()
    channels, height, width = meta["latent_shape"]
    if height != width:
        raise UserError(f"a pipeline has square latents, not {height}×{width}: convert to a .safetensors file")
    with torch.device("meta"):
        return DiffuSSMModel(
            channels, width, meta["num_classes"], size.width, size.depth, size.hourglass, size.state
        ).eval()


def write_pipeline(
    folder: Path, meta: dict[str, Any], codec: Codec, write_weights: Callable[[Path], None], card: str
) -> None:
    """Fill a new folder.

    Args:
        meta: of the checkpoint.
        codec: the run's.
        write_weights: writes the network's weights as a safetensors file of that name.
        card: the README.md.

    Raises:
        UserError: the codec's weights are not to be had.
    """
    config, names = meta["config"], meta["class_names"]
    with_vae = isinstance(codec, AutoencoderKLCodec)
    if with_vae:
        codec.device = "cpu"
    pipeline = DiffuSSMPipeline(
        transformer=empty_model(meta),
        scheduler=scheduler_for(config["sample"]["sampler"], config["diffusion"]["steps"]),
        vae=codec.network if with_vae else None,
        codec=None if with_vae else codec.spec(),
        id2label={str(number): name for number, name in enumerate(names)} or None,
    )
    folder.mkdir()
    for name in ("transformer", "scheduler"):
        getattr(pipeline, name).save_config(folder / name)
    pipeline.write_doors(folder)
    if with_vae:
        pipeline.vae.register_to_config(_name_or_path="")  # a path of this machine
        pipeline.vae.save_pretrained(folder / "vae")
    write_weights(folder / "transformer" / SAFETENSORS_WEIGHTS_NAME)
    pipeline.save_config(folder)
    (folder / "README.md").write_text(card)
