"""AutoencoderKL of diffusers: the autoencoder of Stable Diffusion and its kin. Loading one imports diffusers."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffussm.autoencoders.rounding import Rounding, to_uint8
from diffussm.determinism import same_bits_each_time
from diffussm.errors import UserError, needs
from diffussm.threads import map_batches

DTYPES = ("float16", "float32")
PIXELS_AT_ONCE = 8 * 512 * 512  # encoded or decoded in one go: a GPU of 16 GB has room for their activations
PIXELS_A_THREAD = 512 * 512  # encoded in one go on a CPU
# What of diffusers' configuration the weights are run by. Versions of diffusers add keys; these have always been there.
IDENTITY = (
    "in_channels", "out_channels", "latent_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "act_fn", "norm_num_groups",
)  # fmt: skip


@dataclass(eq=False)
class AutoencoderKLCodec:
    """Latents are the posterior's moments, [2C, h, w]: mean and log-variance.

    Made by :meth:`open` from weights, or by its fields from an index or a checkpoint; then the weights are loaded when
    they are first needed, or by :meth:`load`, and must be the same.

    Attributes:
        location: a hub id, or a folder as diffusers saves it.
        size: side of the square images.
        dtype_name: float16 or float32, of the stored moments.
        weights: sha256 of the configuration and of every tensor, however they are divided into files.
        device: where the network runs; None: a GPU, if there is one.
    """

    name: ClassVar[str] = "autoencoder-kl"
    posterior: ClassVar[bool] = True

    location: str
    size: int
    dtype_name: str
    latent_channels: int
    factor: int
    scale: float
    shift: float
    weights: str
    device: str | None = None
    _network: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, location: str, size: int, dtype: str = "float16", device: str | None = None) -> AutoencoderKLCodec:
        """The codec for ``size``×``size`` RGB images by the weights at ``location``.

        Raises:
            UserError: there is no AutoencoderKL there, it is not one of RGB images, has no safetensors, or ``size`` is
                not a multiple of its factor.
        """
        network = _load_network(location)
        config = network.config
        if (config.in_channels, config.out_channels) != (3, 3):
            raise UserError(f"autoencoder {location} takes {config.in_channels} channels, not RGB's 3")
        factor = _factor(network)
        if size % factor:
            raise UserError(
                f"--size {size} is no multiple of {factor}, by which autoencoder {location} divides it: "
                f"{math.ceil(size / factor) * factor} is"
            )
        codec = cls.around(network, size // factor, dtype, device)
        codec.location, codec.weights = str(location), hash_weights(network)
        return codec

    @classmethod
    def around(cls, network: Any, side: int, dtype: str = "float32", device: str | None = None) -> AutoencoderKLCodec:
        """The codec of a network at hand for latents of ``side``×``side``, by its own scale and shift; of no spec."""
        factor = _factor(network)
        return cls(
            location="",
            size=side * factor,
            dtype_name=dtype,
            latent_channels=network.config.latent_channels,
            factor=factor,
            scale=float(network.config.scaling_factor),
            shift=float(network.config.shift_factor or 0.0),
            weights="",
            device=device,
            _network=network,
        )

    @classmethod
    def from_spec(cls, spec: dict[str, Any], location: str | None = None) -> AutoencoderKLCodec:
        """The codec of a :meth:`spec`; its weights are looked for at ``location`` if they have moved.

        Raises:
            TypeError: the spec is not one of this codec.
        """
        kinds = {
            "location": str, "size": int, "dtype": str, "latent_channels": int, "factor": int, "scale": float,
            "shift": float, "weights": str,
        }  # fmt: skip
        if set(spec) != {"name", *kinds} or any(type(spec[key]) is not kind for key, kind in kinds.items()):
            raise TypeError("not the fields of this codec")
        if spec["dtype"] not in DTYPES or min(spec["size"], spec["factor"], spec["latent_channels"]) < 1:
            raise TypeError("impossible values")
        values = {key: value for key, value in spec.items() if key not in ("name", "dtype")}
        return cls(**values | {"location": location or spec["location"]}, dtype_name=spec["dtype"])

    @property
    def dtype(self) -> np.dtype:
        """Of the stored moments."""
        return np.dtype(self.dtype_name).newbyteorder("<")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w]."""
        side = self.size // self.factor
        return self.latent_channels, side, side

    @property
    def device_kind(self) -> str:
        """``cpu`` or ``cuda``: one's moments differ from the other's in their last bits."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu")).type

    def spec(self) -> dict[str, Any]:
        """Name and configuration, for an index or a checkpoint."""
        return {
            "name": self.name,
            "location": self.location,
            "size": self.size,
            "dtype": self.dtype_name,
            "latent_channels": self.latent_channels,
            "factor": self.factor,
            "scale": self.scale,
            "shift": self.shift,
            "weights": self.weights,
        }

    def load(self) -> None:
        """Load the weights now.

        Raises:
            UserError: they are not to be had, or are others than those that encoded.
        """
        if self._network is None:
            network = _load_network(self.location)
            if (found := hash_weights(network)) != self.weights:
                raise UserError(
                    f"autoencoder {self.location} has other weights ({found[:12]}) than those that encoded the data "
                    f"({self.weights[:12]}): give the folder of the original ones as data.autoencoder, or --autoencoder"
                )
            self._network = network
        device = self.device or self.device_kind
        self._network.to(device)
        self.device = device

    @property
    def network(self) -> Any:
        """The AutoencoderKL, with the scale and shift of this codec in its configuration. Raises as :meth:`load`."""
        self.load()
        self._network.register_to_config(scaling_factor=self.scale, shift_factor=self.shift or None)
        return self._network

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, 3] → moments [N, 2C, h, w], not normalised.

        The same bits each time on the same kind of processor, whatever the number of threads.

        Raises:
            UserError: the images are of another type or shape; a moment is not a number, or too large for float16.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (self.size, self.size, 3):
            raise UserError(
                f"this autoencoder takes uint8 images [{self.size}, {self.size}, 3], got {images.dtype} "
                f"{list(images.shape[1:])}"
            )
        self.load()
        moments = np.empty((len(images), 2 * self.latent_channels, *self.latent_shape[1:]), self.dtype)
        on_cpu = self.device_kind == "cpu"
        batches = self._in_turn(len(images), PIXELS_A_THREAD if on_cpu else PIXELS_AT_ONCE)
        with same_bits_each_time():
            results = (map_batches if on_cpu else map)(lambda rows: self._encode_batch(images[rows]), batches)
            for rows, values in zip(batches, results, strict=True):
                with np.errstate(over="ignore"):
                    moments[rows] = values
                if not np.isfinite(moments[rows]).all():
                    way_out = "" if not np.isfinite(values).all() else ", but fits --dtype float32"
                    raise UserError(
                        f"a latent of autoencoder {self.location} is not a finite {self.dtype_name}{way_out}"
                    )
        return moments

    @torch.no_grad()
    def _encode_batch(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, size, size, 3] → float32 [n, 2C, h, w]. On a CPU one thread does it all: more add up otherwise."""
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = self._network.encode(x).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu().numpy()

    @torch.no_grad()
    def decode(self, latents: Tensor, rounding: Rounding = "nearest") -> np.ndarray:
        """Normalised [N, C, h, w] → uint8 [N, size, size, 3].

        On a CPU one at a time: an image has the same bits in any batch.

        Raises:
            UserError: the latents are of another shape.
        """
        if latents.shape[1:] != self.latent_shape:
            raise UserError(f"this autoencoder decodes {self.latent_shape}, got {tuple(latents.shape[1:])}")
        self.load()
        images = np.empty((len(latents), self.size, self.size, 3), np.uint8)
        with same_bits_each_time():
            for rows in self._in_turn(len(latents), 1 if self.device_kind == "cpu" else PIXELS_AT_ONCE):
                z = latents[rows].to(self.device).float() / self.scale + self.shift
                pixels = (self._network.decode(z.to(self._network.dtype)).sample.float() + 1) * 127.5
                images[rows] = to_uint8(pixels, rounding).permute(0, 2, 3, 1).cpu().numpy()
        return images

    def _in_turn(self, count: int, pixels_at_once: int) -> list[slice]:
        """Batches that fit in memory; the same on any machine, since they decide the last bits."""
        batch = max(1, pixels_at_once // self.size**2)
        return [slice(start, start + batch) for start in range(0, count, batch)]


def _factor(network: Any) -> int:
    """By which it divides an image's sides."""
    return 2 ** (len(network.config.block_out_channels) - 1)


def hash_weights(network: Any) -> str:
    """sha256 of a diffusers model: what of its configuration it is run by, and every tensor by name."""
    digest = hashlib.sha256(json.dumps({key: network.config[key] for key in IDENTITY}).encode())
    for name, tensor in sorted(network.state_dict().items()):
        array = tensor.detach().cpu().float().contiguous().numpy()
        digest.update(f"{name} {list(array.shape)}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _load_network(location: str) -> Any:
    """The AutoencoderKL at ``location`` in fp32, or in its sub-folder ``vae`` where that is a whole pipeline."""
    with needs(f"autoencoder {location}", "hub"):
        from diffusers import AutoencoderKL

    folder = Path(location)
    subfolder = "vae" if (folder / "vae" / "config.json").is_file() else None
    if folder.is_dir() and subfolder is None and not (folder / "config.json").is_file():
        raise UserError(f"{location} holds no autoencoder: config.json is missing, which diffusers saves with one")
    try:
        network = AutoencoderKL.from_pretrained(
            str(location), subfolder=subfolder, use_safetensors=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
    except Exception as error:  # diffusers and the hub raise what they like
        if folder.is_dir():
            if list(folder.rglob("*.bin")) and not list(folder.rglob("*.safetensors")):
                problem = "its weights are a pickle, which is not read: save them anew with safe_serialization=True"
            else:
                problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"autoencoder {location} cannot be loaded: {problem}") from error
        raise UserError(
            f"autoencoder {location} is neither a folder nor to be had from the hub ({type(error).__name__}): give a "
            f"folder that diffusers saved, or have the hub's cache (HF_HOME) on this machine"
        ) from error
    return network.eval().requires_grad_(False)
