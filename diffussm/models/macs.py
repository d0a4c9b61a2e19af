"""Parameters and multiply-accumulates (MACs) of DiffuSSM and of DiT, by part and by formula.

FLOPs are 2 × MACs. The "Gflops" of the DiT and DiffuSSM papers are MACs (DiT's author: facebookresearch/DiT issue 14).
Matrix products, FFTs and products of spectra count; norms, activations, gates and sums do not.

Symbols: D width · M hourglass ratio · N state size · C latent channels · L = H·W positions of the latent, J = L/M.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from diffussm.models.diffussm import FREQUENCIES, ModelConfig
from diffussm.ops.kernel import split_length


def forward_macs(config: ModelConfig, channels: int, length: int) -> dict[str, int]:
    """MACs of one image in one forward pass of DiffuSSM, by part, as the paper defines the layers.

    The convolution is counted as by FFT, whichever backend runs it. What a batch shares is in :func:`kernel_macs` and
    :func:`mix_into_down_macs`.

    Args:
        config: the network's size.
        channels: C of the latent.
        length: L = H·W, a multiple of M; the dense layers see J = L/M.
    """
    config = config.resolved()
    D, M, depth = config.width, config.hourglass, config.depth
    L, J = length, length // M
    return {
        "W0": depth * J * D**2,
        "W_up": depth * L * D**2,
        "SSM FFT": depth * D * (2 * _real_fft(2 * L) + 4 * (L + 1)),  # there, times the kernel's spectrum, and back
        "SSM mix": depth * L * D**2,
        "W_down": depth * 2 * J * D**2,
        "W1": depth * 2 * J * D**2,
        "W2": depth * 4 * J * D**2,
        "W3": depth * 2 * J * D**2,
        "adaLN": (3 * depth + 2) * D**2,
        "conditioning": (FREQUENCIES + D) * D,
        "ends": 3 * L * channels * D + 2 * M * J * D**2,  # embed and decode (C→D, D→2C), fold and unfold (M·D↔D)
    }


def kernel_macs(config: ModelConfig, length: int) -> dict[str, int]:
    """MACs of generating every block's kernel: once a forward pass, however many images it has; none when cached.

    For each direction and channel K = Re(table_high · table_low) by l = stride·a + b, stride ≈ rows ≈ √L: the two
    tables of powers of N/2 complex modes, one of them times C B̄; their product as reals, [rows, N] · [N, stride]; and
    the spectrum of the two-sided kernel, 2L long. A product of complex numbers is 4 MACs.
    """
    config = config.resolved()
    D, N, depth = config.width, config.state, config.depth
    stride, rows = split_length(length)
    return {
        "powers": depth * 2 * D * N // 2 * (stride + 2 * rows) * 4,
        "matmul": depth * 2 * D * rows * stride * N,
        "FFT": depth * D * _real_fft(2 * length),
    }


def mix_into_down_macs(config: ModelConfig) -> int:
    """MACs of multiplying every block's SSM mix into its W_down, once a forward pass: [2D, D] · [D, D].

    A batch of more than 2D positions does these in place of "SSM mix" (:class:`diffussm.models.block.MixAndDown`).
    """
    config = config.resolved()
    return config.depth * 2 * config.width**3


def parameter_counts(config: ModelConfig, channels: int, num_classes: int) -> dict[str, int]:
    """Parameters of DiffuSSM, by the parts of :func:`forward_macs`, and "SSM kernel": what kernels are made from."""
    config = config.resolved()
    D, M, N, depth, C = config.width, config.hourglass, config.state, config.depth, channels
    return {
        "W0": depth * (D + 1) * D,
        "W_up": depth * M * (D + 1) * D,
        "SSM kernel": depth * (2 * D + 4 * 2 * D * N // 2 + D),  # Δ; re and im of A and C, N/2 a direction; skip
        "SSM mix": depth * (D + 1) * D,
        "W_down": depth * (D + 1) * 2 * D,
        "W1": depth * (D + 1) * 2 * D,
        "W2": depth * (2 * D + 1) * 2 * D,
        "W3": depth * (2 * D + 1) * D,
        "adaLN": (3 * depth + 2) * (D + 1) * D,
        "conditioning": (FREQUENCIES + 1) * D + (D + 1) * D + ((num_classes + 1) * D if num_classes else 0),
        "ends": (C + 1) * D + (M * D + 1) * D + (D + 1) * M * D + (D + 1) * 2 * C,
    }


class DiTSize(NamedTuple):
    """The size of a DiT (arXiv 2212.09748, table 1): its transformer sees L / patch² tokens."""

    width: int
    depth: int
    patch: int


DIT_SIZES = {
    "DiT-XL/2": DiTSize(1152, 28, patch=2),
    "DiT-XL/1": DiTSize(1152, 28, patch=1),  # as many tokens as DiffuSSM; not in its paper
}


def dit_macs(size: DiTSize, channels: int, length: int) -> dict[str, int]:
    """MACs of one image in one forward pass of DiT, by part, counted as :func:`forward_macs` counts.

    Args:
        size: the network's.
        channels: C of the latent.
        length: H·W of the latent, a multiple of patch².
    """
    D, depth, patch = size
    tokens = length // patch**2
    return {
        "attention": depth * 2 * tokens**2 * D,  # queries · keys, weights · values
        "projections": depth * 4 * tokens * D**2,  # to queries, keys and values, and out
        "MLP": depth * 8 * tokens * D**2,
        "adaLN": (6 * depth + 2) * D**2,
        "conditioning": (FREQUENCIES + D) * D,
        "ends": 3 * length * channels * D,  # patches C·patch² → D, and D → 2C·patch²
    }


def dit_parameter_counts(size: DiTSize, channels: int, num_classes: int) -> dict[str, int]:
    """Learned parameters of DiT, by the parts of :func:`dit_macs`; attention itself has none."""
    D, depth, patch = size
    pixels = channels * patch**2
    return {
        "projections": depth * 4 * (D + 1) * D,
        "MLP": depth * ((D + 1) * 4 * D + (4 * D + 1) * D),
        "adaLN": (6 * depth + 2) * (D + 1) * D,
        "conditioning": (FREQUENCIES + 1) * D + (D + 1) * D + (num_classes + 1) * D,
        "ends": (pixels + 1) * D + (D + 1) * 2 * pixels,
    }


def _real_fft(points: int) -> int:
    """A real FFT is 2.5 n log2 n operations, two to a MAC."""
    return round(2.5 * points * math.log2(points) / 2)
