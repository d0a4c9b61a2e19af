import pytest
import torch
from reference_s4d import random_parameters, recurrence, relative_error

from benchmarks.textbook import textbook_s4d

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("length", [1, 64, 75])
def test_is_the_recurrence_of_both_directions(length):
    parameters = random_parameters(width=3, pairs=4)
    u_BLD = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(1))
    y_BDL = textbook_s4d(u_BLD.transpose(1, 2), *parameters)
    assert relative_error(y_BDL.transpose(1, 2), recurrence(u_BLD, parameters)) < 1e-5


def test_has_the_gradients_of_the_recurrence():
    parameters = [p.requires_grad_() for p in random_parameters(width=2, pairs=3)]
    u_BLD = torch.randn(2, 24, 2, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.randn(u_BLD.shape, generator=torch.Generator().manual_seed(2))
    inputs = [u_BLD, *parameters]
    truth = torch.autograd.grad((recurrence(u_BLD, parameters) * weights).sum(), inputs)
    y_BLD = textbook_s4d(u_BLD.transpose(1, 2), *parameters).transpose(1, 2)
    for ours, theirs in zip(torch.autograd.grad((y_BLD * weights).sum(), inputs), truth, strict=True):
        assert relative_error(ours, theirs) < 1e-4
