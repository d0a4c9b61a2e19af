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
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from diffussm.ops import fft
from diffussm.ops.chunked import chunked_convolution
from diffussm.ops.fft import convolve_with_spectrum, fft_convolution
from diffussm.ops.kernel import Modes, S4DParameters, discretize

log = logging.getLogger(__name__)

BACKENDS: dict[str, Callable[[Tensor, Modes], Tensor]] = {"fft": fft_convolution, "chunked": chunked_convolution}
_fastest: dict[tuple, str] = {}  # of what `auto` has timed in this process


def s4d(
    u: Tensor,
    parameters: S4DParameters,
    *,
    layout: Literal["BLD", "DBL"] = "BLD",
    backend: Literal["auto", "fft", "chunked"] = "auto",
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
            generated, and the result not differentiable.

    Returns:
        y like u, in its dtype and strides.
    """
    u_DBL = u.permute(2, 0, 1) if layout == "BLD" else u
    with torch.autocast(u.device.type, enabled=False):
        if spectrum is not None:
            y_DBL = convolve_with_spectrum(u_DBL, spectrum)
        else:
            modes = discretize(parameters)
            y_DBL = BACKENDS[fastest_backend(u_DBL, modes) if backend == "auto" else backend](u_DBL, modes)
    return y_DBL.permute(1, 2, 0) if layout == "BLD" else y_DBL


def kernel_spectrum(parameters: S4DParameters, length: int) -> Tensor:
    """What :func:`s4d` takes as ``spectrum``: [D, L + 1] complex64, of no gradient."""
    with torch.no_grad(), torch.autocast(parameters.skip.device.type, enabled=False):
        return fft.kernel_spectrum(discretize(parameters), length)


def fastest_backend(u_DBL: Tensor, modes: Modes) -> str:
    """The backend that is faster on this shape: forward, and backward where gradients are asked for. Timed once."""
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (u_DBL, *modes))
    key = (u_DBL.device, u_DBL.dtype, tuple(u_DBL.shape), u_DBL.stride(), modes.W.shape[-1], training)
    if key not in _fastest:
        seconds = {name: _time(convolve, u_DBL, modes, training) for name, convolve in BACKENDS.items()}
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


def _time(convolve: Callable[[Tensor, Modes], Tensor], u_DBL: Tensor, modes: Modes, training: bool) -> float:
    """Median seconds of three runs, after one to warm up."""
    inputs = [tensor.detach().requires_grad_(training) for tensor in (u_DBL, *modes)]
    seconds = []
    # A caller's hooks, such as a checkpoint's, which counts what is saved, are not to see what the timing saves.
    with torch.set_grad_enabled(training), saved_tensors_hooks(lambda t: t, lambda t: t):
        for _ in range(4):
            start = time.perf_counter()
            y_DBL = convolve(inputs[0], Modes(*inputs[1:]))
            if training:
                torch.autograd.grad(y_DBL, inputs, torch.ones_like(y_DBL))
            if u_DBL.device.type == "cuda":
                torch.cuda.synchronize(u_DBL.device)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
