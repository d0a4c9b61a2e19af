"""The network against the paper's formulas and figures."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference_s4d import recurrence, relative_error

from diffussm.diffusion.generate import generate
from diffussm.diffusion.samplers import SAMPLERS
from diffussm.diffusion.schedule import Schedule
from diffussm.errors import UserError
from diffussm.models.block import HourglassBlock
from diffussm.models.diffussm import DiffuSSM, ModelConfig, position_embedding

pytestmark = pytest.mark.unit

TINY = ModelConfig("custom", width=16, depth=2, hourglass=2, state=8)


def awake(model: torch.nn.Module) -> torch.nn.Module:
    """With adaLN-zero's zeros replaced: a fresh network is the identity, which would prove nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not getattr(parameter, "is_ssm", False) and not parameter.any():
                parameter.normal_(std=0.2)
    return model


def test_xl_has_673m_parameters_and_13_d2_in_a_block():
    with torch.device("meta"):
        model = DiffuSSM(ModelConfig("XL"), channels=4, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(673e6, rel=0.01)
    block = model.blocks[0]
    weights = [linear.weight for linear in (block.w0, block.w_up, block.w1, block.w2, block.w3)]
    assert sum(weight.numel() for weight in (*weights, block.mix_and_down.down_weight)) == 13 * 1152**2
    assert len(model.blocks) == 29


@pytest.mark.parametrize("short", [2, 23])  # fewer positions than 2D, and more: mix and W_down apart, and multiplied
@pytest.mark.parametrize("hourglass", [1, 2, 4])
def test_block_is_the_papers_formula(hourglass, short):
    """Each position computed on its own, in float64, with the recurrence for the state space layer."""
    torch.manual_seed(0)
    width = 16
    block = awake(HourglassBlock(width, hourglass, state=8)).double()
    for parameter in block.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    x, c = torch.randn(2, short, width).double(), torch.randn(2, width).double()

    shift, scale, gate = block.modulation(F.silu(c)).chunk(3, dim=-1)
    i = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    up = block.w_up.weight.view(hourglass, width, width)  # W_up[k]
    up_bias = block.w_up.bias.view(hourglass, width)
    u = torch.empty(2, short * hourglass, width).double()
    for j in range(short):
        for k in range(hourglass):
            u[:, j * hourglass + k] = F.gelu(F.gelu(block.w0(i[:, j])) @ up[k].T + up_bias[k])
    ssm = block.ssm
    ends = block.mix_and_down
    y = recurrence(u, [ssm.log_dt, ssm.log_A_real, ssm.A_imag, ssm.C, ssm.skip]) @ ends.mix_weight.T + ends.mix_bias
    o = torch.empty(2, short, width).double()
    for j in range(short):
        pieces = [F.gelu(y[:, j * hourglass + k] @ ends.down_weight[k].T + ends.down_bias[k]) for k in range(hourglass)]
        assert pieces[0].shape[-1] == 2 * width // hourglass
        o[:, j] = block.w3(F.gelu(block.w2(torch.cat(pieces, -1))) * F.gelu(block.w1(i[:, j])))
    assert relative_error(block(x, c), x + gate[:, None] * o) < 1e-5


@pytest.mark.parametrize(("hourglass", "height", "width"), [(1, 5, 7), (2, 6, 7), (4, 12, 5), (2, 16, 16)])
def test_any_hourglass_and_size(hourglass, height, width):
    model = awake(DiffuSSM(ModelConfig("custom", 16, 2, hourglass, 8), channels=3, num_classes=5))
    out = model(torch.randn(2, 3, height, width), torch.tensor([0, 999]), torch.tensor([4, 5]))
    assert out.shape == (2, 6, height, width)
    assert out.isfinite().all()
    assert out.std() > 0.01
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_fresh_network_predicts_zero_whatever_the_input():
    model = DiffuSSM(TINY, channels=4, num_classes=10)
    assert not model(torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 2])).any()


def test_conditioning_reaches_the_output():
    model = awake(DiffuSSM(TINY, channels=4, num_classes=10)).eval()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([10])
    out = model(x, t, torch.tensor([1]))
    assert not torch.allclose(out, model(x, t, torch.tensor([2])), atol=1e-4)
    assert not torch.allclose(out, model(x, torch.tensor([700]), torch.tensor([1])), atol=1e-4)
    assert torch.equal(model(x, t), model(x, t, torch.tensor([10])))  # no label is the null class


def test_unconditional_has_no_class_embedding():
    model = awake(DiffuSSM(TINY, channels=4, num_classes=0))
    assert model.class_embedding is None
    assert model(torch.randn(2, 4, 8, 8), torch.tensor([3, 500])).shape == (2, 8, 8, 8)


def test_every_position_sees_every_other():
    model = awake(DiffuSSM(TINY, channels=1, num_classes=0))
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    out = model(x, torch.tensor([10]))
    for position in ((0, 0), (2, 1), (3, 3)):
        (grad,) = torch.autograd.grad(out[0, 0][position], x, retain_graph=True)
        assert (grad.abs() > 0).all()


def test_positions_are_relative_to_the_size():
    small = position_embedding(8, 8, 32, torch.device("cpu")).view(8, 8, 32)
    large = position_embedding(24, 24, 32, torch.device("cpu")).view(24, 24, 32)
    assert torch.allclose(small, large[1::3, 1::3], atol=1e-5)  # each cell's centre is that of 3×3 smaller ones
    assert len(torch.unique(small.view(64, 32).round(decimals=3), dim=0)) == 64  # each position has its own


def test_autocast_leaves_the_state_space_in_fp32():
    model = awake(DiffuSSM(TINY, channels=4, num_classes=10))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 2])
    exact = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    assert out.dtype == torch.float32
    assert relative_error(out, exact.double()) < 0.05


@pytest.fixture
def one_thread():
    """As sampling on a CPU gives each batch: threads share out the rows of a product by how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("width", "size"), [(16, 8), (64, 8), (128, 16), (384, 8)])
@torch.no_grad()
def test_an_image_has_the_same_bits_in_any_batch(width, size, one_thread):
    model = awake(DiffuSSM(ModelConfig("custom", width, 2), channels=4, num_classes=10)).freeze()
    x, t, y = torch.randn(40, 4, size, size), torch.randint(1000, (40,)), torch.randint(11, (40,))
    whole = model(x, t, y)
    for batch in (1, 2, 3, 4, 5, 7, 8, 9, 16, 31):
        assert torch.equal(model(x[-batch:], t[-batch:], y[-batch:]), whole[-batch:]), batch


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sample_has_the_same_bits_in_any_batch(sampler, guidance, one_thread):
    model = awake(DiffuSSM(TINY, channels=4, num_classes=10)).freeze()

    def samples(indices: range) -> torch.Tensor:
        return generate(
            model, Schedule.linear().respace(5), (4, 8, 8), indices, [i % 10 for i in indices], num_classes=10,
            sampler=sampler, guidance=guidance, seed=1, device=torch.device("cpu"),
        )  # fmt: skip

    whole = samples(range(20))
    assert whole.isfinite().all()
    for batch in (1, 3, 8, 16):
        parts = [samples(range(start, min(start + batch, 20))) for start in range(0, 20, batch)]
        assert torch.equal(torch.cat(parts), whole), batch


@torch.no_grad()
def test_what_a_frozen_model_keeps_changes_no_bit():
    model = awake(DiffuSSM(TINY, channels=4, num_classes=10)).eval()
    frozen = copy.deepcopy(model).freeze()
    for size in (8, 8, 6, 8):  # 64 or 36 positions an image, of more than 2D: mix and W_down are multiplied in both
        x, t, y = torch.randn(3, 4, size, size), torch.tensor([3, 500, 0]), torch.tensor([1, 2, 10])
        for block in model.blocks:
            block.ssm._kept = None  # its kernel is generated
        assert torch.equal(frozen(x, t, y), model(x, t, y))


@torch.no_grad()
def test_a_frozen_model_of_few_positions_agrees_with_the_factors():
    model = awake(DiffuSSM(ModelConfig("custom", 64, 2, 2, 8), channels=4, num_classes=10)).eval()
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([500])
    expected = model(x, t)
    frozen = model.freeze().freeze()  # again changes nothing
    assert relative_error(frozen(x, t), expected.double()) < 1e-5


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (ModelConfig("XXL"), "XL, custom"),
        (ModelConfig("custom"), "model.width"),
        (ModelConfig("custom", 30, 2), "multiple of 4"),
        (ModelConfig("XL", width=128), "model.preset custom"),
        (ModelConfig("S", hourglass=5), "model.hourglass 5"),
        (ModelConfig("S", state=7), "model.state 7"),
    ],
)
def test_impossible_sizes_are_refused(config, names):
    with pytest.raises(UserError, match=names):
        config.resolved()
