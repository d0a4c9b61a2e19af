"""Images from a model, a scheduler and what decodes latents, as a pipeline of diffusers."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import is_accelerate_available
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from torch import Tensor

from diffussm.autoencoders.codec import Codec, codec_from_spec
from diffussm.autoencoders.kl import AutoencoderKLCodec
from diffussm.diffusion.guidance import Guided
from diffussm.errors import UserError
from diffussm.hub import schedulers
from diffussm.hub.model import DiffuSSMModel

Label = int | str
NOT_FETCHED = ["*.py", "*.bin", "*.pt", "*.ckpt"]  # code and pickles
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LEARNED = ("learned", "learned_range")
NEEDED_OF_SCHEDULERS = ("init_noise_sigma", "scale_model_input", "set_timesteps", "step")
DOOR = '"""What diffusers runs where it is told to trust this folder: the installed package, and nothing else."""\n\n'
COMPONENTS = {
    "transformer": (DiffuSSMModel,),
    "scheduler": (schedulers.RespacedDDPMScheduler, schedulers.RespacedDPMSolverScheduler),
}


class DiffuSSMPipeline(DiffusionPipeline):
    """Draws images of classes, or of an unconditional model.

    Args:
        transformer: the network. The name is DiT's; there is no attention in it.
        scheduler: any that takes predicted noise. DDPMScheduler of a learned variance is given the covariance, too.
        vae: decodes latents by the scale and the shift of its configuration.
        codec: the specification of a pixel codec, which decodes in its place.
        id2label: names of the classes.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 - diffusers adds lists to it
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: DiffuSSMModel,
        scheduler: KarrasDiffusionSchedulers,
        vae: AutoencoderKL | None = None,
        codec: dict[str, Any] | None = None,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(codec=codec, id2label=id2label)
        self.labels = {name: int(label) for label, name in (id2label or {}).items()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> DiffuSSMPipeline:
        """As diffusers', from a folder or a hub id; code that comes with it is not run, and needs no trust."""
        place = pretrained_model_name_or_path
        if not Path(place).is_dir():
            hub = {
                key: options.pop(key) for key in ("revision", "token", "cache_dir", "force_download") if key in options
            }
            hub["local_files_only"] = options.pop("local_files_only", False)
            place = snapshot_download(str(place), ignore_patterns=NOT_FETCHED, **hub)
        table = cls.load_config(place)
        dtype = options.get("dtype") or options.get("torch_dtype")
        for name, classes in COMPONENTS.items():
            for kind in classes:
                if table.get(name) == [kind.__module__, kind.__name__] and name not in options:
                    own = dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype
                    cast = {"torch_dtype": own} if kind is DiffuSSMModel else {}
                    options[name] = kind.from_pretrained(place, subfolder=name, **cast)
        options.setdefault("low_cpu_mem_usage", is_accelerate_available())
        options.setdefault("use_safetensors", True)  # never a pickle
        return super().from_pretrained(place, **options)

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """As diffusers', with the modules that diffusers loads the folder by."""
        self.write_doors(Path(save_directory))
        super().save_pretrained(save_directory, *arguments, **options)

    def write_doors(self, folder: Path) -> None:
        """Modules, one import each, that diffusers runs in place of this package's where it is told to trust them."""
        doors = {"pipeline.py": DiffuSSMPipeline}
        for name in COMPONENTS:
            kind = type(getattr(self, name))
            if kind.__module__.startswith("diffussm."):
                doors[f"{name}/{kind.__module__}.py"] = kind
        for file, kind in doors.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(f"{DOOR}from {kind.__module__} import {kind.__name__}  # noqa: F401\n")

    def label_ids(self, class_labels: Label | Sequence[Label]) -> list[int]:
        """Ids of classes by id or name. UserError for one that is none, and for no label."""
        known, ids = self.transformer.config.num_classes, []
        sequence = isinstance(class_labels, Iterable) and not isinstance(class_labels, str)
        if sequence and getattr(class_labels, "ndim", 1):
            labels = list(class_labels)
        else:
            labels = [class_labels]
        if not labels:
            raise UserError("class_labels is empty: give a label for each image")
        for label in labels:
            try:
                number = self.labels.get(label) if isinstance(label, str) else operator.index(label)
            except TypeError:  # not a whole number
                number = None
            if number is None or not 0 <= number < known:
                names = f" or a name ({', '.join(list(self.labels)[:10])})" if self.labels else ""
                raise UserError(f"class label {label!r} is not one of 0..{known - 1}{names}")
            ids.append(number)
        return ids

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | None = None,
        guidance_scale: float = 1.0,
        guidance_channels: int | None = None,
        num_inference_steps: int = 250,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        batch_size: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw an image for each label.

        Args:
            class_labels: ids or names; None for an unconditional model.
            guidance_scale: of classifier-free guidance; 1 is none.
            guidance_channels: guide only the first so many channels of the noise, as DiT did with 3; None guides all.
            num_inference_steps: of the scheduler, at least 1.
            generator: of the noise, on any device; a list has one for each image.
            latents: x_T, standard normal [B, C, H, W], in place of what the generator draws. Sides that the decoder
                does not take, such as unequal ones, are refused before the first step; not if latents are asked for.
            batch_size: images of an unconditional model.
            output_type: pil; np, float32 [B, H, W, 1 or 3] in [0, 1]; pt, the same as [B, 1 or 3, H, W]; or latent,
                float32 [B, C, H, W], normalised as the model sees them. Images have 8 bits.
            return_dict: whether to return an output object rather than a tuple.
            callback_on_step_end: (pipeline, step, timestep, {"latents"}) -> what it replaces of that, after each step.
            callback_on_step_end_tensor_inputs: what it is given: "latents", or nothing.

        Raises:
            UserError: a label, an output type, a shape or a number is impossible, or the scheduler takes no noise.
        """
        device, size = self._execution_device, self.transformer.config
        self._check_scheduler()
        if num_inference_steps < 1:
            raise UserError(f"num_inference_steps {num_inference_steps} is not at least 1")
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise UserError(f"callback_on_step_end_tensor_inputs: {', '.join(sorted(unknown))} is not latents")
        if bool(size.num_classes) != (class_labels is not None):
            have = f"has {size.num_classes} classes: say class_labels" if size.num_classes else "has no classes"
            raise UserError(f"this model {have}")
        denoiser = self._denoise
        if size.num_classes:
            ids = torch.tensor(self.label_ids(class_labels), device=device)
            batch_size = len(ids)
            denoiser = Guided(self._denoise, ids, size.num_classes, guidance_scale, guidance_channels)
        shape = (batch_size, size.in_channels, size.sample_size, size.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.ndim != 4 or latents.shape[:2] != shape[:2]:
            raise UserError(f"latents are {list(latents.shape)}, where {list(shape)} is wanted")
        if output_type != "latent":
            self._decoder(latents.shape[1:])

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma
        takes_variance = isinstance(self.scheduler, DDPMScheduler) and self.scheduler.config.variance_type in LEARNED
        options = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            output = denoiser(self.scheduler.scale_model_input(x, t), t.expand(batch_size))
            if takes_variance:
                x = self.scheduler.step(output, t, x, **options).prev_sample
            else:
                with _all_channels(self.scheduler):
                    x = self.scheduler.step(output[:, : size.in_channels], t, x, **options).prev_sample
            if callback_on_step_end is not None:
                given = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                x = (callback_on_step_end(self, step, t, given) or {}).get("latents", x)

        images = x if output_type == "latent" else self._finish(self.decode(x), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Normalised latents [B, C, H, W] → uint8 images [B, H', W', 1 or 3]. UserError where there is no decoder."""
        return self._decoder(latents.shape[1:]).decode(latents)

    def _decoder(self, shape: Sequence[int]) -> Codec:
        """What decodes latents [C, H, W]. UserError where nothing does."""
        if self.vae is not None:
            codec = AutoencoderKLCodec.around(self.vae, shape[-1], device=str(self._execution_device))
        elif self.config.codec is not None:
            codec = codec_from_spec(dict(self.config.codec))
        else:
            raise UserError("this pipeline has neither a vae nor a codec: ask for output_type='latent'")
        if tuple(shape) != codec.latent_shape:
            raise UserError(
                f"latents {list(shape)} are not decoded here, {list(codec.latent_shape)} are: ask for "
                f"output_type='latent'"
            )
        return codec

    def _denoise(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.transformer(x, t, labels, return_dict=False)[0]

    def _check_scheduler(self) -> None:
        """Raise UserError unless the scheduler takes steps from predicted noise."""
        scheduler, has = self.scheduler, functools.partial(hasattr, self.scheduler)
        if scheduler.config.get("prediction_type") != "epsilon" or not all(map(has, NEEDED_OF_SCHEDULERS)):
            raise UserError(
                f"{type(scheduler).__name__} (prediction_type {scheduler.config.get('prediction_type')}) takes no "
                f"predicted noise: take one of prediction_type epsilon, by from_config(pipeline.scheduler.config)"
            )

    def _finish(self, images_NHWC: np.ndarray, output_type: str) -> Any:
        values = images_NHWC.astype(np.float32) / 255
        if output_type == "pt":
            return torch.from_numpy(values).permute(0, 3, 1, 2)
        return self.numpy_to_pil(values) if output_type == "pil" else values


@contextmanager
def _all_channels(scheduler: Any) -> Iterator[None]:
    """Without the setting of a learned variance, by which some solvers cut the noise to 3 channels."""
    variance = scheduler.config.get("variance_type")
    if variance not in LEARNED:
        yield
        return
    scheduler.register_to_config(variance_type=None)
    try:
        yield
    finally:
        scheduler.register_to_config(variance_type=variance)
