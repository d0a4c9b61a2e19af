"""The kernel and the convolution against the float64 recurrence, and its gradients by autograd."""

import pytest
import torch
from reference_s4d import random_parameters, recurrence, relative_error

from diffussm.ops import s4d
from diffussm.ops.s4d import two_sided_convolution, two_sided_kernel

pytestmark = pytest.mark.unit


def layer(u, parameters):
    return two_sided_convolution(u, two_sided_kernel(*parameters, length=u.shape[1]))


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 100, 784, 1024])
def test_equals_the_recurrence(length):
    parameters = random_parameters(width=6, pairs=8)
    u = torch.randn(2, length, 6)
    assert relative_error(layer(u, parameters), recurrence(u, parameters)) < 1e-5


def test_equals_the_recurrence_at_4096_with_32_pairs():
    parameters = random_parameters(width=4, pairs=32)
    u = torch.randn(1, 4096, 4)
    assert relative_error(layer(u, parameters), recurrence(u, parameters)) < 1e-5


@pytest.mark.parametrize("length", [1, 13, 64])
def test_gradients_equal_autograd_through_the_recurrence(length):
    parameters = random_parameters(width=3, pairs=4)
    u, target = torch.randn(2, length, 3), torch.randn(2, length, 3)
    ours = [t.clone().requires_grad_() for t in (u, *parameters)]
    truth = [t.double().requires_grad_() for t in (u, *parameters)]
    (layer(ours[0], ours[1:]) * target).sum().backward()
    (recurrence(truth[0], truth[1:]) * target.double()).sum().backward()
    for name, mine, true in zip(("u", "log_dt", "log_A_real", "A_imag", "C", "skip"), ours, truth, strict=True):
        assert relative_error(mine.grad, true.grad) < 2e-5, name


def test_convolution_is_the_sum_over_both_sides():
    length, u, kernel = 5, torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(3, 10)
    expected = torch.zeros_like(u)
    for to in range(length):
        for start in range(length):
            expected[:, to] += kernel[:, (to - start) % (2 * length)] * u[:, start]
    assert torch.allclose(two_sided_convolution(u, kernel), expected, atol=1e-6)


def test_blocks_of_channels_do_not_change_the_result(monkeypatch):
    parameters = random_parameters(width=21, pairs=4)
    u = torch.randn(2, 40, 21, requires_grad=True)
    whole = layer(u, parameters)
    (grad_whole,) = torch.autograd.grad(whole.square().sum(), u)
    monkeypatch.setattr(s4d, "TEMPORARY_BYTES", 1)  # blocks of 8, the last of 5
    blocks = layer(u, parameters)
    (grad_blocks,) = torch.autograd.grad(blocks.square().sum(), u)
    assert torch.allclose(whole, blocks, atol=1e-6)
    assert torch.allclose(grad_whole, grad_blocks, atol=1e-4)


def test_bf16_input_loses_no_more_than_bf16():
    parameters = random_parameters(width=6, pairs=8)
    u = torch.randn(2, 256, 6)
    y = layer(u.bfloat16(), parameters)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, recurrence(u, parameters)) < 5e-3


def test_extreme_steps_and_frequencies_stay_finite_and_exact():
    parameters = random_parameters(width=4, pairs=4)
    parameters[0] = torch.log(torch.tensor([1e-4, 1e-3, 0.1, 1.0])).expand(2, 4).clone()
    parameters[2] = torch.tensor([0.0, 1.0, 300.0, 3000.0]).expand(2, 4, 4).clone()
    u = torch.randn(1, 512, 4)
    y = layer(u, parameters)
    assert y.isfinite().all()
    # ΔA itself, an fp32 product, is known to 6e-8 of 3000 radians
    assert relative_error(y, recurrence(u, parameters)) < 1e-3


def test_gradients_of_float64_check_numerically():
    parameters = [p.double().requires_grad_() for p in random_parameters(width=2, pairs=2)]
    assert torch.autograd.gradcheck(lambda *p: two_sided_kernel(*p, length=11), parameters)
