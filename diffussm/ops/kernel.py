"""S4D's kernel from its parameters, by √L-sized tables of powers and one real batched matmul.

Shapes: D channels · 2 directions (causal, anti-causal) · N conjugate pairs of states · L length · a, b rows and columns
of the tables. A kernel is a sum of modes, K_l = Re Σ_n W_n λ_n^l with λ = exp(ΔA) and W = 2 C B̄. The modes, [D, 2, N],
are made in double precision: they are few, and an fp32 phase times 4096 has lost four digits. All that is as long as L
is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
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


def in_fp32(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that no autocast reaches, even where the caller's own is still open."""

    def without_autocast(ctx: Any, grad: Tensor) -> Any:
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return without_autocast


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
    stride, rows = _split(length)
    low_bd2N = powers(modes.log_lambda, stride)
    high_ad2N = powers(stride * modes.log_lambda.conj(), rows) * modes.W.conj().to(torch.complex64)
    # Re(x y) is the dot product of x̄ and y as pairs of reals
    K_D2L = (_real(high_ad2N).permute(1, 2, 0, 3) @ _real(low_bd2N).permute(1, 2, 3, 0)).flatten(2)[..., :length]
    causal, anticausal = K_D2L.unbind(1)
    zero_lag = (causal[:, 0] + anticausal[:, 0] + modes.skip).unsqueeze(-1)
    return torch.cat([zero_lag, causal[:, 1:], torch.zeros_like(zero_lag), anticausal[:, 1:].flip(-1)], dim=-1)


def _split(length: int) -> tuple[int, int]:
    """(stride, rows) ≈ √L each: with l = stride·a + b, λ^l is λ^(stride·a) · λ^b, two small tables instead of one."""
    stride = 1 << math.ceil(math.log2(length) / 2)
    return stride, -(-length // stride)


def _real(table: Tensor) -> Tensor:
    """[..., N] complex → [..., 2N], real and imaginary parts in turn."""
    return torch.view_as_real(table.resolve_conj()).flatten(-2)
