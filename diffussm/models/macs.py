"""Multiply-accumulates of a forward pass, by formula. The literature's "Gflops" are these MACs, not 2× them."""

from __future__ import annotations

import math

from diffussm.models.diffussm import FREQUENCIES, ModelConfig


def forward_macs(config: ModelConfig, channels: int, length: int) -> dict[str, int]:
    """MACs of one image, by part.

    Args:
        config: the network's size.
        channels: C of the latent.
        length: L = H·W, of which the dense layers see J = L/M.
    """
    config = config.resolved()
    D, M, depth = config.width, config.hourglass, config.depth
    L, J = length, length // config.hourglass
    fft_2L = round(2.5 * 2 * L * math.log2(2 * L) / 2)  # a real FFT of n points: 2.5 n log2 n operations, two to a MAC
    return {
        "W0": depth * J * D**2,
        "W_up": depth * L * D**2,
        "SSM convolution": depth * D * (2 * fft_2L + 4 * (L + 1)),  # there, times the kernel's spectrum, and back
        "SSM mix": depth * L * D**2,
        "W_down": depth * 2 * J * D**2,
        "W1, W2, W3": depth * 8 * J * D**2,
        "adaLN": (3 * depth + 2) * D**2,
        "ends": 3 * L * channels * D + 2 * M * J * D**2 + (FREQUENCIES + D) * D,
    }
