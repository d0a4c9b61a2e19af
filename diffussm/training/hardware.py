"""What the hardware can do: whether it multiplies bf16, and its peak rate, against which MFU is told."""

from __future__ import annotations

import time

import torch

GPU_PEAKS = {"V100": 125e12, "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # dense 16-bit FLOP/s


def multiplies_bf16(device: torch.device) -> bool:
    """True where bf16 matmuls are faster than fp32; a CPU without bf16 instructions is up to 100× slower in bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one rank: the data sheet's for a known GPU, else what a square matmul reaches now (tens of ms)."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for model, peak in GPU_PEAKS.items():
            if model in name:
                return peak
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
