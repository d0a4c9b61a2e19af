"""Random draws are functions of (seed, progress), and have the distributions they claim."""

import pytest
import torch
from scipy import stats

from diffussm.training.draws import draw

pytestmark = pytest.mark.unit


def test_any_split_of_a_batch_draws_the_same():
    whole = draw(3, range(100, 112), (2, 4, 4), 1000, 0.1)
    parts = [draw(3, [position], (2, 4, 4), 1000, 0.1) for position in range(100, 112)]
    for name in ("t", "drop", "posterior", "noise"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_seed_and_progress_change_everything():
    a, b, c = (draw(s, [p], (4, 8, 8), 1000, 0.5) for s, p in ((0, 0), (1, 0), (0, 1)))
    for other in (b, c):
        assert (a.noise != other.noise).all()
        assert (a.posterior != other.posterior).all()
    assert (a.noise != a.posterior).all()


def test_distributions():
    draws = draw(0, range(4000), (1, 2, 2), 1000, 0.1)
    assert stats.kstest(draws.noise.flatten(), "norm").pvalue > 1e-3
    assert stats.kstest(draws.posterior.flatten(), "norm").pvalue > 1e-3
    assert stats.kstest(draws.t / 1000, "uniform").pvalue > 1e-3
    assert draws.t.min() >= 0 and draws.t.max() <= 999
    assert draws.drop.float().mean() == pytest.approx(0.1, abs=0.02)
