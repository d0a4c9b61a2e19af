"""The truth for S4D: the recurrence, step by step, in complex128."""

from __future__ import annotations

import torch
from torch import Tensor


def random_parameters(width: int, pairs: int, seed: int = 0) -> list[Tensor]:
    """[log_dt, log_A_real, A_imag, C, skip] as BiSSM initialises them, each direction with its own noise on A."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    log_dt = torch.log(torch.tensor(1e-3)) + uniform(2, width) * torch.log(torch.tensor(100.0))
    log_A_real = torch.log(0.5 + uniform(2, width, pairs))
    A_imag = torch.pi * torch.arange(pairs) + normal(2, width, pairs)
    return [log_dt, log_A_real, A_imag, normal(2, width, pairs, 2), normal(width)]


def recurrence(u_BLD: Tensor, parameters: list[Tensor]) -> Tensor:
    """x_l = Ā x_{l-1} + B̄ u_l, y_l = 2 Re C x_l; from both ends, summed, plus the skip. Float64 [B, L, D]."""
    log_dt, log_A_real, A_imag, C, skip = (p.double() for p in parameters)
    u = u_BLD.double()
    A = torch.complex(-log_A_real.exp(), A_imag)
    dt_A = log_dt.exp().unsqueeze(-1) * A
    A_bar = torch.exp(dt_A)
    B_bar = torch.expm1(dt_A) / A
    C = torch.complex(C[..., 0], C[..., 1])
    out = [u[:, position] * skip for position in range(u.shape[1])]
    for direction, order in enumerate((range(u.shape[1]), reversed(range(u.shape[1])))):
        x = torch.zeros(u.shape[0], *A.shape[1:], dtype=torch.complex128)
        for position in order:
            x = A_bar[direction] * x + B_bar[direction] * u[:, position, :, None]
            out[position] = out[position] + 2 * (C[direction] * x).sum(-1).real
    return torch.stack(out, dim=1)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Relative L2 distance."""
    return ((value.double() - truth).norm() / truth.norm()).item()
