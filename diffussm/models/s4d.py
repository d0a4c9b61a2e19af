"""The bidirectional state space layer (BiSSM): S4D's parameters and the mix of the channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffussm.ops.s4d import two_sided_convolution, two_sided_kernel

DT_MIN, DT_MAX = 1e-3, 1e-1


class BiSSM(nn.Module):
    """A causal and an anti-causal S4D with their own parameters, summed, plus the skip D∘u, then a pointwise D→D mix.

    Initialised as S4D-Lin: A_n = -1/2 + iπn, Δ log-uniform in [1e-3, 1e-1], C complex normal (arXiv 2206.11893).
    The state space parameters carry ``is_ssm = True``: the optimizer gives them their own learning rate and no decay.

    Args:
        width: D, channels.
        state: N, state size a channel and direction; N/2 conjugate pairs are kept.
    """

    def __init__(self, width: int, state: int = 64) -> None:
        super().__init__()
        pairs = state // 2
        self.log_dt = nn.Parameter(torch.empty(2, width))
        self.log_A_real = nn.Parameter(torch.empty(2, width, pairs))
        self.A_imag = nn.Parameter(torch.empty(2, width, pairs))
        self.C = nn.Parameter(
            torch.empty(2, width, pairs, 2)
        )  # (real, imaginary): complex parameters cannot be cast or sharded
        self.skip = nn.Parameter(torch.empty(width))
        for parameter in self.parameters():
            parameter.is_ssm = True
        self.mix = nn.Linear(width, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values."""
        self.log_dt.uniform_(math.log(DT_MIN), math.log(DT_MAX))
        self.log_A_real.fill_(math.log(0.5))
        self.A_imag.copy_(math.pi * torch.arange(self.A_imag.shape[-1]).expand_as(self.A_imag))
        self.C.normal_(std=math.sqrt(0.5))  # unit variance as a complex number
        self.skip.normal_()

    def forward(self, u_BLD: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        with torch.autocast(u_BLD.device.type, enabled=False):
            kernel_D2L = two_sided_kernel(
                self.log_dt, self.log_A_real, self.A_imag, self.C, self.skip, length=u_BLD.shape[1]
            )
            y_BLD = two_sided_convolution(u_BLD, kernel_D2L)
        return self.mix(y_BLD)
