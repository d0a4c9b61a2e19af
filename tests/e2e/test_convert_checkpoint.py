"""tools/convert_checkpoint.py on real runs: what it writes, what loads it, that nothing changes on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffussm.convert as convert_module
from benchmarks.common import in_fresh_process, peak_memory
from diffussm.autoencoders.kl import AutoencoderKLCodec
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.commands import convert_checkpoint, eval_fid, sample
from diffussm.config import Config, to_dict
from diffussm.data.encode import encode
from diffussm.data.index import Index
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.diffusion.noise import sample_noise
from diffussm.files import sha256_of
from diffussm.hub import DiffuSSMModel, DiffuSSMPipeline
from diffussm.hub.card import model_card
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.models.macs import forward_macs
from diffussm.training import checkpoint
from diffussm.training.monitor import log_of
from diffussm.training.resume import weights_from
from diffussm.training.tensor_file import pack

pytestmark = pytest.mark.e2e

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def convert(call):
    """Runs the command; its record."""

    def convert(*arguments: object) -> dict:
        code, out, error = call(convert_checkpoint.main, *arguments, "--json", "-")
        assert code == 0, error
        return json.loads(out)

    return convert


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Modules that diffusers copies go to a place of this test, and nothing is asked of the network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def draw(call):
    """Runs tools/sample.py; its images."""

    def draw(run: Path, out: Path, *options: object) -> np.ndarray:
