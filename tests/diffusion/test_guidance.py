from __future__ import annotations

import pytest
import torch

from diffussm.diffusion.guidance import Guided
from diffussm.errors import UserError

pytestmark = pytest.mark.unit

B, C, NULL = 3, 4, 10


class Linear:
    """A model linear in x: the label and t are the factors of the noise and of the covariance."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x))
        y, t = y.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
        return torch.cat([y * x, t * y * x], 1)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(B, C, 2, 2, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_the_noise_is_extrapolated_and_the_covariance_conditional(inputs, scale):
    x, t, y = inputs
    model = Linear()
    eps, v = Guided(model, y, NULL, scale)(x, t).chunk(2, dim=1)
    factor = (NULL + scale * (y - NULL)).view(-1, 1, 1, 1)  # scale 0: the null label's alone
    torch.testing.assert_close(eps, factor * x, rtol=1e-5, atol=1e-5)
    assert torch.equal(v, model(x, t, y)[:, C:])
    assert model.batches[0] == 2 * B


def test_scale_one_is_the_conditional_model_at_its_cost(inputs):
    x, t, y = inputs
    model = Linear()
    assert torch.equal(Guided(model, y, NULL, 1.0)(x, t), Linear()(x, t, y))
    assert model.batches == [B]


@pytest.mark.parametrize("channels", [1, 3])
def test_guidance_of_the_first_channels_leaves_the_rest_conditional(inputs, channels):
    x, t, y = inputs
    partly = Guided(Linear(), y, NULL, 4.0, channels)(x, t)
    fully = Guided(Linear(), y, NULL, 4.0)(x, t)
    assert torch.equal(partly[:, :channels], fully[:, :channels])
    assert torch.equal(partly[:, channels:], Linear()(x, t, y)[:, channels:])
    assert not torch.equal(partly[:, channels:C], fully[:, channels:C])


def test_guidance_of_all_channels_is_the_default(inputs):
    x, t, y = inputs
    assert torch.equal(Guided(Linear(), y, NULL, 4.0, C)(x, t), Guided(Linear(), y, NULL, 4.0)(x, t))


@pytest.mark.parametrize("channels", [0, C + 1])
def test_channels_that_are_not_there_are_refused(inputs, channels):
    x, t, y = inputs
    with pytest.raises(UserError, match=rf"{channels} channels of 4: ask for 1\.\.4"):
        Guided(Linear(), y, NULL, 4.0, channels)(x, t)
