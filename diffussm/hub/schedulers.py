"""Schedulers of diffusers on the steps that :mod:`diffussm.diffusion` takes: their samples are its samplers' own.

Those of diffusers round timesteps another way where T - 1 does not divide evenly, keep ᾱ in fp32, of which 1 - ᾱ/ᾱ' has
few digits, and DPM-Solver++ leaves out t = 0. Any other scheduler takes these configurations by ``from_config``.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin

from diffussm.diffusion.schedule import Schedule


class RespacedDDPMScheduler(DDPMScheduler):
    """The sampler ``ancestral``."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As diffusers', evenly spaced as :meth:`Schedule.respace` does, unless ``timesteps`` are given."""
        self.alphas_cumprod = _full(self.config).alphas_cumprod
        super().set_timesteps(device=device, timesteps=timesteps or _respaced(self.config, num_inference_steps))


class RespacedDPMSolverScheduler(DPMSolverMultistepScheduler):
    """The sampler ``dpm++``; with ``solver_order`` 1, which is DDIM (arXiv 2211.01095, section 4), ``ddim``."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As diffusers', evenly spaced as :meth:`Schedule.respace` does, unless ``timesteps`` are given."""
        self.alphas_cumprod = _full(self.config).alphas_cumprod
        timesteps = timesteps or _respaced(self.config, num_inference_steps)
        super().set_timesteps(device=device, mu=mu, timesteps=timesteps)

    def step(self, model_output: torch.Tensor, timestep: int | torch.Tensor, *args: Any, **options: Any) -> Any:
        """As diffusers'; the step before the last, by far the longest, is of first order."""
        if self.step_index is None:
            self._init_step_index(timestep)
        if self.step_index == len(self.timesteps) - 2:
            self.lower_order_nums = 0
        return super().step(model_output, timestep, *args, **options)


def _full(config: Any) -> Schedule:
    return Schedule.linear(config.num_train_timesteps, config.beta_start, config.beta_end)


def _respaced(config: Any, steps: int | None) -> list[int]:
    steps = config.num_train_timesteps if steps is None else steps
    return _full(config).respace(steps).timesteps.flip(0).tolist()


def scheduler_for(sampler: str, steps: int) -> SchedulerMixin:
    """That does what a sampler of :mod:`diffussm.diffusion.samplers` does, for a model of ``steps`` timesteps."""
    config = {
        "num_train_timesteps": steps, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2,
        "variance_type": "learned_range", "timestep_spacing": "linspace",
    }  # fmt: skip
    if sampler == "ancestral":
        return RespacedDDPMScheduler(**config, clip_sample=False)
    order = {"ddim": 1, "dpm++": 2}[sampler]
    solver = RespacedDPMSolverScheduler(**config, solver_order=order, final_sigmas_type="zero")
    solver.register_to_config(clip_sample=False)  # it never clips; others that are made of its configuration would
    return solver
