from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffussm.diffusion.schedule import Schedule
from diffussm.errors import UserError

pytestmark = pytest.mark.unit

T = 1000
BETAS = 1e-4 + (2e-2 - 1e-4) * np.arange(T) / (T - 1)
ALPHAS_CUMPROD = np.exp(np.cumsum(np.log1p(-BETAS)))


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule.linear()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_linear_tables_match_the_formulas(schedule):
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    np.testing.assert_allclose(schedule.betas, BETAS, rtol=1e-11)
    np.testing.assert_allclose(schedule.alphas_cumprod, ALPHAS_CUMPROD, rtol=1e-12)
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)  # DDPM's "approximately 1e-5"
    assert torch.equal(schedule.timesteps, torch.arange(T))


def test_linear_tables_match_diffusers(schedule):
    other = DDPMScheduler(T, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
    np.testing.assert_allclose(schedule.betas.float(), other.betas, rtol=1e-6)
    np.testing.assert_allclose(schedule.alphas_cumprod, other.alphas_cumprod, rtol=2e-5)  # theirs is summed in float32


def test_composed_single_steps_are_q_sample(schedule):
    """x_t = √(1-β_t) x_{t-1} + √β_t ε, iterated in float64, has the mean and variance of q_sample."""
    mean_scale, variance = 1.0, 0.0
    for t in range(T):
        mean_scale *= np.sqrt(1 - BETAS[t])
        variance = (1 - BETAS[t]) * variance + BETAS[t]
        if t in (0, 1, 10, 500, 999):
            one, zero, at = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([t])
            assert schedule.q_sample(one, at, zero).item() == pytest.approx(mean_scale, rel=1e-6)
            assert schedule.q_sample(zero, at, one).item() ** 2 == pytest.approx(variance, rel=1e-6)


@pytest.mark.parametrize("steps", [T, 250])
def test_posterior_is_bayes_rule(schedule, steps):
    """q(x_{t-1}|x0) times q(x_t|x_{t-1}) as functions of x_{t-1}: precisions add, means are weighted by them."""
    respaced = schedule.respace(steps)
    x0, x_t = draw(steps - 1, 3, 2), draw(steps - 1, 3, 2, seed=1)
    t = torch.arange(1, steps)
    mean, variance, log_variance = respaced.posterior(x0, x_t, t)

    kept = ALPHAS_CUMPROD[respaced.timesteps]
    before, after = kept[:-1, None, None], kept[1:, None, None]
    alpha = after / before
    prior_precision = 1 / (1 - before)
    likelihood_precision = alpha / (1 - alpha)  # of x_{t-1}, given x_t = √α x_{t-1} + √(1-α) ε
    precision = prior_precision + likelihood_precision
    prior_mean, likelihood_mean = np.sqrt(before) * x0.numpy(), x_t.numpy() / np.sqrt(alpha)
    expected = (prior_precision * prior_mean + likelihood_precision * likelihood_mean) / precision
    np.testing.assert_allclose(mean, expected, atol=2e-6)
    np.testing.assert_allclose(variance, 1 / precision, rtol=1e-6)
    np.testing.assert_allclose(log_variance, -np.log(precision), rtol=1e-6)


def test_posterior_of_the_first_step_is_the_data(schedule):
    x0, t = draw(4, 2, 3), torch.zeros(4, dtype=torch.int64)
    mean, variance, log_variance = schedule.posterior(x0, draw(4, 2, 3, seed=1), t)
    torch.testing.assert_close(mean, x0)
    assert torch.equal(variance, torch.zeros(4, 1, 1))
    expected = np.log(BETAS[1] * BETAS[0] / (1 - ALPHAS_CUMPROD[1]))  # β̃_1
    np.testing.assert_allclose(log_variance, np.full((4, 1, 1), expected), rtol=1e-6)


def test_predictions_invert_q_sample(schedule):
    t = torch.tensor([0, 1, 50, 300, 999])
    x0, noise = draw(5, 4, 2, 2), draw(5, 4, 2, 2, seed=1)
    x_t = schedule.q_sample(x0, t, noise)
    error = (schedule.predict_x0(x_t, t, noise) - x0).abs().amax((1, 2, 3))
    # float32 rounding of x_t, amplified by 1/√ᾱ_t
    assert (error <= 5e-7 / torch.from_numpy(np.sqrt(ALPHAS_CUMPROD[t]))).all()
    error = (schedule.predict_eps(x_t, t, x0) - noise).abs().amax((1, 2, 3))
    assert (error <= 1e-6 / torch.from_numpy(np.sqrt(1 - ALPHAS_CUMPROD[t]))).all()


def test_log_variance_goes_from_posterior_to_beta(schedule):
    t = torch.arange(1, T)
    ones = torch.ones(T - 1, 1, 1)
    beta = BETAS[1:]
    posterior = beta * (1 - ALPHAS_CUMPROD[:-1]) / (1 - ALPHAS_CUMPROD[1:])
    for v, expected in ((1, np.log(beta)), (-1, np.log(posterior)), (0, np.log(np.sqrt(beta * posterior)))):
        np.testing.assert_allclose(schedule.log_variance_from(v * ones, t).flatten(), expected, rtol=1e-6)
    first = torch.tensor([0])
    assert schedule.log_variance_from(ones[:1], first).item() == pytest.approx(np.log(BETAS[0]), rel=1e-6)
    assert schedule.log_variance_from(-ones[:1], first).item() == pytest.approx(np.log(posterior[0]), rel=1e-6)


@pytest.mark.parametrize("n", [10, 50, 100, 250, 500])
def test_respaced_steps_are_evenly_spread_to_the_last(schedule, n):
    respaced = schedule.respace(n)
    other = DDPMScheduler(T, timestep_spacing="linspace")
    other.set_timesteps(n)
    assert respaced.steps == n
    assert respaced.timesteps.tolist() == other.timesteps.flip(0).tolist()
    np.testing.assert_array_equal(respaced.alphas_cumprod, schedule.alphas_cumprod[respaced.timesteps])
    np.testing.assert_allclose((1 - respaced.betas).cumprod(0), ALPHAS_CUMPROD[respaced.timesteps], rtol=1e-12)


def test_respacing_to_all_steps_changes_nothing(schedule):
    same = schedule.respace(T)
    assert torch.equal(same.timesteps, schedule.timesteps)
    assert torch.equal(same.betas, schedule.betas)


def test_respacing_to_one_step_keeps_the_first(schedule):
    single = schedule.respace(1)
    assert single.timesteps.tolist() == [0]
    assert single.betas.item() == pytest.approx(1e-4)
    v = torch.tensor([[-1.0], [1.0]])
    log_variance = single.log_variance_from(v, torch.tensor([0, 0]))
    np.testing.assert_allclose(log_variance, np.log([[1e-4], [1e-4]]), rtol=1e-6)


def test_respacing_twice_keeps_the_original_steps(schedule):
    twice = schedule.respace(250).respace(10)
    assert twice.timesteps[-1] == T - 1
    assert set(twice.timesteps.tolist()) <= set(schedule.respace(250).timesteps.tolist())


@pytest.mark.parametrize("n", [0, -1, T + 1])
def test_respacing_out_of_range_is_refused(schedule, n):
    with pytest.raises(UserError, match=rf"{n} sampling steps .* 1\.\.1000"):
        schedule.respace(n)


@pytest.mark.parametrize("steps, start, end", [(0, 1e-4, 2e-2), (10, 0.0, 2e-2), (10, 1e-4, 1.0), (10, 2e-2, 1e-4)])
def test_what_is_no_schedule_is_refused(steps, start, end):
    with pytest.raises(UserError, match="0 < beta_start <= beta_end < 1"):
        Schedule.linear(steps, start, end)
