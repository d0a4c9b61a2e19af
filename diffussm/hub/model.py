"""The network as a model of diffusers: its configuration, its way to load and save, its signature."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import is_accelerate_available
from torch import Tensor

from diffussm.errors import UserError
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.models.s4d import BiSSM

HALF = (torch.bfloat16, torch.float16)


class DiffuSSMModel(DiffuSSM, ModelMixin, ConfigMixin):
    """:class:`DiffuSSM` with ``from_pretrained`` and ``save_pretrained``; weights have the same names in both.

    In a half precision the state space parameters stay fp32, and the forward pass is autocast, as training's is.

    Args:
        in_channels: C, of the latent.
        sample_size: side of the latents that it was trained on; it takes others.
        num_classes: 0 for an unconditional model; label ``num_classes`` is the null class.
        width: D, channels of the residual stream, a multiple of 4.
        depth: number of blocks.
        hourglass: M, which divides 2D and the number of positions.
        state: N, state size of S4D, even.

    Raises:
        UserError: the size is impossible.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("HourglassBlock",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 32,
        num_classes: int = 1000,
        width: int = 1152,
        depth: int = 29,
        hourglass: int = 2,
        state: int = 64,
    ) -> None:
        super().__init__(ModelConfig("custom", width, depth, hourglass, state), in_channels, num_classes)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> DiffuSSMModel:
        """As diffusers', from safetensors; rounded once it is read: diffusers would round the state space, too.

        Raises:
            UserError: the weights are not all those of the configuration's model, or the dtype is none of torch's.
        """
        dtype = dtype or torch_dtype or torch.float32
        if not isinstance(dtype, torch.dtype):
            raise UserError(
                f"dtype {dtype!r} is not one of torch's: give torch.float32, torch.bfloat16 or torch.float16"
            )
        options.setdefault("low_cpu_mem_usage", is_accelerate_available())
        options["use_safetensors"] = True  # never a pickle
        with_info = options.pop("output_loading_info", False)
        checks = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are told, here
        model, info = super().from_pretrained(pretrained_model_name_or_path, **options, **checks)
        for problem in ("missing", "unexpected", "mismatched"):
            if names := sorted(map(str, info[f"{problem}_keys"])):
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(f"{pretrained_model_name_or_path}: {problem} weights: {names[0]}{more}")
        for parameter in model.parameters():  # mapped from the file, unaligned: products would round differently
            parameter.data = parameter.data.clone()
        torch.nn.Module.to(model, dtype)
        return (model, info) if with_info else model

    @property
    def gradient_checkpointing(self) -> bool:
        """What ``enable_gradient_checkpointing`` sets: :class:`DiffuSSM`'s own, which works while training."""
        return self.activation_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.activation_checkpointing = enable

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict noise and covariance; the signature of DiTTransformer2DModel.

        Args:
            hidden_states: noisy latents [B, C, H, W].
            timestep: 0..999, one for all or [B].
            class_labels: int64 [B], ``num_classes`` for none; None for all none, or for an unconditional model.
            return_dict: whether to return an output object rather than a tuple.

        Returns:
            ``sample`` [B, 2C, H, W], fp32 whatever the model's dtype: ε, then v, the interpolation of the log variance.
        """
        device, dtype = hidden_states.device, self.embed.weight.dtype
        timestep = torch.as_tensor(timestep, device=device).expand(len(hidden_states))
        half = torch.autocast(device.type, dtype) if dtype in HALF else contextlib.nullcontext()
        with half:
            sample = super().forward(hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffuSSMModel:
        """What ``to``, ``half`` and their like do to every parameter; those of the state space move and keep fp32."""
        layers = [module for module in self.modules() if isinstance(module, BiSSM)]
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        exact = {id(tensor) for parameter in parameters for tensor in (parameter, parameter.grad)}

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in exact and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        return super()._apply(moved, recurse)
