"""The bidirectional state space layer: S4D's parameters, and the kernel's spectrum that evaluation keeps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffussm.ops.kernel import S4DParameters
from diffussm.ops.s4d import Backend, Layout, kernel_spectrum, s4d

DT_MIN, DT_MAX = 1e-3, 1e-1


class BiSSM(nn.Module):
    """A causal and an anti-causal S4D with their own parameters, summed, plus the skip D∘u.

    Initialised as S4D-Lin: A_n = -1/2 + iπn, Δ log-uniform in [1e-3, 1e-1], C complex normal (arXiv 2206.11893).
    The parameters carry ``is_ssm = True``: the optimizer gives them their own learning rate and no decay.

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
        self.C = nn.Parameter(torch.empty(2, width, pairs, 2))
        self.skip = nn.Parameter(torch.empty(width))
        for parameter in self.parameters():
            parameter.is_ssm = True
        self.backend: Backend = "auto"  # of training: evaluation convolves with the spectrum
        self.frozen = False
        self._kept: tuple[int, Tensor | None, Tensor] | None = None  # length, parameters, spectrum
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values."""
        self.log_dt.uniform_(math.log(DT_MIN), math.log(DT_MAX))
        self.log_A_real.fill_(math.log(0.5))
        self.A_imag.copy_(math.pi * torch.arange(self.A_imag.shape[-1]).expand_as(self.A_imag))
        self.C.normal_(std=math.sqrt(0.5))  # unit variance as a complex number
        self.skip.normal_()

    def s4d_parameters(self) -> S4DParameters:
        """As the ops take them."""
        return S4DParameters(self.log_dt, self.log_A_real, self.A_imag, self.C, self.skip)

    def freeze(self) -> None:
        """Let the parameters count as constants: what is kept of them goes unchecked."""
        self.frozen, self._kept = True, None

    def forward(self, u: Tensor, layout: Layout = "BLD") -> Tensor:
        """[B, L, D], or channels first [D, B, ...positions], to the same."""
        parameters = self.s4d_parameters()
        if self.training or torch.is_grad_enabled():
            self._kept = None
            return s4d(u, parameters, layout=layout, backend=self.backend)
        length = u.shape[1] if layout == "BLD" else math.prod(u.shape[2:])
        return s4d(u, parameters, layout=layout, spectrum=self._spectrum(parameters, length))

    def _spectrum(self, parameters: S4DParameters, length: int) -> Tensor:
        """The kernel's spectrum, generated anew only if the length or a value of the parameters is another.

        Values are compared, not version counters: a write through ``.data``, as an optimizer that holds flat buffers
        makes it, leaves those as they were. On a CPU that costs 0.1 % of a block at XL, 1 % of one of width 128; on a
        GPU it waits for the device once a block. A frozen layer's are not compared.
        """
        kept = self._kept
        values = None if self.frozen else torch.cat([parameter.detach().flatten() for parameter in parameters])
        if kept is None or kept[0] != length or not (self.frozen or _same(kept[1], values)):
            self._kept = kept = (length, values, kernel_spectrum(parameters, length))
        return kept[2]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
