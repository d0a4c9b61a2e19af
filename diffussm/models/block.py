"""The gated hourglass block: dense layers at length J = L/M, the state space layer at the full length L."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm.models.s4d import BiSSM


def modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """adaLN: x · (1 + scale) + shift, with one shift and scale for all positions of an image."""
    return torch.addcmul(shift_BD.unsqueeze(1), x_BLD, 1 + scale_BD.unsqueeze(1))


def gelu(x: Tensor) -> Tensor:
    """GELU, in the place of its argument where no gradient is recorded."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


class IntoChannels(nn.Linear):
    """Linear from positions to channels first, [T, in] → [out, T]: the product emits the layout that the SSM reads."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.addmm(self.bias.unsqueeze(1), self.weight, x_TD.t())


class MixAndDown(nn.Module):
    """The D→D mix of BiSSM and after it W_down, from channels first to positions.

    Nothing stands between the two, so from 2D positions on, M matrices W_down[k]·mix, multiplied anew in each forward
    pass, cost less than the mix of every position: 2 D³ against L D², which is 12 % of a block's products. Positions
    count over the batch, so that an image alone and in a large batch comes out a rounding apart; but for a frozen
    model, which multiplies them once.

    Args:
        width: D.
        hourglass: M; each W_down[k] is D → 2D/M.
    """

    def __init__(self, width: int, hourglass: int) -> None:
        super().__init__()
        self.mix_weight = nn.Parameter(torch.empty(width, width))
        self.mix_bias = nn.Parameter(torch.zeros(width))
        self.down_weight = nn.Parameter(torch.empty(hourglass, 2 * width // hourglass, width))
        self.down_bias = nn.Parameter(torch.zeros(hourglass, 2 * width // hourglass))
        for weight in (self.mix_weight, *self.down_weight):
            nn.init.xavier_uniform_(weight)

    def product(self) -> tuple[Tensor, Tensor]:
        """Weights [M, 2D/M, D] and biases [M, 2D/M] that do both."""
        return self.down_weight @ self.mix_weight, self.down_weight @ self.mix_bias + self.down_bias

    @torch.no_grad()
    def freeze(self) -> None:
        """Let the product take the place of its factors, for good."""
        if self.mix_weight is not None:
            self.down_weight, self.down_bias = map(nn.Parameter, self.product())
            self.mix_weight = self.mix_bias = None

    def forward(self, y_MDT: Tensor) -> Tensor:
        """[M, D, T] → [T, 2D]: for each k its 2D/M columns."""
        hourglass, width, positions = y_MDT.shape
        pieces, weights, biases = [y.t() for y in y_MDT], self.down_weight, self.down_bias
        if self.mix_weight is not None and hourglass * positions > 2 * width:
            weights, biases = self.product()
        elif self.mix_weight is not None:
            pieces = [F.linear(y, self.mix_weight, self.mix_bias) for y in pieces]
        return torch.cat([F.linear(y, weights[k], biases[k]) for k, y in enumerate(pieces)], dim=-1)


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
        self.w_up = IntoChannels(width, hourglass * width)  # the M matrices W_up[k], one under the other
        self.ssm = BiSSM(width, state)
        self.mix_and_down = MixAndDown(width, hourglass)
        self.w1 = nn.Linear(width, 2 * width)
        self.w2 = nn.Linear(2 * width, 2 * width)
        self.w3 = nn.Linear(2 * width, width)

    def forward(self, x_BJD: Tensor, condition_BD: Tensor) -> Tensor:
        """One residual step at length J = L/M.

        ``condition_BD`` is the embedding of timestep and class; rows beyond the batch are padding.
        """
        # Measured on a CPU and slower: even and odd positions by spectra of their own in place of the interleaving
        # (1-20 % of the convolution), W0 and W1 as one product with one GELU (3-9 % of the block's training step), the
        # gated product keeping only what goes into its GELUs (0-7 %).
        batch, short, width = x_BJD.shape
        shift_BD, scale_BD, gate_BD = self.modulation(F.silu(condition_BD))[:batch].chunk(3, dim=-1)
        i_BJD = modulate(self.norm(x_BJD), shift_BD, scale_BD)
        h_TD = gelu(self.w0(i_BJD)).flatten(0, 1)
        u_MDBJ = gelu(self.w_up(h_TD)).view(self.hourglass, width, batch, short)
        # Position jM + k is piece k of position j: the SSM reads and writes this interleaving while it pads.
        y_DBJM = self.ssm(u_MDBJ.permute(1, 2, 3, 0), layout="DBL")
        down_BJ2D = gelu(self.mix_and_down(y_DBJM.permute(3, 0, 1, 2).flatten(2))).view(batch, short, 2 * width)
        o_BJD = self.w3(gelu(self.w2(down_BJ2D)) * gelu(self.w1(i_BJD)))
        return torch.addcmul(x_BJD, gate_BD.unsqueeze(1), o_BJD)
