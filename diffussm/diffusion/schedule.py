"""The forward process: how much noise each step holds, and the Gaussian that undoes one step when x0 is known.

Steps count from 0, where the papers count from 1: x_t holds t + 1 rounds of noise, and what comes before step 0 is the
data, always written x0 (so ᾱ_{-1} = 1). DDPM is arXiv 2006.11239, iDDPM arXiv 2102.09672.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffussm.errors import UserError


class Schedule:
    """A discrete noise schedule of T steps; everything follows from ᾱ.

    The tables are float64 [T] on the CPU. Methods take ``t`` int64 [B] in 0..T-1 on the device of the samples [B, ...],
    and use the tables' entries in float32.

    Attributes:
        steps: T.
        timesteps: int64 [T], the step of the schedule that the model was trained on which each step stands for.
        betas: β_t, the variance of q(x_t | x_{t-1}).
        alphas_cumprod: ᾱ_t, the share of the data's variance left in x_t.
        alphas_cumprod_prev: ᾱ_{t-1}.
        posterior_variance: β̃_t, the variance of q(x_{t-1} | x_t, x0); 0 at t = 0.
    """

    def __init__(self, alphas_cumprod: Tensor, timesteps: Tensor) -> None:
        previous = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
        alphas = alphas_cumprod / previous
        betas = 1 - alphas  # iDDPM (19)
        variance = betas * (1 - previous) / (1 - alphas_cumprod)  # DDPM (7), iDDPM (10)
        # β̃_0 is 0, whose log a model cannot predict: iDDPM puts β̃_1 there. A single step has no β̃_1 and takes β.
        clipped = torch.cat([variance[1:2] if len(betas) > 1 else betas, variance[1:]])

        self.steps = len(betas)
        self.timesteps = timesteps
        self.betas = betas
        self.alphas_cumprod = alphas_cumprod
        self.alphas_cumprod_prev = previous
        self.posterior_variance = variance
        self._tables = {
            "signal": alphas_cumprod.sqrt(),
            "noise": (1 - alphas_cumprod).sqrt(),
            "1/signal": alphas_cumprod.rsqrt(),
            "noise/signal": (1 / alphas_cumprod - 1).sqrt(),
            "posterior x0": betas * previous.sqrt() / (1 - alphas_cumprod),
            "posterior x_t": (1 - previous) * alphas.sqrt() / (1 - alphas_cumprod),
            "posterior variance": variance,
            "log posterior variance": clipped.log(),
            "log beta": betas.log(),
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Schedule:
        """β linear from ``beta_start`` to ``beta_end`` (DDPM, section 4). UserError on what gives no noise schedule."""
        if steps < 1 or not 0 < beta_start <= beta_end < 1:
            raise UserError(
                f"a schedule of {steps} steps with beta from {beta_start} to {beta_end} is not one: "
                "give at least 1 step and 0 < beta_start <= beta_end < 1"
            )
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        return cls((1 - betas).cumprod(0), torch.arange(steps))

    def respace(self, n: int) -> Schedule:
        """The schedule of ``n`` evenly spaced steps of this one, from the first to the last: iDDPM, section 4.

        The same steps as ADM's ``space_timesteps`` takes for one section (of ``n`` = 1: only the first).
        UserError if ``n`` is not in 1..T.
        """
        if not 1 <= n <= self.steps:
            raise UserError(f"cannot take {n} sampling steps of a schedule of {self.steps}: ask for 1..{self.steps}")
        stride = (self.steps - 1) / max(n - 1, 1)
        kept, position = [], 0.0
        for _ in range(n):
            kept.append(round(position))
            position += stride  # summed as ADM does: the product i·stride rounds other ways at ties
        return Schedule(self.alphas_cumprod[kept], self.timesteps[kept])

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t [B, ...] from data and standard normal ``noise`` of its shape: DDPM (4)."""
        return self._at("signal", t, x0) * x0 + self._at("noise", t, x0) * noise

    def predict_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The data [B, ...] that noise ``eps`` would have turned into ``x_t``: DDPM (15)."""
        return self._at("1/signal", t, x_t) * x_t - self._at("noise/signal", t, x_t) * eps

    def predict_eps(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise [B, ...] that would have turned data ``x0`` into ``x_t``: DDPM (4) solved for ε."""
        return (self._at("1/signal", t, x_t) * x_t - x0) / self._at("noise/signal", t, x_t)

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_{t-1} | x_t, x0): DDPM (6) and (7).

        Returns its mean [B, ...], its variance [B, 1, ...] (0 at t = 0), and the log of that variance with the entry of
        t = 1 in place of the -inf of t = 0.
        """
        mean = self._at("posterior x0", t, x_t) * x0 + self._at("posterior x_t", t, x_t) * x_t
        return mean, self._at("posterior variance", t, x_t), self._at("log posterior variance", t, x_t)

    def log_variance_from(self, v: Tensor, t: Tensor) -> Tensor:
        """log Σ_θ [B, ...] from the model's ``v``: log β̃_t at -1, log β_t at 1, linear throughout: iDDPM (15)."""
        fraction = (v + 1) / 2
        return fraction * self._at("log beta", t, v) + (1 - fraction) * self._at("log posterior variance", t, v)

    def _at(self, table: str, t: Tensor, samples: Tensor) -> Tensor:
        """Entries ``t`` of a table, shaped [B, 1, ...] to broadcast over ``samples``."""
        if t.device not in self._on_device:
            self._on_device[t.device] = {name: values.float().to(t.device) for name, values in self._tables.items()}
        return self._on_device[t.device][table][t].view(-1, *[1] * (samples.ndim - 1))
