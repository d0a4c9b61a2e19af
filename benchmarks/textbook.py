"""S4D as one writes it first: the baseline of `benchmarks.ssm`, our own writing of what state-spaces' S4D computes.

The kernel by one complex exponential for each channel, state and position (the Vandermonde matrix of arXiv 2206.11893,
section 3.3), and an FFT convolution for each direction, all under autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


def textbook_s4d(
    u_BDL: Tensor, log_dt_2D: Tensor, log_A_real_2DN: Tensor, A_imag_2DN: Tensor, C_2DN2: Tensor, skip_D: Tensor
) -> Tensor:
    """y = K_causal * u + reversed(K_anticausal * reversed u) + skip ∘ u, [B, D, L] in fp32.

    Args:
        u_BDL: the signal, of L positions.
        log_dt_2D: log Δ of the causal and the anti-causal direction, as all that follows but the last.
        log_A_real_2DN: A = -exp(log_A_real) + i A_imag, of N conjugate pairs of states.
        A_imag_2DN: imaginary part of A.
        C_2DN2: C as (real, imaginary) pairs; B is 1.
        skip_D: the coefficient of the input itself.
    """
    A_2DN = torch.complex(-log_A_real_2DN.exp(), A_imag_2DN)
    C_2DN = torch.view_as_complex(C_2DN2)
    forward_DL, backward_DL = (
        kernel(log_dt_2D[direction], A_2DN[direction], C_2DN[direction], u_BDL.shape[-1]) for direction in range(2)
    )
    y_BDL = causal_convolution(u_BDL, forward_DL) + causal_convolution(u_BDL.flip(-1), backward_DL).flip(-1)
    return y_BDL + skip_D.unsqueeze(-1) * u_BDL


def kernel(log_dt_D: Tensor, A_DN: Tensor, C_DN: Tensor, length: int) -> Tensor:
    """K_l = 2 Re Σ_n C_n B̄_n Ā_n^l with Ā = exp(ΔA), B̄ = (exp(ΔA) - 1) / A: [D, L]."""
    dtA_DN = log_dt_D.exp().unsqueeze(-1) * A_DN
    CB_DN = C_DN * (dtA_DN.exp() - 1) / A_DN
    vandermonde_DNL = torch.exp(dtA_DN.unsqueeze(-1) * torch.arange(length, device=A_DN.device))
    return 2 * torch.einsum("dn,dnl->dl", CB_DN, vandermonde_DNL).real


def causal_convolution(u_BDL: Tensor, kernel_DL: Tensor) -> Tensor:
    """y_l = Σ_{m ≤ l} K_{l-m} u_m, by FFTs of 2L points."""
    length = u_BDL.shape[-1]
    spectrum = torch.fft.rfft(u_BDL, n=2 * length) * torch.fft.rfft(kernel_DL, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length]
