"""S4D's kernel from its parameters, by √L-sized tables of powers and one real batched matmul.

Shapes: D channels · 2 directions (causal, anti-causal) · N conjugate pairs of states · L length · a, b rows and columns
of the tables. A kernel is a sum of modes, K_l = Re Σ_n W_n λ_n^l with λ = exp(ΔA) and W = 2 C B̄. The modes, [D, 2, N],
are made in double precision: they are few, and an fp32 phase times 4096 has lost four digits. All that is as long as L
is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class S4DParameters(NamedTuple):
    """The parameters of both directions: A = -exp(log_A_real) + i A_imag, B = 1, and C as (real, imaginary) pairs."""

    log_dt: Tensor  # [2, D]
    log_A_real: Tensor  # [2, D, N]
    A_imag: Tensor  # [2, D, N]
    C: Tensor  # [2, D, N, 2]
    skip: Tensor  # [D]: the coefficient of the input itself


class Modes(NamedTuple):
    """What a kernel is made from: K_l = Re Σ_n W_n λ_n^l a direction, and the skip at lag 0."""

    log_lambda: Tensor  # [D, 2, N] complex128
    W: Tensor  # [D, 2, N] complex128
    skip: Tensor  # [D] fp32

    def of(self, channels: slice) -> Modes:
        """Those of some channels."""
        return Modes(*(mode[channels] for mode in self))


@contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """No autocast, and no matrix product in fewer bits than fp32 has, whatever the caller has allowed (TF32)."""
    matmul = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    allowed = matmul.fp32_precision
    with torch.autocast(device.type, enabled=False):
        if allowed in ("none", "ieee"):
            yield
            return
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = allowed


def discretize(parameters: S4DParameters) -> Modes:
    """Zero-order hold: λ = exp(ΔA), B̄ = (λ - 1) / A (arXiv 2206.11893, eq. 4 and 5). Differentiable."""
    log_dt, log_A_real, A_imag, C = (p.transpose(0, 1).contiguous().double() for p in parameters[:4])
    A_D2N = torch.complex(-log_A_real.exp(), A_imag)
    log_lambda_D2N = log_dt.exp().unsqueeze(-1) * A_D2N
    W_D2N = 2 * torch.complex(*C.unbind(-1)) * torch.expm1(log_lambda_D2N) / A_D2N
    return Modes(log_lambda_D2N, W_D2N, parameters.skip.float())


def powers(log_base: Tensor, count: int) -> Tensor:
    """base^0 .. base^(count - 1) on a new first axis, complex64, from the base's complex128 log. Differentiable."""
    return _Powers.apply(log_base, count)


class _Powers(torch.autograd.Function):
    """By doubling: one product an element, nothing transcendental; the base is squared in double precision.

    The powers are the first axis so that the products run along all the others: a quarter less time than beside N.
    """

    @staticmethod
    def forward(ctx, log_base: Tensor, count: int) -> Tensor:
        table = log_base.new_empty(count, *log_base.shape, dtype=torch.complex64)
        table[0] = 1
        base, filled = log_base.exp(), 1
        while filled < count:
            more = min(filled, count - filled)
            torch.mul(table[:more], base.to(table.dtype), out=table[filled : filled + more])
            base, filled = base * base, filled + more
        ctx.save_for_backward(table)
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors  # d base^k / d log base = k base^k
        exponents = torch.arange(table.shape[0], device=grad.device, dtype=torch.float32)
        product = torch.mul(table.conj(), grad, out=torch.empty_like(table))  # in the table's layout
        weighted = exponents @ _real(product).flatten(1)
        return torch.view_as_complex(weighted.view(*table.shape[1:], 2)).to(torch.complex128), None


def two_sided_kernel(modes: Modes, length: int) -> Tensor:
    """The kernel of both directions and the skip, laid out for ONE circular convolution of length 2L.

    Args:
        modes: of d channels.
        length: L ≥ 1, of any factorisation.

    Returns:
        k2 [d, 2L] fp32: k2[l] = K_causal[l] and k2[2L - l] = K_anticausal[l] for l ≥ 1,
        k2[0] = K_causal[0] + K_anticausal[0] + skip, and k2[L] = 0, a lag that no pair of positions has.
    """
    K_d2L = _SumOfModes.apply(modes.log_lambda, modes.W, length)
    causal, anticausal = K_d2L.unbind(1)
    zero_lag = (causal[:, 0] + anticausal[:, 0] + modes.skip).unsqueeze(-1)
    return torch.cat([zero_lag, causal[:, 1:], torch.zeros_like(zero_lag), anticausal[:, 1:].flip(-1)], dim=-1)


class _SumOfModes(torch.autograd.Function):
    """K_l = Re Σ_n W_n λ_n^l for l < L, [d, 2, N] twice → [d, 2, L], as a product of two tables: l = stride·a + b.

    Autograd would leave the tables' gradients in layouts that their products then copy: a third of its time.
    """

    @staticmethod
    def forward(ctx, log_lambda_d2N: Tensor, W_d2N: Tensor, length: int) -> Tensor:
        stride, rows = split_length(length)
        low_bd2N, high_ad2N = powers(log_lambda_d2N, stride), powers(stride * log_lambda_d2N.conj(), rows)
        ctx.save_for_backward(low_bd2N, high_ad2N, W_d2N)
        # Re(x y) is the dot product of x̄ and y as pairs of reals
        left, right = _real(high_ad2N * W_d2N.conj().to(high_ad2N.dtype)), _real(low_bd2N)
        return (left.permute(1, 2, 0, 3) @ right.permute(1, 2, 3, 0)).flatten(2)[..., :length]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_d2L: Tensor) -> tuple[Tensor, Tensor, None]:
        """With g = dL/dK: dL/dW = Σ_l g_l λ̄^l, and dL/d(log λ) = W̄ Σ_l l g_l λ̄^l."""
        low_bd2N, high_ad2N, W_d2N = ctx.saved_tensors
        rows, stride = len(high_ad2N), len(low_bd2N)
        g_d2ab = F.pad(grad_d2L, (0, rows * stride - grad_d2L.shape[-1])).unflatten(-1, (rows, stride))
        low_bd2N = low_bd2N.conj().resolve_conj()  # as the other is
        by_row_ad2N = _times(high_ad2N, g_d2ab @ _real(low_bd2N).permute(1, 2, 0, 3))  # Σ_b g_l λ̄^l for each a
        by_column_bd2N = _times(low_bd2N, g_d2ab.mT @ _real(high_ad2N).permute(1, 2, 0, 3))  # Σ_a g_l λ̄^l for each b
        a, b = (torch.arange(n, device=grad_d2L.device, dtype=grad_d2L.dtype) for n in (rows, stride))
        total, by_stride = torch.stack([torch.ones_like(a), stride * a]) @ _real(by_row_ad2N).flatten(1)
        total, moment = (
            torch.view_as_complex(sums.view(*W_d2N.shape, 2)).to(W_d2N.dtype)
            for sums in (total, by_stride + b @ _real(by_column_bd2N).flatten(1))
        )
        return W_d2N.conj() * moment, total, None


def _times(table_kd2N: Tensor, sums_d2k2N: Tensor) -> Tensor:
    """Their product as complex numbers, in the table's layout."""
    sums_kd2N = torch.view_as_complex(sums_d2k2N.unflatten(-1, (-1, 2))).permute(2, 0, 1, 3)
    return torch.mul(table_kd2N, sums_kd2N, out=torch.empty_like(table_kd2N))


def split_length(length: int) -> tuple[int, int]:
    """(stride, rows) ≈ √L each: with l = stride·a + b, λ^l is λ^(stride·a) · λ^b, two small tables instead of one."""
    stride = 1 << math.ceil(math.log2(length) / 2)
    return stride, -(-length // stride)


def _real(table: Tensor) -> Tensor:
    """[..., N] complex → [..., 2N], real and imaginary parts in turn."""
    return torch.view_as_real(table.resolve_conj()).flatten(-2)
