"""What a user of the package may write. Each `type: ignore` is an error that mypy must see, or else it complains."""

from pathlib import Path

import torch
from typing_extensions import assert_type

from diffussm.autoencoders.codec import Codec, codec_from_spec
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.config import Config, parse
from diffussm.data.index import Index
from diffussm.data.sources import ImageSource
from diffussm.data.sources.folder import FolderImages
from diffussm.data.store import Store, open_store
from diffussm.diffusion.generate import generate
from diffussm.diffusion.schedule import Schedule
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.training.checkpoint import Checkpoint, load_model

config = ModelConfig(preset="custom", width=64, depth=2)
assert_type(config.resolved(), ModelConfig)
assert_type(config.width, "int | None")
ModelConfig(width="wide")  # type: ignore[arg-type]

model = DiffuSSM(config, channels=4, num_classes=10)
assert_type(model.freeze(), DiffuSSM)
model.set_ssm_backend("quick")  # type: ignore[arg-type]

latents = generate(
    model,
    Schedule.linear().respace(25),
    (4, 8, 8),
    range(16),
    labels=None,
    num_classes=10,
    sampler="ddim",
    guidance=1.0,
    seed=0,
    device=torch.device("cpu"),
)
generate(model, Schedule.linear(), (4, 8, 8), range(16), labels=None)  # type: ignore[call-arg]

checkpoint = Checkpoint.at(Path("runs/a/checkpoints/step"))
assert_type(load_model(checkpoint), DiffuSSM)
assert_type(codec_from_spec(checkpoint.meta["codec"]), Codec)
codec: Codec = PixelCodec(28, 28, 1)
source: ImageSource = FolderImages("photos", 256, "adm")
assert_type(parse(["--config", "fashion32"]).config, Config)
assert_type(open_store("data/x"), Store)
assert_type(Index.load(open_store("data/x")), Index)
