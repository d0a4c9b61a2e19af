"""Samplers, on data whose noise prediction is known exactly: x0 ~ N(MU, SIGMA) over the channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from diffussm.diffusion.noise import sample_noise
from diffussm.diffusion.samplers import SAMPLERS, ancestral, ddim, dpm_solver
from diffussm.diffusion.schedule import Schedule
from diffussm.errors import UserError

pytestmark = pytest.mark.unit

T, C, N = 1000, 3, 20_000
FULL = Schedule.linear()
BARS = np.cumprod(1 - np.linspace(1e-4, 2e-2, T))
MU = np.array([0.5, -1.0, 0.25])
FACTOR = np.array([[1.0, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.4, 0.3, 0.8]])
SIGMA = FACTOR @ FACTOR.T


def gains(bars: np.ndarray) -> np.ndarray:
    """G of E[ε | x_t] = √(1-ᾱ) (ᾱ Σ + (1-ᾱ) I)⁻¹ (x_t - √ᾱ μ) = G (x_t - √ᾱ μ), for each ᾱ."""
    marginal = bars[:, None, None] * SIGMA + (1 - bars)[:, None, None] * np.eye(C)
    return np.sqrt(1 - bars)[:, None, None] * np.linalg.inv(marginal)


GAIN = gains(BARS)


class Exact:
    """The exact noise prediction, and one value of v for all; of the linear schedule, or of other values of ᾱ."""

    def __init__(self, v: float, bars: np.ndarray = BARS) -> None:
        self.v = v
        self.gains, self.means = GAIN if bars is BARS else gains(bars), np.sqrt(bars)[:, None] * MU
        self.times: list[int] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.dtype == torch.int64 and t.shape == x.shape[:1] and (t == t[0]).all()
        self.times.append(int(t[0]))
        gain, mean = self.gains[self.times[-1]], self.means[self.times[-1]]
        centred = x.flatten(1) - torch.tensor(mean, dtype=x.dtype)
        eps = centred @ torch.tensor(gain.T, dtype=x.dtype)
        return torch.cat([eps, torch.full_like(eps, self.v)], 1).view(len(x), 2 * C, 1, 1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise(step: int) -> torch.Tensor:
    return draw(N, C, 1, 1, seed=step)


def assert_moments(samples: torch.Tensor, mean: np.ndarray, covariance: np.ndarray, bias: float) -> None:
    """Mean within 4 standard errors, covariance within 4 and the ``bias`` that finitely many steps leave."""
    samples = samples.flatten(1).double().numpy()
    variances = np.diag(covariance)
    assert (np.abs(samples.mean(0) - mean) < 4 * np.sqrt(variances / len(samples))).all()
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / len(samples))
    assert (np.abs(np.cov(samples.T) - covariance) < 4 * error + bias).all()


# v = 1 is the reverse process's covariance to first order in the step. The bias that is left was computed by the
# recursion of the next test: 3.4e-3 and 0.83e-3.
@pytest.mark.parametrize("steps, bias", [(250, 4e-3), (1000, 1e-3)])
def test_ancestral_samples_have_the_moments_of_the_data(steps, bias):
    model = Exact(v=1.0)
    schedule = FULL.respace(steps)
    samples = ancestral(model, noise(0), schedule, noise)
    assert samples.dtype == torch.float32 and samples.shape == (N, C, 1, 1)
    assert model.times == schedule.timesteps.flip(0).tolist()
    assert_moments(samples, MU, SIGMA, bias)


@pytest.mark.parametrize("v", [-1.0, 0.0, 1.0, 1.5])
def test_ancestral_adds_the_variance_that_the_model_predicts(v):
    """With 50 steps each v ends in another covariance: that of x -> M x + √Σ_v z, iterated in float64."""
    schedule = FULL.respace(50)
    kept = schedule.timesteps.numpy()
    covariance = np.eye(C)
    for i in range(49, -1, -1):
        bar, before = BARS[kept[i]], BARS[kept[i - 1]] if i else 1.0
        beta = 1 - bar / before
        step = (np.eye(C) - beta / np.sqrt(1 - bar) * GAIN[kept[i]]) / np.sqrt(1 - beta)  # DDPM (11)
        tilde = beta * (1 - before) / (1 - bar)
        added = tilde * (beta / tilde) ** ((v + 1) / 2) if i else 0.0
        covariance = step @ covariance @ step.T + added * np.eye(C)
    samples = ancestral(Exact(v), noise(0), schedule, noise)
    assert_moments(samples, MU, covariance, 0.0)
    assert np.abs(covariance - SIGMA).max() > 0.015


def flow(x_T: torch.Tensor, start: float = BARS[-1], end: float = 1.0) -> np.ndarray:
    """Where the probability flow takes x_T from one ᾱ to another, by default to the data: each eigenvector's coordinate
    keeps its number of standard deviations."""
    eigenvalues, vectors = np.linalg.eigh(SIGMA)
    coordinates = (x_T.flatten(1).double().numpy() - np.sqrt(start) * MU) @ vectors
    before, after = (np.sqrt(bar * eigenvalues + 1 - bar) for bar in (start, end))
    return np.sqrt(end) * MU + coordinates * after / before @ vectors.T


def test_ddim_follows_the_probability_flow():
    x_T = draw(256, C, 1, 1)
    errors = {}
    for steps in (250, 1000):
        samples = ddim(Exact(0.0), x_T, FULL.respace(steps)).flatten(1).numpy()
        errors[steps] = np.abs(samples - flow(x_T)).max()
    assert errors[1000] < 0.01
    assert errors[250] / errors[1000] == pytest.approx(4, rel=0.1)  # a method of first order


def test_ddim_samples_have_the_moments_of_the_data():
    samples = ddim(Exact(0.0), noise(0), FULL)
    assert_moments(samples, flow(torch.zeros(1, C))[0], SIGMA, 4e-3)


def errors_in_equal_steps_of_log_snr(sampler) -> list[float]:
    """Of 25, 50 and 100 steps, the largest distance from the flow to the last ᾱ and the data predicted there."""
    x_T, errors = draw(256, C, 1, 1), []
    for steps in (25, 50, 100):
        bars = 1 / (1 + np.exp(-2 * np.linspace(4.6, -5, steps)))
        model = Exact(0.0, bars)
        samples = sampler(model, x_T, Schedule(torch.from_numpy(bars), torch.arange(steps))).flatten(1).numpy()
        last = flow(x_T, bars[-1], bars[0])
        expected = (last - np.sqrt(1 - bars[0]) * (last - model.means[0]) @ model.gains[0].T) / np.sqrt(bars[0])
        errors.append(np.abs(samples - expected).max())
    return errors


@pytest.mark.parametrize("sampler, order", [(ddim, 1), (dpm_solver, 2)])
def test_errors_fall_with_the_order_of_the_method(sampler, order):
    coarse, middle, fine = errors_in_equal_steps_of_log_snr(sampler)
    assert np.log2(middle / fine) == pytest.approx(order, abs=0.1) == np.log2(coarse / middle)


def test_dpm_solver_needs_fewer_steps_than_ddim():
    x_T = draw(256, C, 1, 1)
    dpm, other = (
        np.abs(sampler(Exact(0.0), x_T, FULL.respace(steps)).flatten(1).numpy() - flow(x_T)).max()
        for sampler, steps in ((dpm_solver, 20), (ddim, 50))
    )
    assert dpm < other


def test_ddim_says_that_it_needs_noise():
    with pytest.raises(UserError, match=r"ddim draws noise at eta 0\.5"):
        ddim(Exact(0.0), noise(0), Schedule.linear(T), eta=0.5)


def test_ddim_of_eta_one_is_ancestral_with_the_lower_variance():
    schedule = FULL.respace(50)
    expected = ancestral(Exact(-1.0), noise(0), schedule, noise)
    torch.testing.assert_close(ddim(Exact(0.0), noise(0), schedule, noise, eta=1.0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("i", [249, 100, 1])
def test_an_ancestral_step_matches_diffusers(i, clip):
    schedule = FULL.respace(250)
    other = DDPMScheduler(T, beta_start=1e-4, beta_end=2e-2, variance_type="learned_range", clip_sample=clip)
    other.alphas_cumprod = torch.from_numpy(BARS)  # theirs are float32, and 1 - ᾱ/ᾱ' of those has few digits
    other.set_timesteps(timesteps=schedule.timesteps.flip(0).tolist())
    x, output = draw(4, C, 2, 2), draw(4, 2 * C, 2, 2, seed=1)
    t = int(schedule.timesteps[i])
    expected = other.step(output, t, x, generator=torch.Generator().manual_seed(2)).prev_sample.float()
    actual = one_step("ancestral", output, x, i, lambda step: draw(4, C, 2, 2, seed=2), clip=clip)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("i", [999, 400, 0])
def test_a_ddim_step_matches_diffusers(i, clip, eta):
    other = DDIMScheduler(T, beta_start=1e-4, beta_end=2e-2, clip_sample=clip)
    other.alphas_cumprod = torch.from_numpy(BARS)
    other.set_timesteps(T)
    x, eps, z = draw(4, C, 2, 2), draw(4, C, 2, 2, seed=1), draw(4, C, 2, 2, seed=2)
    expected = other.step(eps, i, x, eta=eta, use_clipped_model_output=True, variance_noise=z).prev_sample.float()
    actual = one_step("ddim", eps, x, i, lambda step: z, steps=T, eta=eta, clip=clip)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [3, 10, 50])
def test_every_step_of_dpm_solver_matches_diffusers(steps):
    """Theirs ends with the least noise, at t = 0; ours makes one step more, to the data."""
    schedule = FULL.respace(steps)
    other = DPMSolverMultistepScheduler(
        T, beta_start=1e-4, beta_end=2e-2, solver_order=2, final_sigmas_type="sigma_min", euler_at_final=True
    )
    other.alphas_cumprod = BARS
    other.set_timesteps(timesteps=schedule.timesteps[1:].flip(0).tolist())
    mix, states = draw(C, C, seed=1), []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        states.append(x)
        return torch.tanh(torch.einsum("ij,bjhw->bihw", mix, x) + t.view(-1, 1, 1, 1) / T)

    dpm_solver(model, draw(4, C, 2, 2), schedule)
    expected = states[0]
    for t, after in zip(other.timesteps, states[1:].copy(), strict=True):
        expected = other.step(model(expected, t.expand(4)), t, expected).prev_sample.float()
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def one_step(name, output, x, i, noise, steps=250, **options):
    """The state after step i, seen as the input of the model's next call."""
    seen = []

    def model(state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(state)
        return output

    schedule = FULL.respace(steps)
    first = Schedule(schedule.alphas_cumprod[: i + 1], schedule.timesteps[: i + 1])
    final = SAMPLERS[name](model, x, first, noise, **options)
    return [*seen, final][1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_asked_for_once_a_transition_but_the_last(name):
    asked = []

    def counting(step: int) -> torch.Tensor:
        asked.append(step)
        return draw(2, C, 1, 1, seed=step)

    options = {"eta": 0.5} if name == "ddim" else {}
    SAMPLERS[name](Exact(0.0), draw(2, C, 1, 1), FULL.respace(5), counting, **options)
    assert asked == ([] if name == "dpm++" else [1, 2, 3, 4])


@pytest.mark.parametrize("name", SAMPLERS)
def test_progress_wraps_the_steps_and_changes_nothing(name):
    seen = []

    def progress(steps: range):
        assert len(steps) == 5
        for step in steps:
            seen.append(step)
            yield step

    args = (Exact(0.0), draw(2, C, 1, 1), FULL.respace(5), lambda step: draw(2, C, 1, 1, seed=step))
    assert torch.equal(SAMPLERS[name](*args, progress=progress), SAMPLERS[name](*args))
    assert len(seen) == 5


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name):
    def samples(indices: range) -> torch.Tensor:
        x = sample_noise(3, indices, (C, 4, 4), 0)
        options = {"eta": 0.5} if name == "ddim" else {}
        return SAMPLERS[name](
            lambda x, t: torch.cat([x / 2, x.clamp(-1, 1)], 1),  # a matrix product may round by its batch
            x,
            FULL.respace(10),
            lambda step: sample_noise(3, indices, (C, 4, 4), step),
            **options,
        )

    together = samples(range(7))
    assert together.isfinite().all()
    assert torch.equal(together, torch.cat([samples(range(3)), samples(range(3, 4)), samples(range(4, 7))]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_single_step_predicts_the_data(name):
    """From t = 0, without noise."""
    x = draw(4, C, 1, 1)
    eps = Exact(0.0)(x, torch.zeros(4, dtype=torch.int64))[:, :C]
    expected = (x - 0.01 * eps) / np.sqrt(1 - 1e-4)
    torch.testing.assert_close(SAMPLERS[name](Exact(0.0), x, FULL.respace(1), None), expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_state_is_float32_whatever_the_model_returns(name):
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32 and not torch.is_grad_enabled()
        return torch.cat([x, x], 1).bfloat16()

    x = draw(2, C, 1, 1).double()
    assert SAMPLERS[name](model, x, FULL.respace(3), lambda step: torch.zeros_like(x)).dtype == torch.float32


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_an_eta_out_of_range_is_refused(eta):
    with pytest.raises(UserError, match=f"eta from 0 to 1, not {eta}"):
        ddim(Exact(0.0), draw(2, C, 1, 1), FULL.respace(3), noise, eta=eta)
