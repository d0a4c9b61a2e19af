from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from diffussm.diffusion.noise import sample_noise
from diffussm.errors import UserError

pytestmark = pytest.mark.unit

SHAPE = (4, 8, 8)


def test_a_sample_has_the_same_noise_in_any_batch():
    together = sample_noise(7, range(100, 108), SHAPE, 3)
    assert together.shape == (8, *SHAPE) and together.dtype == torch.float32
    for split in ([range(100, 101), range(101, 108)], [range(100, 104), range(104, 108)]):
        assert torch.equal(together, torch.cat([sample_noise(7, part, SHAPE, 3) for part in split]))
    assert torch.equal(together[[5, 0]], sample_noise(7, [105, 100], SHAPE, 3))
    assert torch.equal(sample_noise(7, torch.tensor([105]), SHAPE, 3), together[5:6])


def test_no_two_of_seed_index_and_step_share_noise():
    rows = [
        sample_noise(seed, range(4), SHAPE, step).flatten(1).numpy()
        for seed in (0, 1, 2**64 - 1)
        for step in (0, 1, 2, 250)
    ]
    correlation = np.corrcoef(np.concatenate(rows))
    np.fill_diagonal(correlation, 0)
    assert len(correlation) == 48
    assert np.abs(correlation).max() < 6 / np.sqrt(np.prod(SHAPE))


def test_swapping_seed_and_index_or_index_and_step_changes_the_noise():
    assert not torch.equal(sample_noise(1, [2], SHAPE, 3), sample_noise(2, [1], SHAPE, 3))
    assert not torch.equal(sample_noise(1, [2], SHAPE, 3), sample_noise(1, [3], SHAPE, 2))


def test_the_noise_is_standard_normal_along_every_axis():
    within = sample_noise(0, range(50), SHAPE, 1).flatten()
    across_samples = sample_noise(0, range(4000), (1,), 1).flatten()
    across_steps = torch.cat([sample_noise(0, [0], (1,), step) for step in range(4000)]).flatten()
    across_seeds = torch.cat([sample_noise(seed, [0], (1,), 0) for seed in range(4000)]).flatten()
    for values in (within, across_samples, across_steps, across_seeds):
        assert stats.kstest(values.numpy(), "norm").pvalue > 0.01
        assert abs(values.mean().item()) < 4 / len(values) ** 0.5
        assert abs(values.var().item() - 1) < 4 * (2 / len(values)) ** 0.5


def test_the_noise_of_a_seed_never_changes():
    """Other figures here mean other images for every seed."""
    expected = np.array([0.52145201, -1.1570177, -0.59343606, 0.75816554], np.float32)
    np.testing.assert_array_equal(sample_noise(7, [9], (4,), 5)[0], expected)


def test_no_samples_have_no_noise():
    assert sample_noise(0, [], SHAPE, 0).shape == (0, *SHAPE)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(UserError, match=f"not {seed}"):
        sample_noise(seed, [0], SHAPE, 0)
