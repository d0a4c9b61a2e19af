"""The two-sided convolution by FFT, in blocks of channels and images whose temporaries stay in the cache.

Shapes: B batch · L length · D channels, d and b of a block · f = L + 1 frequencies. Tensors are channels first,
[D, B, L]; the positions may fill more than one axis, and strides are free, so that [B, L, D] needs no copy of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffussm.ops.kernel import Modes, two_sided_kernel

# Of a block's padded signals. On a CPU the cache decides (1.3-4x faster than whole tensors); on a GPU, the memory.
BLOCK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}


def kernel_spectrum(modes: Modes, length: int) -> Tensor:
    """The spectrum of the two-sided kernel, [D, L + 1] complex64."""
    return torch.fft.rfft(two_sided_kernel(modes, length))


def convolve(u_DBL: Tensor, modes: Modes) -> Tensor:
    """y_l = Σ_m k2[(l - m) mod 2L] u_m for each channel: both directions and the skip in one FFT convolution."""
    return _convolve(u_DBL, lambda channels, length: kernel_spectrum(modes.of(channels), length))


def convolve_with_spectrum(u_DBL: Tensor, spectrum_Df: Tensor) -> Tensor:
    """The same, with a kernel whose spectrum is at hand."""
    return _convolve(u_DBL, lambda channels, length: spectrum_Df[channels])


def _convolve(u_DBL: Tensor, spectrum_of: Callable[[slice, int], Tensor]) -> Tensor:
    y_DBL = torch.empty_like(u_DBL)
    blocks = _Blocks(u_DBL)
    for channels in blocks.channels:
        kernel_df = spectrum_of(channels, blocks.length)
        for images in blocks.images:
            signal_dbf = blocks.spectrum(u_DBL[channels, images])
            signal_dbf *= kernel_df.unsqueeze(1)
            blocks.signal(signal_dbf, out=y_DBL[channels, images])
    return y_DBL


def convolve_backward(u_DBL: Tensor, modes: Modes, grad_DBL: Tensor) -> tuple[Tensor, Modes]:
    """The gradients of u and of the modes. Kernel and spectra are computed again, block by block; the kernel's gradient
    is summed over the batch as a spectrum."""
    grad_u_DBL, grad_modes = torch.empty_like(u_DBL), Modes(*map(torch.empty_like, modes))
    blocks = _Blocks(u_DBL)
    for channels in blocks.channels:
        with torch.enable_grad():
            block = Modes(*(mode.detach().requires_grad_() for mode in modes.of(channels)))
            kernel_d2L = two_sided_kernel(block, blocks.length)
        kernel_df = torch.fft.rfft(kernel_d2L.detach()).conj_physical_()
        grad_kernel_df = torch.zeros_like(kernel_df)
        for images in blocks.images:
            grad_dbf = blocks.spectrum(grad_DBL[channels, images])
            correlation_dbf = blocks.spectrum(u_DBL[channels, images]).conj_physical_()
            correlation_dbf *= grad_dbf
            grad_kernel_df += correlation_dbf.sum(1)
            grad_dbf *= kernel_df.unsqueeze(1)
            blocks.signal(grad_dbf, out=grad_u_DBL[channels, images])
        grad_kernel_d2L = torch.fft.irfft(grad_kernel_df, n=2 * blocks.length)
        parts = torch.autograd.grad(kernel_d2L, block, grad_kernel_d2L)
        for whole, part in zip(grad_modes, parts, strict=True):
            whole[channels] = part
    return grad_u_DBL, grad_modes


def block_shape(width: int, batch: int, length: int, device: str) -> tuple[int, int, int]:
    """[d, b, 2L] of the padded signals of a block; at least 8 channels."""
    signals = max(8, BLOCK_BYTES["cpu" if device == "cpu" else "cuda"] // (2 * length * 4))
    return min(signals, width), min(max(1, signals // width), batch), 2 * length


class _Blocks:
    """Slices of the channels and of the batch, and the way of a block to its spectrum and back."""

    def __init__(self, u_DBL: Tensor) -> None:
        width, batch, *positions = u_DBL.shape
        self.length = math.prod(positions)
        shape = block_shape(width, batch, self.length, u_DBL.device.type)
        self.channels, self.images = _slices(width, shape[0]), _slices(batch, shape[1])
        self.padded = u_DBL.new_zeros(shape, dtype=torch.float32)  # its second half stays zero
        self.positions = positions

    def spectrum(self, u_dbL: Tensor) -> Tensor:
        """[d, b, L] of any dtype → [d, b, f], of the signal and as many zeros."""
        padded = self.padded[: u_dbL.shape[0], : u_dbL.shape[1]]
        padded[..., : self.length].unflatten(-1, self.positions).copy_(u_dbL)
        return torch.fft.rfft(padded)

    def signal(self, spectrum_dbf: Tensor, out: Tensor) -> None:
        """Write a spectrum's signal, without its second half, into ``out`` [d, b, L]."""
        whole = torch.fft.irfft(spectrum_dbf, n=2 * self.length)
        out.copy_(whole[..., : self.length].unflatten(-1, self.positions))


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
