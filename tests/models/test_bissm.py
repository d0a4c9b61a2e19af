"""What evaluation keeps is never stale, and what training chooses is what it uses."""

import pytest
import torch
from reference_s4d import recurrence, relative_error

from diffussm.diffusion.generate import generate
from diffussm.diffusion.schedule import Schedule
from diffussm.models import s4d
from diffussm.models.diffussm import DiffuSSM, ModelConfig, choose_ssm_backend
from diffussm.models.s4d import BiSSM
from diffussm.ops import s4d as ops

pytestmark = pytest.mark.unit


@pytest.fixture
def generated(monkeypatch):
    """The lengths of the kernels that evaluation has generated."""
    lengths, generate = [], s4d.kernel_spectrum
    monkeypatch.setattr(s4d, "kernel_spectrum", lambda p, length: lengths.append(length) or generate(p, length))
    return lengths


def other_values(ssm):
    fresh = BiSSM(6, 8)
    with torch.no_grad():
        fresh.log_dt.add_(1)
    return fresh


@torch.no_grad()
def in_place(ssm):
    ssm.C[1, 3, 2, 0] += 1


def behind_autograd(ssm):
    ssm.log_A_real.data[0, 0, 0] = 3.0  # the version counter does not move


def through_a_flat_buffer(ssm):
    """As DeepSpeed holds parameters: views of one buffer, which is written as a whole."""
    flat = torch.cat([p.detach().flatten() for p in ssm.parameters()])
    start = 0
    for parameter in ssm.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    flat[-1] += 1  # of skip


def state_dict(ssm):
    ssm.load_state_dict(other_values(ssm).state_dict())


def swapped_average(ssm):
    for parameter, average in zip(ssm.parameters(), other_values(ssm).parameters(), strict=True):
        parameter.data, average.data = average.data, parameter.data


def optimizer_step(ssm):
    optimizer = torch.optim.AdamW(ssm.parameters(), lr=0.1)
    ssm(torch.randn(1, 20, 6)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change", [in_place, behind_autograd, through_a_flat_buffer, state_dict, swapped_average, optimizer_step]
)
def test_the_kept_spectrum_is_never_stale(change, generated):
    ssm = BiSSM(6, 8).eval()
    u = torch.randn(2, 20, 6)
    with torch.no_grad():
        before = ssm(u)
    change(ssm)
    with torch.no_grad():
        after = ssm(u)
        truth = recurrence(u, list(ssm.s4d_parameters()))
    assert relative_error(after, truth) < 1e-6 < relative_error(before, truth)
    assert generated == [20, 20]


def test_another_length_has_another_kernel(generated):
    ssm = BiSSM(6, 8).eval()
    with torch.no_grad():
        for length in (20, 20, 33, 33, 20):
            u = torch.randn(2, length, 6)
            assert relative_error(ssm(u), recurrence(u, list(ssm.s4d_parameters()))) < 1e-6
    assert generated == [20, 33, 20]


def test_gradients_in_eval_are_those_of_training():
    ssm = BiSSM(6, 8).eval()
    u = torch.randn(2, 20, 6)
    with torch.no_grad():
        ssm(u)
    ssm(u).square().sum().backward()
    in_eval = [p.grad for p in ssm.parameters()]
    ssm.zero_grad()
    ssm.train()(u).square().sum().backward()
    assert all(torch.equal(a, p.grad) and p.grad.any() for a, p in zip(in_eval, ssm.parameters(), strict=True))


@pytest.mark.parametrize("prepare", [DiffuSSM.eval, DiffuSSM.freeze])
def test_guided_sampling_generates_each_kernel_once(prepare, generated):
    model = prepare(DiffuSSM(ModelConfig("custom", 16, 3, 2, 8), channels=2, num_classes=4))
    generate(
        model, Schedule.linear(1000).respace(10), (2, 4, 4), range(3), [0, 1, 2], num_classes=4,
        sampler="ancestral", guidance=3.0, seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    assert generated == 3 * [16]


@pytest.fixture
def used(monkeypatch):
    """What the backends have been called with: (name, u)."""
    calls = []

    def watched(name, backend):
        return backend._replace(forward=lambda u, modes: calls.append((name, u)) or backend.forward(u, modes))

    backends = {name: watched(name, backend) for name, backend in ops.BACKENDS.items()}
    monkeypatch.setattr(ops, "BACKENDS", backends)
    monkeypatch.setattr(ops, "_fastest", {})
    return calls


def test_the_backend_that_is_set_is_the_one_that_trains(used):
    model = DiffuSSM(ModelConfig("custom", 16, 2, 2, 8), channels=2, num_classes=0)
    for backend in ("fft", "chunked"):
        model.set_ssm_backend(backend)
        model(torch.randn(1, 2, 4, 4), torch.tensor([3]))
    assert [name for name, _ in used] == ["fft", "fft", "chunked", "chunked"]


def test_the_fastest_backend_of_a_model_is_timed_on_its_shapes(used):
    backend = choose_ssm_backend(ModelConfig("custom", 16, 2, 2, 8), 3, 64, torch.bfloat16, torch.device("cpu"))
    assert backend in ops.BACKENDS
    assert {(name, u.shape, u.dtype) for name, u in used} == {
        (name, torch.Size([16, 3, 32, 2]), torch.bfloat16) for name in ops.BACKENDS
    }
