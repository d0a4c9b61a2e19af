"""Every backend against the float64 recurrence, and its gradients against autograd through it."""

import logging
import random

import pytest
import torch
from reference_s4d import random_parameters, recurrence, relative_error

from diffussm.ops import chunked, fft, s4d
from diffussm.ops.kernel import S4DParameters, discretize, exact_fp32, powers, two_sided_kernel
from diffussm.ops.s4d import kernel_spectrum

pytestmark = pytest.mark.unit

BACKENDS = ["fft", "chunked"]
NAMES = ("u", "log_dt", "log_A_real", "A_imag", "C", "skip")


def parameters(width: int, pairs: int, seed: int = 0) -> S4DParameters:
    return S4DParameters(*random_parameters(width, pairs, seed))


def gradients(function, inputs, target):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    (function(inputs[0], S4DParameters(*inputs[1:])) * target).sum().backward()
    return [tensor.grad for tensor in inputs]


@pytest.mark.parametrize("backend", [*BACKENDS, "cached"])
@pytest.mark.parametrize(
    ("batch", "length", "width", "pairs"),
    [(2, 1, 3, 2), (1, 2, 3, 2), (2, 3, 5, 4), (1, 17, 6, 8), (3, 100, 7, 8), (2, 1024, 6, 32), (1, 4096, 4, 32)],
)
def test_equals_the_recurrence(backend, batch, length, width, pairs):
    p, u = parameters(width, pairs), torch.randn(batch, length, width)
    if backend == "cached":
        y = s4d.s4d(u, p, spectrum=kernel_spectrum(p, length))
    else:
        y = s4d.s4d(u, p, backend=backend)
    assert relative_error(y, recurrence(u, p)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("batch", "length", "width", "pairs"),
    [
        (2, 1, 3, 4),
        (2, 13, 3, 4),
        (1, 64, 3, 4),
        (2, 200, 5, 8),
        (2, 1024, 2, 32),
        (1, 4096, 2, 32),
    ],
)
def test_gradients_equal_autograd_through_the_recurrence(backend, batch, length, width, pairs):
    u, target = torch.randn(2, batch, length, width)
    inputs = [u, *parameters(width, pairs)]
    ours = gradients(lambda u, p: s4d.s4d(u, p, backend=backend), inputs, target)
    truth = gradients(recurrence, [tensor.double() for tensor in inputs], target.double())
    for name, mine, true in zip(NAMES, ours, truth, strict=True):
        assert relative_error(mine, true) < 2e-6, name


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes_layouts_and_dtypes(seed, monkeypatch):
    """Small blocks, so that most shapes are no multiple of them."""
    rng = random.Random(seed)
    monkeypatch.setattr(fft, "BLOCK_BYTES", {"cpu": rng.choice([1, 1 << 12, 1 << 20])})
    monkeypatch.setattr(chunked, "BLOCK_BYTES", {"cpu": rng.choice([1, 1 << 14, 1 << 24])})
    batch, length, width, pairs = rng.randint(1, 5), rng.randint(1, 150), rng.randint(1, 40), rng.randint(1, 9)
    p = parameters(width, pairs, seed)
    u, target = torch.randn(2, batch, length, width)
    hourglass = next(m for m in (3, 2, 1) if length % m == 0)
    truth = recurrence(u, p)
    grads = gradients(recurrence, [tensor.double() for tensor in (u, *p)], target.double())
    for backend in BACKENDS:

        def channels_first(u, p, backend=backend):
            """As the block calls it: piece k of position j of [M, D, B, J] is position jM + k."""
            pieces = u.unflatten(1, (-1, hourglass)).permute(2, 3, 0, 1).contiguous()
            y = s4d.s4d(pieces.permute(1, 2, 3, 0), p, layout="DBL", backend=backend)
            assert y.permute(3, 0, 1, 2).is_contiguous()
            return y.permute(1, 2, 3, 0).flatten(1, 2)

        def channels_last(u, p, backend=backend):
            return s4d.s4d(u, p, backend=backend)

        for function in (channels_first, channels_last):
            assert relative_error(function(u, p), truth) < 1e-6
            for name, mine, true in zip(NAMES, gradients(function, [u, *p], target), grads, strict=True):
                assert relative_error(mine, true) < 2e-5, (backend, function, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 6e-4), (torch.float64, 1e-6)])
def test_any_dtype_in_is_the_dtype_out(backend, dtype, bound):
    p, u = parameters(6, 8), torch.randn(2, 256, 6)
    inputs = u.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = s4d.s4d(inputs, p, backend=backend)
    assert y.dtype == dtype
    assert relative_error(y, recurrence(u, p)) < bound
    (grad,) = torch.autograd.grad(y.float().square().sum(), inputs)
    assert grad.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("log_dt", [-12.0, -7.0, 0.0, 4.0])
@pytest.mark.parametrize("frequency", [0.0, 1.0, 1e3, 1e6])
def test_extreme_parameters_stay_exact(backend, log_dt, frequency):
    """Steps from e^-12 to e^4, frequencies up to 5e7 radians a step, decays from 1e-8 a step to all at once."""
    p = parameters(4, 3)
    p.log_dt.fill_(log_dt)
    p.log_A_real.copy_(torch.tensor([-7.0, 0.0, 5.0]).expand(2, 4, 3))
    p.A_imag.copy_(frequency * torch.randn(2, 4, 3))
    u, target = torch.randn(2, 1, 500, 4)
    y = s4d.s4d(u, p, backend=backend)
    assert relative_error(y, recurrence(u, p)) < 3e-6
    ours = gradients(lambda u, p: s4d.s4d(u, p, backend=backend), [u, *p], target)
    truth = gradients(recurrence, [tensor.double() for tensor in (u, *p)], target.double())
    for name, mine, true in zip(NAMES, ours, truth, strict=True):
        assert mine.isfinite().all(), name
        assert relative_error(mine, true) < 2e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_inside_autocast_is_as_exact(backend):
    inputs, target = [torch.randn(2, 60, 3), *parameters(3, 4)], torch.randn(2, 60, 3)
    plain = gradients(lambda u, p: s4d.s4d(u, p, backend=backend), inputs, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, gradients(lambda u, p: s4d.s4d(u, p, backend=backend), inputs, target), plain))


def test_convolution_is_the_sum_over_both_sides():
    length, u = 5, torch.randn(2, 5, 3, dtype=torch.float64)
    modes = discretize(parameters(3, 2))
    kernel = two_sided_kernel(modes, length)
    expected = torch.zeros_like(u)
    for to in range(length):
        for start in range(length):
            expected[:, to] += kernel[:, (to - start) % (2 * length)] * u[:, start]
    for backend in s4d.BACKENDS.values():
        assert torch.allclose(backend.forward(u.permute(2, 0, 1), modes).permute(1, 2, 0), expected, atol=1e-6)


def test_powers_and_their_gradient():
    log_base = torch.complex(-torch.rand(3, 4), torch.randn(3, 4)).to(torch.complex128).requires_grad_()
    truth = torch.exp(log_base * torch.arange(11).view(11, 1, 1))
    table = powers(log_base, 11)
    weights = torch.randn_like(truth)
    assert relative_error(torch.view_as_real(table), torch.view_as_real(truth)) < 3e-7
    (mine,) = torch.autograd.grad((table * weights).sum().real, log_base)
    (true,) = torch.autograd.grad((truth * weights).sum().real, log_base)
    assert relative_error(torch.view_as_real(mine), torch.view_as_real(true)) < 1e-6


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_works_inside_a_checkpoint(backend, monkeypatch):
    monkeypatch.setattr(s4d, "_fastest", {})  # the checkpoint's forward times both backends, its second pass does not
    inputs, target = [torch.randn(2, 20, 3), *parameters(3, 4)], torch.randn(2, 20, 3)

    def checkpointed(u, p):
        return torch.utils.checkpoint.checkpoint(s4d.s4d, u, p, backend=backend, use_reentrant=False)

    mine = gradients(checkpointed, inputs, target)
    plain = gradients(lambda u, p: s4d.s4d(u, p, backend=backend), inputs, target)  # auto: what was chosen above
    assert all(map(torch.equal, mine, plain))


@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_its_input_and_the_parameters_alone(backend):
    p = S4DParameters(*(tensor.requires_grad_() for tensor in parameters(8, 4)))
    u, saved = torch.randn(8, 2, 300, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        s4d.s4d(u, p, layout="DBL", backend=backend)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (u, *p)}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_product_has_fewer_bits_than_fp32(device):
    """The settings, which need no GPU; what they do to products needs one."""
    matmul = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        allowed = matmul.fp32_precision
        assert allowed == "tf32"
        with exact_fp32(torch.device(device)):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == allowed
        with pytest.raises(KeyError), exact_fp32(torch.device(device)):
            raise KeyError
        assert matmul.fp32_precision == allowed
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_passes_ask_for_exact_products(backend, monkeypatch):
    seen = []

    def watched(function):
        return lambda *args: seen.append(torch.backends.mkldnn.matmul.fp32_precision) or function(*args)

    monkeypatch.setitem(s4d.BACKENDS, backend, s4d.Convolution(*map(watched, s4d.BACKENDS[backend])))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        gradients(lambda u, p: s4d.s4d(u, p, backend=backend), [torch.randn(1, 9, 2), *parameters(2, 2)], 1.0)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee", "ieee"]


def test_a_spectrum_loses_no_gradient():
    p, u = parameters(3, 4), torch.randn(2, 20, 3)
    spectrum = kernel_spectrum(p, 20)
    with pytest.raises(ValueError, match="no gradient"):
        s4d.s4d(u.requires_grad_(), p, spectrum=spectrum)
    with pytest.raises(ValueError, match="no gradient"):
        s4d.s4d(u.detach(), p._replace(C=p.C.clone().requires_grad_()), spectrum=spectrum)
    with torch.no_grad():
        s4d.s4d(u, p, spectrum=spectrum)


def test_auto_times_each_shape_once_and_keeps_the_faster(monkeypatch, caplog):
    monkeypatch.setattr(s4d, "_fastest", {})
    calls = []
    delays = {"fft": 0.02, "chunked": 0.0}

    def slowed(name):
        def convolve(u, modes):
            calls.append(name)
            s4d.time.sleep(delays[name])
            return fft.convolve(u, modes)

        return s4d.Convolution(convolve, fft.convolve_backward)

    monkeypatch.setattr(s4d, "BACKENDS", {name: slowed(name) for name in delays})
    p, u = parameters(3, 4), torch.randn(2, 20, 3)
    with caplog.at_level(logging.INFO):
        s4d.s4d(u, p)
    assert set(calls) == {"fft", "chunked"} and calls[-1] == "chunked"
    assert "chunked (fft" in caplog.text and "forward" in caplog.text
    calls.clear()
    s4d.s4d(u, p)
    assert calls == ["chunked"]
    s4d.s4d(u[:1], p)  # another shape
    s4d.s4d(u[:1].requires_grad_(), p)  # and with a backward
    assert calls.count("fft") >= 4
