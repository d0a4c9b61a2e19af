"""The Fréchet distance against closed forms and the textbook's matrix square root."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from diffussm.errors import UserError
from diffussm.evaluation.frechet import Gaussian, Moments, frechet_distance

pytestmark = pytest.mark.unit


def draw(count: int, size: int, seed: int, rank: int | None = None) -> torch.Tensor:
    """Correlated samples [count, size] off the origin, as float32 like features; of lower rank on request."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or size, size, generator=generator)
    samples = torch.randn(count, rank or size, generator=generator) @ mix
    return samples * torch.logspace(-1, 0.5, size) + torch.randn(size, generator=generator)


def textbook(a: torch.Tensor, b: torch.Tensor) -> float:
    """The formula as everybody writes it, by NumPy's covariance and SciPy's matrix square root."""
    a, b = a.double().numpy(), b.double().numpy()
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(sigma_a @ sigma_b)
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(sigma_a + sigma_b - 2 * root.real))


@pytest.mark.parametrize(
    ("count_a", "count_b", "size"), [(500, 400, 64), (33, 500, 64), (500, 64, 64), (65, 65, 64), (900, 700, 256)]
)
def test_agrees_with_the_matrix_square_root(count_a: int, count_b: int, size: int) -> None:
    a, b = draw(count_a, size, seed=1), draw(count_b, size, seed=2)
    distance = frechet_distance(Gaussian.of_samples(a), Gaussian.of_samples(b))
    assert distance == pytest.approx(textbook(a, b), rel=1e-6)


def test_samples_and_their_moments_give_the_same() -> None:
    a, b = draw(40, 64, seed=1), draw(300, 64, seed=2)
    mean, covariance = a.double().mean(0), torch.from_numpy(np.cov(a.double().numpy(), rowvar=False))
    by_moments = frechet_distance(Gaussian.of_moments(mean, covariance), Gaussian.of_samples(b))
    assert by_moments == pytest.approx(frechet_distance(Gaussian.of_samples(a), Gaussian.of_samples(b)), rel=1e-8)


def test_diagonal_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    mean_a, mean_b, std_a, std_b = torch.rand(4, 50, generator=generator, dtype=torch.float64)
    std_a[:20] = 0  # singular
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    rotation = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=torch.float64)).Q
    a = Gaussian.of_moments(mean_a @ rotation, rotation.T @ std_a.square().diag() @ rotation)
    b = Gaussian.of_moments(mean_b @ rotation, rotation.T @ std_b.square().diag() @ rotation)
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("count", [20, 300])
def test_identical_samples_are_at_zero_and_shifted_ones_at_the_square_of_the_shift(count: int) -> None:
    samples = draw(count, 64, seed=3, rank=30).double()
    shift = torch.linspace(-1, 2, 64, dtype=torch.float64)
    here = Gaussian.of_samples(samples)
    assert frechet_distance(here, here) == pytest.approx(0, abs=1e-6 * here.factor.square().sum().item())
    there = Gaussian.of_samples(samples + shift)
    assert frechet_distance(here, there) == pytest.approx(shift.square().sum().item(), rel=1e-6)


def test_is_symmetric_for_singular_covariances_that_share_no_direction() -> None:
    a, b = torch.zeros(30, 8), torch.zeros(30, 8)
    a[:, :3], b[:, 5:] = draw(30, 3, seed=1), draw(30, 3, seed=2)
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    there, back = Gaussian.of_samples(a), Gaussian.of_samples(b)
    assert frechet_distance(there, back) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(back, there) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("count", [5000, 60, 40])  # more than dimensions, of which some are kept first; and fewer
def test_moments_do_not_depend_on_the_parts_nor_cancel_far_from_the_origin(count: int) -> None:
    samples = draw(count, 50, seed=4).double() + 1e6
    parts, first, second, stored, joined = (Moments(50) for _ in range(5))
    for part in samples.split(7):
        parts.update(part)
    first.update(samples[: count // 4])
    second.update(samples[count // 4 :])
    first.combine(Moments(50))
    first.combine(second)
    stored.load_state(second.state())  # before first, where that keeps what second does not
    joined.update(samples[: count // 4])
    stored.combine(joined)
    expected = np.cov(samples.numpy() - 1e6, rowvar=False)
    for moments in (parts, first, stored):
        assert moments.count == count
        found = moments.gaussian()
        np.testing.assert_allclose(found.mean, samples.mean(0), rtol=1e-14)
        np.testing.assert_allclose(found.covariance, expected, rtol=1e-7, atol=1e-8 * expected.max())


def test_moments_of_many_take_the_memory_of_the_dimensions() -> None:
    moments = Moments(8)
    moments.update(torch.ones(8, 8))
    assert moments.state()["samples"].shape == (8, 8)
    moments.update(torch.zeros(1, 8))
    assert {key: tuple(value.shape) for key, value in moments.state().items()} == {
        "count": (), "mean": (8,), "scatter": (8, 8),
    }  # fmt: skip


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        Gaussian.of_samples(torch.ones(1, 4))
    with pytest.raises(UserError, match="at least 2 images, got 0"):
        Moments(4).gaussian()
