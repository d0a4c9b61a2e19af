"""The analytic count against torch's counter and the paper's formula."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.models.macs import forward_macs

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("hourglass", [1, 2, 4])
def test_matrix_products_equal_torchs_count(hourglass):
    config = ModelConfig("custom", 32, 3, hourglass, 8)
    model = DiffuSSM(config, channels=4, num_classes=10)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([1]))
    flops = dict(counter.get_flop_counts()["Global"])
    flops.pop(torch.ops.aten.bmm, None)  # the kernel's generation, once a batch and not once an image
    counted = forward_macs(config, channels=4, length=64)
    assert sum(flops.values()) / 2 == sum(counted.values()) - counted["SSM convolution"]


@pytest.mark.parametrize(("length", "paper"), [(1024, 295.6e9), (4096, 1182.3e9)])
def test_xl_costs_what_the_papers_formula_says(length, paper):
    parts = forward_macs(ModelConfig("XL"), channels=4, length=length)
    dense = sum(parts[name] for name in ("W0", "W_up", "W_down", "W1, W2, W3", "SSM mix"))
    assert dense == 29 * 7.5 * length * 1152**2
    assert dense == pytest.approx(paper, rel=0.001)
    assert parts["SSM convolution"] < 0.02 * dense
