"""S4D as a two-sided convolution: kernel generation and the FFT convolution, in fp32 whatever surrounds them.

Shapes: B batch · L length · D channels · N conjugate pairs of states (half the state size) · 2 directions (causal,
anti-causal). S4D: Gu et al., arXiv 2206.11893. The recurrence is sensitive and FFTs have no bf16: callers disable
autocast around these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TEMPORARY_BYTES = (
    1 << 20
)  # of a block of channels; temporaries that stay in the cache make the convolution 1.3-4x faster


def two_sided_kernel(
    log_dt_2D: Tensor, log_A_real_2DN: Tensor, A_imag_2DN: Tensor, C_2DN2: Tensor, skip_D: Tensor, length: int
) -> Tensor:
    """The kernel of both directions and the skip, laid out for ONE circular convolution of length 2L.

    With zero-order hold, Ā = exp(ΔA), B̄ = (exp(ΔA) - 1) / A and K_l = 2 Re Σ_n C_n B̄_n Ā_n^l for each direction
    (arXiv 2206.11893, eq. 4 and 5), the result k2 of shape [D, 2L] holds
    k2[l] = K_causal[l], k2[2L - l] = K_anticausal[l] for l ≥ 1, and k2[0] = K_causal[0] + K_anticausal[0] + skip.

    Args:
        log_dt_2D: log Δ.
        log_A_real_2DN: A = -exp(log_A_real) + i A_imag.
        A_imag_2DN: imaginary part of A.
        C_2DN2: C as (real, imaginary) pairs; B is 1.
        skip_D: the coefficient of the input itself.
        length: L ≥ 1, of any factorisation.
    """
    dt = log_dt_2D.exp().unsqueeze(-1)
    A_real = -log_A_real_2DN.exp()
    decay = dt * A_real  # ΔA: real part, and the imaginary in float64, which is multiplied by up to L below
    angle = log_dt_2D.double().exp().unsqueeze(-1) * A_imag_2DN.double()

    # Ā^l for l = a·stride + b is Ā^(a·stride) · Ā^b: two tables of √L powers instead of one of L, joined by a matmul
    # over the states.
    stride = 1 << math.ceil(math.log2(length) / 2)
    rows = -(-length // stride)
    low_real, low_imag = _powers(decay, angle, torch.arange(stride, device=dt.device))  # [2, D, N, stride]
    high_real, high_imag = _powers(decay, angle, stride * torch.arange(rows, device=dt.device))  # [2, D, N, rows]

    B_real, B_imag = _zero_order_hold(decay, angle.to(decay.dtype), A_real, A_imag_2DN)
    C_real, C_imag = C_2DN2.unbind(-1)
    CB_real = (2 * (C_real * B_real - C_imag * B_imag)).unsqueeze(-1)
    CB_imag = (2 * (C_real * B_imag + C_imag * B_real)).unsqueeze(-1)
    left = torch.cat(  # Re(x y) = Re x Re y - Im x Im y
        [CB_real * high_real - CB_imag * high_imag, -(CB_real * high_imag + CB_imag * high_real)], dim=2
    )
    right = torch.cat([low_real, low_imag], dim=2)
    K_2DL = (left.transpose(2, 3) @ right).flatten(2)[..., :length]

    causal, anticausal = K_2DL
    zero_lag = (causal[:, 0] + anticausal[:, 0] + skip_D).unsqueeze(-1)
    unused = zero_lag.new_zeros(zero_lag.shape)  # lag ±L, which no pair of positions has
    return torch.cat([zero_lag, causal[:, 1:], unused, anticausal[:, 1:].flip(-1)], dim=-1)


def _powers(decay: Tensor, angle: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of exp((decay + i·angle)·k) for each exponent k, on a new last axis."""
    turns = angle.unsqueeze(-1) * (exponents.double() / (2 * math.pi))  # an fp32 angle of 1e4 has lost 3 digits already
    phase = ((turns - turns.detach().round()) * (2 * math.pi)).to(decay.dtype)
    modulus = (decay.unsqueeze(-1) * exponents).exp()
    return modulus * phase.cos(), modulus * phase.sin()


def _zero_order_hold(decay: Tensor, angle: Tensor, A_real: Tensor, A_imag: Tensor) -> tuple[Tensor, Tensor]:
    """B̄ = (exp(ΔA) - 1) / A, real and imaginary part, without the cancellation of exp(small) - 1."""
    # exp(x + iy) - 1 = expm1(x) cos y - 2 sin²(y/2) + i exp(x) sin y
    numerator_real = decay.expm1() * angle.cos() - 2 * (angle / 2).sin().square()
    numerator_imag = decay.exp() * angle.sin()
    norm = A_real.square() + A_imag.square()
    return (
        (numerator_real * A_real + numerator_imag * A_imag) / norm,
        (numerator_imag * A_real - numerator_real * A_imag) / norm,
    )


def two_sided_convolution(u_BLD: Tensor, kernel_D2L: Tensor) -> Tensor:
    """y_l = Σ_m k2[(l - m) mod 2L] u_m for each channel: both directions and the skip in one FFT convolution.

    Args:
        u_BLD: input of any floating dtype; the result has the same.
        kernel_D2L: fp32, from :func:`two_sided_kernel`.
    """
    return _TwoSidedConvolution.apply(u_BLD, kernel_D2L)


class _TwoSidedConvolution(torch.autograd.Function):
    """Saves only its inputs; recomputes spectra by block; sums the kernel's gradient over the batch as a spectrum."""

    @staticmethod
    def forward(ctx, u_BLD: Tensor, kernel_D2L: Tensor) -> Tensor:
        ctx.save_for_backward(u_BLD, kernel_D2L)
        y_BLD = torch.empty_like(u_BLD)
        for channels in _channel_blocks(u_BLD):
            spectrum = _spectrum(u_BLD[..., channels])
            spectrum *= torch.fft.rfft(kernel_D2L[channels]).unsqueeze(1)
            y_BLD[..., channels] = _signal(spectrum, u_BLD.shape[1])
        return y_BLD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLD: Tensor) -> tuple[Tensor, Tensor]:
        u_BLD, kernel_D2L = ctx.saved_tensors
        length = u_BLD.shape[1]
        grad_u_BLD, grad_kernel_D2L = torch.empty_like(u_BLD), torch.empty_like(kernel_D2L)
        for channels in _channel_blocks(u_BLD):
            grad = _spectrum(grad_BLD[..., channels])
            correlation = _spectrum(u_BLD[..., channels]).conj_physical_()
            correlation *= grad
            grad_kernel_D2L[channels] = torch.fft.irfft(correlation.sum(1), n=2 * length)
            grad *= torch.fft.rfft(kernel_D2L[channels]).conj().unsqueeze(1)
            grad_u_BLD[..., channels] = _signal(grad, length)
        return grad_u_BLD, grad_kernel_D2L


def _channel_blocks(u_BLD: Tensor) -> Iterator[slice]:
    batch, length, width = u_BLD.shape
    block = max(8, TEMPORARY_BYTES // (batch * 2 * length * 4)) if u_BLD.device.type == "cpu" else width
    return (slice(start, min(start + block, width)) for start in range(0, width, block))


def _spectrum(u_BLd: Tensor) -> Tensor:
    """[B, L, d] → [d, B, L + 1]: channels first is the layout that the FFT wants."""
    return torch.fft.rfft(u_BLd.permute(2, 0, 1).float(), n=2 * u_BLd.shape[1])


def _signal(spectrum_dBf: Tensor, length: int) -> Tensor:
    """[d, B, L + 1] → [B, L, d], cut to the length of the signal."""
    return torch.fft.irfft(spectrum_dBf, n=2 * length)[..., :length].permute(1, 2, 0)
