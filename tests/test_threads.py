"""Batches side by side come out in order, and leave torch's threads as they were."""

import pytest
import torch

from diffussm.threads import map_batches

pytestmark = pytest.mark.unit


def test_order_and_threads():
    before = torch.get_num_threads()
    seen = list(map_batches(lambda n: (n, torch.get_num_threads()), range(20)))
    assert seen == [(n, 1) for n in range(20)]
    assert torch.get_num_threads() == before


def test_an_error_reaches_the_caller_and_leaves_the_threads():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        list(map_batches(lambda n: 1 / n, [1, 0]))
    assert torch.get_num_threads() == before
