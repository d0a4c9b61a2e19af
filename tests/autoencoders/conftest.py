from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL


@pytest.fixture(scope="session")
def make_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a tiny AutoencoderKL of random weights: by default of factor 2, with 4 channels."""

    def make(seed: int = 0, safe: bool = True, levels: int = 2, **config: Any) -> Path:
        torch.manual_seed(seed)
        blocks = {
            "block_out_channels": (8, 16, 16, 16)[:levels],
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
        }
        settings = {"layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4} | blocks | config
        folder = tmp_path_factory.mktemp("autoencoder")
        AutoencoderKL(**settings).save_pretrained(folder, safe_serialization=safe)
        return folder

    return make
