from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from diffussm.diffusion.gaussian import discretized_gaussian_log_likelihood, normal_kl

pytestmark = pytest.mark.unit

PIXELS = torch.arange(256) / 127.5 - 1


@pytest.mark.parametrize(
    "mean1, std1, mean2, std2",
    [(0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -0.2, 0.7), (1.0, 2.0, 0.9, 0.4), (-2.0, 0.1, -2.1, 0.2)],
)
def test_kl_matches_numeric_integration(mean1, std1, mean2, std2):
    p, q = stats.norm(mean1, std1), stats.norm(mean2, std2)
    expected, _ = integrate.quad(
        lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), mean1 - 12 * std1, mean1 + 12 * std1, points=[mean1]
    )
    actual = normal_kl(*torch.tensor([mean1, 2 * math.log(std1), mean2, 2 * math.log(std2)], dtype=torch.float64))
    assert actual.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("mean, scale", [(0.0, 1.0), (0.37, 0.01), (-0.9999, 0.01), (1.3, 0.3), (1 / 255, 1e-4)])
def test_the_mass_of_all_bins_is_one(mean, scale):
    log_likelihood = discretized_gaussian_log_likelihood(PIXELS, torch.tensor(mean), torch.tensor(math.log(scale)))
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_the_mass_of_a_bin_is_the_integral_of_the_density():
    mean, scale = 0.1, 0.02
    density = stats.norm(mean, scale).pdf
    near = torch.arange(127, 154)  # 6.7 standard deviations to each side
    edges = (np.arange(127, 155) - 0.5) / 127.5 - 1
    mass = [integrate.quad(density, a, b, epsabs=0)[0] for a, b in pairwise(edges)]
    actual = discretized_gaussian_log_likelihood(PIXELS[near], torch.tensor(mean), torch.tensor(math.log(scale)))
    np.testing.assert_allclose(actual, np.log(mass), rtol=0, atol=1e-4)


def test_mass_is_floored_where_the_prediction_is_far_off():
    actual = discretized_gaussian_log_likelihood(PIXELS[[0, 90, 255]], torch.tensor(0.1), torch.tensor(-4.0))
    np.testing.assert_allclose(actual, math.log(1e-12), rtol=1e-6)


def test_values_outside_the_pixels_belong_to_the_outer_bins():
    mean, log_scale = torch.tensor([1.5, -2.0]), torch.tensor([-1.0, -1.0])
    actual = discretized_gaussian_log_likelihood(torch.tensor([1.6, -2.1]), mean, log_scale)
    scale = math.exp(-1)
    expected = [stats.norm.logsf((1.6 - 1 / 255 - 1.5) / scale), stats.norm.logcdf((-2.1 + 1 / 255 + 2.0) / scale)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
