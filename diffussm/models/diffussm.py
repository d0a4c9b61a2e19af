"""The network: latents in, predicted noise and covariance out. No attention, no patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffussm.errors import UserError
from diffussm.models.block import HourglassBlock, modulate
from diffussm.models.s4d import BiSSM
from diffussm.ops.s4d import Backend, fastest_backend

PRESETS = {  # name: (width, depth). XL is the paper's; it names no other size: ours follow DiT's widths.
    "Ti": (192, 12),
    "S": (384, 12),
    "B": (768, 12),
    "L": (1024, 24),
    "XL": (1152, 29),
}
FREQUENCIES = 256  # of the timestep embedding
# Conditions are computed in multiples of so many rows, one an image, so that a row's bits do not depend on the others:
# matrix libraries sum the products of fewer than 4 rows in another order, and elementwise functions compute what is
# left over of a processor's vectors (at most 32 numbers) in another way. It costs next to nothing.
ROWS = 8
EMBEDDED_SIZE = (
    32  # positions count as if the image had this many: 32×32 latents are the size of the paper's 256 px models
)


@dataclass
class ModelConfig:
    """The network's size. Latent channels and the number of classes come from the data set.

    Attributes:
        preset: Ti, S, B, L or XL, which set width and depth; or "custom".
        width: D, channels of the residual stream; a multiple of 4. Set by the preset unless that is "custom".
        depth: number of blocks. Set by the preset unless that is "custom".
        hourglass: M, the factor by which dense layers see a shorter sequence; divides height × width of the latent.
        state: N, state size of S4D, even.
    """

    preset: str = "XL"
    width: int | None = None
    depth: int | None = None
    hourglass: int = 2
    state: int = 64

    def resolved(self) -> ModelConfig:
        """The same size with width and depth filled in. Raises UserError on an impossible one."""
        width, depth = self.width, self.depth
        if self.preset in PRESETS:
            if (width, depth) not in ((None, None), PRESETS[self.preset]):
                raise UserError(
                    f"model.preset {self.preset} already says width and depth: to choose them, set model.preset custom"
                )
            width, depth = PRESETS[self.preset]
        elif self.preset != "custom":
            raise UserError(f"model.preset {self.preset!r} is not one of {', '.join(PRESETS)}, custom")
        if not width or not depth or width < 4 or width % 4 or depth < 1:
            raise UserError(
                f"model.preset custom needs model.width, a multiple of 4, and model.depth ≥ 1, not {width} and {depth}:"
                " for example 128 and 6"
            )
        if self.hourglass < 1 or 2 * width % self.hourglass:
            raise UserError(f"model.hourglass {self.hourglass} does not divide 2·width = {2 * width}: 2 does")
        if self.state < 2 or self.state % 2:
            raise UserError(f"model.state {self.state} is not an even number ≥ 2: S4D keeps conjugate pairs; use 64")
        return ModelConfig(self.preset, width, depth, self.hourglass, self.state)


class DiffuSSM(nn.Module):
    """The attention-free denoiser (arXiv 2311.18257): ε and Σ of latents at timestep t, given a class.

    Args:
        config: the size.
        channels: C, of the latent.
        num_classes: 0 for an unconditional model; label ``num_classes`` is the null class of classifier-free guidance.
        activation_checkpointing: while training, keep only each block's input and compute the rest again in the
            backward pass.
    """

    def __init__(
        self, config: ModelConfig, channels: int, num_classes: int, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        config = config.resolved()
        width = config.width
        self.size, self.channels, self.num_classes = config, channels, num_classes
        self.activation_checkpointing = activation_checkpointing
        self.embed = nn.Linear(channels, width)
        self.fold = nn.Linear(config.hourglass * width, width)
        self.time_mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embedding = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.blocks = nn.ModuleList(HourglassBlock(width, config.hourglass, config.state) for _ in range(config.depth))
        self.unfold = nn.Linear(width, config.hourglass * width)
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.decode = nn.Linear(width, 2 * channels)
        self.initialize()

    def set_ssm_backend(self, backend: Backend) -> None:
        """Of the state space layers while they train; evaluation convolves with a kernel that it keeps."""
        for block in self.blocks:
            block.ssm.backend = backend

    def freeze(self) -> DiffuSSM:
        """Make this a model to sample from, for good, and return it: what follows from the weights alone is made once.

        That is each kernel's spectrum at a length, and the product of each block's mix and W_down, which takes their
        place. On a CPU in fp32, the bits of an image's output then do not depend on the batch that it is in. The model
        is in eval mode, on the device where it will stay; its state dict is no longer that of a checkpoint.
        """
        for block in self.blocks:
            block.ssm.freeze()
            block.mix_and_down.freeze()
        return self.eval()

    @torch.no_grad()
    def initialize(self) -> None:
        """adaLN-zero: every block starts as the identity, and the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.time_mlp[0], self.time_mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        if self.class_embedding is not None:
            # as large as the embedding of the timestep grows: at 0.02, short runs hardly learn their classes
            nn.init.normal_(self.class_embedding.weight)
        for linear in (*(block.modulation for block in self.blocks), self.final_modulation, self.decode):
            nn.init.zeros_(linear.weight)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None) -> Tensor:
        """Predict noise and covariance.

        Args:
            x_BCHW: noisy latents; H·W a multiple of M.
            t_B: timesteps, 0..999.
            y_B: class labels, ``num_classes`` for none; None for all none, or for an unconditional model.

        Returns:
            [B, 2C, H, W] in fp32: ε, then v, the interpolation of the log variance.
        """
        batch, channels, height, width = x_BCHW.shape
        if height * width % self.size.hourglass:
            raise ValueError(f"{height}×{width} positions are not a multiple of M = {self.size.hourglass}")
        tokens_BLD = self.embed(x_BCHW.flatten(2).transpose(1, 2))
        tokens_BLD = tokens_BLD + position_embedding(height, width, tokens_BLD.shape[-1], x_BCHW.device)
        x_BJD = self.fold(tokens_BLD.reshape(batch, -1, self.fold.in_features))

        padding = 0, -batch % ROWS
        condition_BD = self.time_mlp(timestep_embedding(F.pad(t_B, padding)))
        if self.class_embedding is not None:
            if y_B is None:
                y_B = torch.full_like(t_B, self.num_classes)
            condition_BD = condition_BD + self.class_embedding(F.pad(y_B, padding))
        for block in self.blocks:
            if self.activation_checkpointing and self.training:  # nothing in a block is random: no RNG state to keep
                x_BJD = checkpoint(block, x_BJD, condition_BD, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BJD = block(x_BJD, condition_BD)

        tokens_BLD = self.unfold(x_BJD).view(batch, height * width, -1)
        shift_BD, scale_BD = self.final_modulation(F.silu(condition_BD))[:batch].chunk(2, dim=-1)
        out_BLC = self.decode(modulate(self.final_norm(tokens_BLD), shift_BD, scale_BD))
        return out_BLC.float().transpose(1, 2).reshape(batch, 2 * channels, height, width)


def choose_ssm_backend(config: ModelConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> str:
    """The backend of the S4D that trains this model faster, timed here on a batch of its size: fft or chunked."""
    config = config.resolved()
    parameters = BiSSM(config.width, config.state).to(device).s4d_parameters()
    shape = (config.hourglass, config.width, batch, length // config.hourglass)
    u_DBJM = torch.randn(shape, device=device, dtype=dtype).permute(1, 2, 3, 0).requires_grad_()
    with torch.enable_grad():
        return fastest_backend(u_DBJM, parameters)


def timestep_embedding(t_B: Tensor) -> Tensor:
    """Sinusoids of the timestep, [B] → [B, 256], periods from 2π to 2π·10⁴ (arXiv 1706.03762, section 3.5)."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t_B.device) / half)
    angles = t_B.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Fixed 2-D sin-cos embedding in raster order, [H·W, dim], in coordinates relative to the image's size.

    Relative, so that weights trained at 32×32 also run at 64×64. Half of the dimensions tell the row, half the column.
    """
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 4, device=device) / (dim // 4))

    def axis(size: int) -> Tensor:
        angles = (torch.arange(size, device=device) + 0.5).mul(EMBEDDED_SIZE / size).unsqueeze(-1) * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # [size, dim/2]

    rows = axis(height).unsqueeze(1).expand(-1, width, -1)
    columns = axis(width).unsqueeze(0).expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)
