from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffussm.diffusion.losses import hybrid_loss
from diffussm.diffusion.schedule import Schedule

pytestmark = pytest.mark.unit

B, C = 6, 3
TIMES = torch.tensor([0, 1, 7, 100, 500, 999])


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule.linear()


@pytest.fixture(scope="module")
def batch(schedule) -> tuple[torch.Tensor, ...]:
    """x0, x_t, noise, eps, v: a prediction that is about right."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, error, v = torch.randn(4, B, C, 4, 4, generator=generator)
    x0 = x0.clamp(-1, 1)
    return x0, schedule.q_sample(x0, TIMES, noise), noise, noise + 0.1 * error, v


def test_the_terms_match_float64(schedule, batch):
    """The bound by another road: the mean as DDPM (11) has it, scipy's CDF, one number at a time, all in float64."""
    x0, x_t, noise, eps, v = batch
    losses = hybrid_loss(torch.cat([eps, v], 1), x0, x_t, noise, TIMES, schedule)
    assert losses.total.dtype == losses.mse.dtype == losses.vlb.dtype == torch.float32
    betas = np.linspace(1e-4, 2e-2, 1000)
    bars = np.cumprod(1 - betas)
    for b, t in enumerate(TIMES.tolist()):
        x, y, e, true_e, u = (tensor[b].double().numpy() for tensor in (x0, x_t, eps, noise, v))
        beta, bar = betas[t], bars[t]
        tilde = betas[max(t, 1)] * (1 - bars[max(t, 1) - 1]) / (1 - bars[max(t, 1)])
        mean = (y - beta / np.sqrt(1 - bar) * e) / np.sqrt(1 - beta)
        variance = np.exp((u + 1) / 2 * np.log(beta) + (1 - u) / 2 * np.log(tilde))
        if t == 0:
            normal = stats.norm(mean, np.sqrt(variance))
            inner = normal.cdf(x + 1 / 255) - normal.cdf(x - 1 / 255)
            mass = np.where(x == -1, normal.cdf(x + 1 / 255), np.where(x == 1, normal.sf(x - 1 / 255), inner))
            expected = -np.log2(mass).mean()
        else:
            truth = (y - beta / np.sqrt(1 - bar) * (y - np.sqrt(bar) * x) / np.sqrt(1 - bar)) / np.sqrt(1 - beta)
            kl = 0.5 * (np.log(variance / tilde) + (tilde + (truth - mean) ** 2) / variance - 1)
            expected = kl.mean() / np.log(2)
        assert losses.vlb[b].item() == pytest.approx(expected, rel=2e-4)
        assert losses.mse[b].item() == pytest.approx(((true_e - e) ** 2).mean(), rel=1e-5)
    torch.testing.assert_close(losses.total, losses.mse + losses.vlb)


def test_a_perfect_prediction_has_no_loss(schedule, batch):
    x0, x_t, noise, _, _ = batch
    losses = hybrid_loss(torch.cat([noise, -torch.ones_like(noise)], 1), x0, x_t, noise, TIMES, schedule)
    assert torch.equal(losses.mse, torch.zeros(B))
    assert losses.vlb[1:].abs().max() < 1e-6  # of the KL terms; the first is a likelihood


def test_the_best_v_has_the_variance_that_the_error_leaves(schedule, batch):
    """For a fixed mean the KL is least at variance β̃ + (error of the mean)²; v there has no gradient."""
    x0, x_t, noise, eps, _ = batch
    mean, variance, low = schedule.posterior(x0, x_t, TIMES)
    predicted, _, _ = schedule.posterior(schedule.predict_x0(x_t, TIMES, eps), x_t, TIMES)
    best = (variance + (mean - predicted) ** 2).log()
    high = schedule.log_variance_from(torch.ones_like(eps), TIMES)
    v = (2 * (best - low) / (high - low) - 1)[1:3].requires_grad_()
    args = [tensor[1:3] for tensor in (x0, x_t, noise, TIMES)]
    at_best = hybrid_loss(torch.cat([eps[1:3], v], 1), *args, schedule).vlb
    (gradient,) = torch.autograd.grad(at_best.sum(), v)
    off = hybrid_loss(torch.cat([eps[1:3], v + 0.5], 1), *args, schedule).vlb
    (gradient_off,) = torch.autograd.grad(off.sum(), v)
    assert (off > at_best).all()
    assert gradient.abs().max() < 1e-3 * gradient_off.abs().max()


def test_each_term_trains_its_own_channels(schedule, batch):
    x0, x_t, noise, eps, v = batch
    output = torch.cat([eps, v], 1).requires_grad_()
    losses = hybrid_loss(output, x0, x_t, noise, TIMES, schedule)
    (by_mse,) = torch.autograd.grad(losses.mse.sum(), output, retain_graph=True)
    (by_vlb,) = torch.autograd.grad(losses.vlb.sum(), output)
    assert by_mse[:, C:].abs().max() == 0 and by_mse[:, :C].abs().min() > 0
    assert by_vlb[:, :C].abs().max() == 0 and by_vlb[:, C:].abs().flatten(1).amax(1).min() > 0


def test_the_bound_is_weighted_by_the_number_of_steps(batch):
    short = Schedule.linear(250)
    x0, x_t, noise, eps, v = (tensor[:4] for tensor in batch)
    losses = hybrid_loss(torch.cat([eps, v], 1), x0, x_t, noise, torch.tensor([0, 1, 7, 100]), short)
    torch.testing.assert_close(losses.total, losses.mse + 0.25 * losses.vlb)


def test_a_bfloat16_prediction_under_autocast_is_scored_in_float32(schedule, batch):
    x0, x_t, noise, eps, v = batch
    output = torch.cat([eps, v], 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses = hybrid_loss(output, x0, x_t, noise, TIMES, schedule)
    expected = hybrid_loss(output.float(), x0, x_t, noise, TIMES, schedule)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(losses, expected, strict=True))


def test_far_off_predictions_have_a_finite_loss(schedule, batch):
    x0, x_t, noise, eps, v = batch
    output = torch.cat([eps + 100, v], 1).requires_grad_()
    losses = hybrid_loss(output, x0, x_t, noise, TIMES, schedule)
    losses.total.sum().backward()
    assert losses.total.isfinite().all() and output.grad.isfinite().all()
    assert 20 < losses.vlb[0] < 12 * math.log2(10)  # the floor of the likelihood; values at ±1 may have mass 1


def test_an_output_without_covariance_is_refused(schedule, batch):
    x0, x_t, noise, eps, _ = batch
    with pytest.raises(ValueError, match="values to unpack"):
        hybrid_loss(eps, x0, x_t, noise, TIMES, schedule)
