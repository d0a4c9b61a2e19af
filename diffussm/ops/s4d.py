"""S4D, bidirectional: parameters and a signal in, a signal out, by whichever backend is faster on this machine.

Shapes: B batch · L length · D channels · N conjugate pairs of states (half the state size) · 2 directions (causal,
anti-causal). S4D: Gu et al., arXiv 2206.11893. The recurrence is sensitive and FFTs have no bf16: whatever goes in and
comes out, the arithmetic is fp32, and the modes are made in double precision (kernel.py).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from diffussm.ops import chunked, fft
from diffussm.ops.kernel import Modes, S4DParameters, discretize, exact_fp32

log = logging.getLogger(__name__)

Backend = Literal["auto", "fft", "chunked"]
Layout = Literal["BLD", "DBL"]


class Convolution(NamedTuple):
    """A backend: (u, modes) → y, and (u, modes, dL/dy) → dL/du, dL/dmodes; channels first, each of them pure."""

    forward: Callable[[Tensor, Modes], Tensor]
    backward: Callable[[Tensor, Modes, Tensor], tuple[Tensor, Modes]]


BACKENDS = {
    "fft": Convolution(fft.convolve, fft.convolve_backward),
    "chunked": Convolution(chunked.convolve, chunked.convolve_backward),
}
_fastest: dict[tuple, str] = {}  # of what `auto` has timed in this process


def s4d(
    u: Tensor,
    parameters: S4DParameters,
    *,
    layout: Layout = "BLD",
    backend: Backend = "auto",
    spectrum: Tensor | None = None,
) -> Tensor:
    """y = K_causal * u + K_anticausal * reversed u + skip ∘ u, each channel with its own kernels.

    Args:
        u: [B, L, D]; or with layout DBL, [D, B, L], where the positions may fill more than one axis. Any floating
            dtype and any strides.
        parameters: of the state space; the result is differentiable by them and by u.
        layout: which axis holds the channels. Channels first is the faster: the convolutions run along the positions.
        backend: `auto` times both on the first call with a shape, and keeps the faster.
        spectrum: of the kernel, from :func:`kernel_spectrum` with these parameters and this length: the kernel is not
            generated. Not differentiable.

    Returns:
        y like u, in its dtype and strides.

    Raises:
        ValueError: a gradient would be lost: ``spectrum`` where u or a parameter asks for one.
    """
    u_DBL = u.permute(2, 0, 1) if layout == "BLD" else u
    if spectrum is None:
        y_DBL = _S4D.apply(fastest_backend(u_DBL, parameters) if backend == "auto" else backend, u_DBL, *parameters)
    elif _wants_gradients(u_DBL, parameters):
        raise ValueError("s4d has no gradient with a spectrum at hand: leave it out, or call under torch.no_grad()")
    else:
        y_DBL = fft.convolve_with_spectrum(u_DBL, spectrum)
    return y_DBL.permute(1, 2, 0) if layout == "BLD" else y_DBL


class _S4D(torch.autograd.Function):
    """Saves the input and the parameters alone; the backward computes everything else again."""

    @staticmethod
    def forward(ctx, backend: str, u_DBL: Tensor, *parameters: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(u_DBL, *parameters)
        with exact_fp32(u_DBL.device):
            return BACKENDS[backend].forward(u_DBL, discretize(S4DParameters(*parameters)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_DBL: Tensor) -> tuple[Tensor | None, ...]:
        u_DBL, *parameters = ctx.saved_tensors
        with exact_fp32(u_DBL.device):
            with torch.enable_grad():
                parameters = S4DParameters(*(parameter.detach().requires_grad_() for parameter in parameters))
                modes = discretize(parameters)
            values = Modes(*(mode.detach() for mode in modes))
            grad_u_DBL, grad_modes = BACKENDS[ctx.backend].backward(u_DBL, values, grad_DBL)
            return None, grad_u_DBL, *torch.autograd.grad(modes, parameters, grad_modes)


def kernel_spectrum(parameters: S4DParameters, length: int) -> Tensor:
    """What :func:`s4d` takes as ``spectrum``: [D, L + 1] complex64, of no gradient."""
    with torch.no_grad(), exact_fp32(parameters.skip.device):
        return fft.kernel_spectrum(discretize(parameters), length)


def _wants_gradients(u_DBL: Tensor, parameters: S4DParameters) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (u_DBL, *parameters))


def fastest_backend(u_DBL: Tensor, parameters: S4DParameters) -> str:
    """The backend that is faster on this shape: forward, and backward where gradients are asked for. Timed once."""
    training = _wants_gradients(u_DBL, parameters)
    key = (u_DBL.device, u_DBL.dtype, u_DBL.shape, u_DBL.stride(), parameters.A_imag.shape, training)
    if key not in _fastest:
        seconds = {name: _time(name, u_DBL, parameters, training) for name in BACKENDS}
        _fastest[key] = min(seconds, key=seconds.__getitem__)
        log.info(
            "S4D on %s, %s %s, %s: %s (%s)",
            u_DBL.device,
            str(u_DBL.dtype).removeprefix("torch."),
            "×".join(map(str, u_DBL.shape)),
            "forward and backward" if training else "forward",
            _fastest[key],
            ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items()),
        )
    return _fastest[key]


def _time(backend: str, u_DBL: Tensor, parameters: S4DParameters, training: bool) -> float:
    """Median seconds of three runs, after one to warm up."""
    inputs = [tensor.detach().requires_grad_(training) for tensor in (u_DBL, *parameters)]
    seconds = []
    # A caller's hooks, such as a checkpoint's, which counts what is saved, are not to see what the timing saves.
    with torch.set_grad_enabled(training), saved_tensors_hooks(lambda t: t, lambda t: t):
        for _ in range(4):
            start = time.perf_counter()
            y_DBL = _S4D.apply(backend, *inputs)
            if training:
                torch.autograd.grad(y_DBL, inputs, torch.ones_like(y_DBL))
            if u_DBL.device.type == "cuda":
                torch.cuda.synchronize(u_DBL.device)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
