"""The two-sided convolution as batched matmuls: a Toeplitz product inside chunks, states carried between them.

Shapes: B batch · L length, cut into a chunks of c positions · D channels, d of a block · 2 directions · N pairs of
states. The state space form of a kernel Re Σ_n W_n λ_n^l (arXiv 2405.21060, section 6, for constant coefficients): what
chunks pass on to each other is one number a state. All of it is matmuls over [c, c], [c, N] and [a, a] tables, which is
what a GPU is best at; no transform, one read and one write of the signal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffussm.ops.kernel import Modes, powers, two_sided_kernel

BLOCK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}  # of a block of channels: its tables and states


def convolve(u_DBL: Tensor, modes: Modes) -> Tensor:
    """The same function as :func:`diffussm.ops.fft.convolve`."""
    y_DBL = torch.empty_like(u_DBL)
    for channels in _channel_blocks(u_DBL, modes):
        y_DBL[channels] = _convolve(u_DBL[channels], modes.of(channels))
    return y_DBL


def convolve_backward(u_DBL: Tensor, modes: Modes, grad_DBL: Tensor) -> tuple[Tensor, Modes]:
    """The gradients of u and of the modes: the forward of a block of channels again, and its derivative."""
    grads = [torch.empty_like(tensor) for tensor in (u_DBL, *modes)]
    for channels in _channel_blocks(u_DBL, modes):
        with torch.enable_grad():
            inputs = [tensor[channels].detach().requires_grad_() for tensor in (u_DBL, *modes)]
            y_dBL = _convolve(inputs[0], Modes(*inputs[1:]))
        for whole, part in zip(grads, torch.autograd.grad(y_dBL, inputs, grad_DBL[channels]), strict=True):
            whole[channels] = part
    return grads[0], Modes(*grads[1:])


def _convolve(u_dBL: Tensor, modes: Modes) -> Tensor:
    """A block of channels, by operations that autograd knows."""
    width, batch, *positions = u_dBL.shape
    length = math.prod(positions)
    chunk = chunk_length(length, modes.W.shape[-1])
    chunks = -(-length // chunk)
    x = torch.nn.functional.pad(u_dBL.reshape(width, batch, length).float(), (0, chunks * chunk - length))
    x_dTc = x.view(width, batch * chunks, chunk)

    # Inside a chunk: y_i = Σ_j k2[i - j] x_j
    lag = torch.arange(chunk, device=x.device)
    toeplitz_dcc = two_sided_kernel(modes, chunk)[:, (lag.unsqueeze(1) - lag) % (2 * chunk)]

    # What a chunk leaves: Σ_j λ^(c-1-j) x_j to the right (causal), Σ_j λ^j x_j to the left
    table_d2cN = powers(modes.log_lambda, chunk).movedim(0, 2)
    leave_d2cN = torch.stack([table_d2cN[:, 0].flip(1), table_d2cN[:, 1]], dim=1)
    left_d2BaN = torch.view_as_complex(
        (x_dTc.unsqueeze(1) @ torch.view_as_real(leave_d2cN).flatten(-2)).unflatten(-1, (-1, 2))
    ).unflatten(2, (batch, chunks))

    # What a chunk meets: everything left before it, decayed by λ^c for each chunk in between
    across_d2aN = powers(chunk * modes.log_lambda, chunks).movedim(0, 2)
    gap = torch.arange(chunks, device=x.device)
    gap = gap.unsqueeze(1) - gap - 1  # [a, a']: chunks between a' and a; negative: none of a' reaches a
    carry_d2aaN = across_d2aN[:, :, gap.clamp(min=0)] * (gap >= 0).unsqueeze(-1)
    carry_d2Naa = torch.stack([carry_d2aaN[:, 0], carry_d2aaN[:, 1].transpose(1, 2)], dim=1).movedim(-1, 2)
    met_d2NaB = carry_d2Naa @ left_d2BaN.permute(0, 1, 4, 3, 2)

    # and what that adds to it: Re W λ^(i+1) X from the left, Re W λ^(c-i) X from the right
    weighted_d2cN = table_d2cN * (modes.W * modes.log_lambda.exp()).to(torch.complex64).unsqueeze(-2)
    enter_d2cN = torch.stack([weighted_d2cN[:, 0], weighted_d2cN[:, 1].flip(1)], dim=1)
    enter = torch.view_as_real(enter_d2cN.conj().resolve_conj()).permute(0, 1, 3, 4, 2).reshape(width, -1, chunk)
    met = torch.view_as_real(met_d2NaB.contiguous()).permute(0, 4, 3, 1, 2, 5).reshape(width, batch * chunks, -1)
    y_dTc = x_dTc @ toeplitz_dcc.transpose(1, 2) + met @ enter
    return y_dTc.view(width, batch, -1)[..., :length].unflatten(-1, positions).to(u_dBL.dtype)


def chunk_length(length: int, pairs: int) -> int:
    """c, a power of two, for the fewest operations: L c inside chunks, 8 N L² / c² between them, so c³ = 16 N L."""
    return min(1 << max(4, round(math.log2(16 * pairs * length) / 3)), 1 << math.ceil(math.log2(length)))


def _channel_blocks(u_DBL: Tensor, modes: Modes) -> Iterator[slice]:
    width, batch, *positions = u_DBL.shape
    length, pairs = math.prod(positions), modes.W.shape[-1]
    chunk = chunk_length(length, pairs)
    chunks = -(-length // chunk)
    floats = chunk * chunk + 4 * pairs * (chunk + chunks * chunks + batch * chunks) + 2 * batch * length
    step = max(1, BLOCK_BYTES["cpu" if u_DBL.is_cpu else "cuda"] // (4 * floats))
    return (slice(start, min(start + step, width)) for start in range(0, width, step))
