"""The gated hourglass block: dense layers at length J = L/M, the state space layer at the full length L."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm.models.s4d import BiSSM


def modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """adaLN: x · (1 + scale) + shift, with one shift and scale for all positions of an image."""
    return torch.addcmul(shift_BD.unsqueeze(1), x_BLD, 1 + scale_BD.unsqueeze(1))


class HourglassBlock(nn.Module):
    """The DiffuSSM block (arXiv 2311.18257, section 3.2) with adaLN-zero; 13 D² weights in W0..W3 at M = 2.

    For input I in R^{J×D}, position l = jM + k of the full sequence and s = GELU:

        U_l  = s( W_up[k] s( W0 I_j ) )
        Y    = BiSSM(U)
        I'_j = concat_k s( W_down[k] Y_{jM+k} )
        O_j  = W3 ( s( W2 I'_j ) * s( W1 I_j ) )

    Args:
        width: D.
        hourglass: M, by which the dense part is shorter than the sequence; divides 2D.
        state: N, of the state space layer.
    """

    def __init__(self, width: int, hourglass: int = 2, state: int = 64) -> None:
        super().__init__()
        self.hourglass = hourglass
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 3 * width)
        self.w0 = nn.Linear(width, width)
        self.w_up = nn.Linear(width, hourglass * width)  # the M matrices W_up[k], one under the other
        self.ssm = BiSSM(width, state)
        self.w_down = nn.ModuleList(nn.Linear(width, 2 * width // hourglass) for _ in range(hourglass))
        self.w1 = nn.Linear(width, 2 * width)
        self.w2 = nn.Linear(2 * width, 2 * width)
        self.w3 = nn.Linear(2 * width, width)

    def forward(self, x_BJD: Tensor, condition_BD: Tensor) -> Tensor:
        """One residual step at length J = L/M; ``condition_BD`` is the embedding of timestep and class."""
        batch, short, width = x_BJD.shape
        shift_BD, scale_BD, gate_BD = self.modulation(F.silu(condition_BD)).chunk(3, dim=-1)
        i_BJD = modulate(self.norm(x_BJD), shift_BD, scale_BD)
        # [B, J, M·D] is [B, L, D] in memory: position jM + k is piece k of position j
        u_BLD = F.gelu(self.w_up(F.gelu(self.w0(i_BJD)))).view(batch, short * self.hourglass, width)
        y_BJMD = self.ssm(u_BLD).view(batch, short, self.hourglass, width)
        down_BJ2D = F.gelu(torch.cat([w(y_BJMD[:, :, k]) for k, w in enumerate(self.w_down)], dim=-1))
        o_BJD = self.w3(F.gelu(self.w2(down_BJ2D)) * F.gelu(self.w1(i_BJD)))
        return torch.addcmul(x_BJD, gate_BD.unsqueeze(1), o_BJD)
