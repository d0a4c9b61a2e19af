"""The DiffuSSM block against a DiT block of the same width (diffusers'), and its share of the machine's GEMM peak.

    python -m benchmarks.block                     L = 1024, 4096 and 16384, about 8 minutes on 2 cores
    python -m benchmarks.block --quick             one image of L = 1024
    python -m benchmarks.block --profile           and what kinds of operators ours spends its time on

L is the positions of the latent: what DiffuSSM's state space layer and a DiT of patch 1 see; a DiT of patch
2 has L/4 tokens, and so less to do, at less detail. Both blocks are given the embedding of timestep and class.

forward              without gradients; ours with the cached spectrum of its kernel, as in sampling
forward+backward     with the gradients of input, condition and weights, as in training
share of GEMM peak   the rate of the block's matrix products (those that it executes, over the whole time of a forward
                     pass) ÷ that of one large square GEMM of the same precision that takes its turns with it

fp32, and bf16 by autocast where the hardware multiplies bf16. D is 1152 (XL); at L 16384 it is 384, where attention
over 1152 channels would take a CPU most of a minute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    Goal,
    Report,
    add_device_option,
    interleaved,
    make_parser,
    profile_shares,
    say,
    with_gradients,
    without_gradients,
)
from diffussm.errors import run_command
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.training.hardware import multiplies_bf16


class Case(NamedTuple):
    """A size, and what is promised there.

    Attributes:
        batch: images.
        length: L.
        width: D, of both blocks.
        heads: of DiT's attention.
        training: least ratio of forward+backward to DiT of patch 1.
    """

    batch: int
    length: int
    width: int
    heads: int
    training: float


CASES = [Case(1, 1024, 1152, 16, 2), Case(8, 1024, 1152, 16, 2), Case(1, 4096, 1152, 16, 3), Case(1, 16384, 384, 6, 10)]
SHARES = {"fp32": 0.9, "bf16": 0.8}  # of GEMM peak, least, for the XL block's forward
XL_WIDTH = 1152
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = make_parser("block", "Time of the DiffuSSM block against a DiT block's, and its share of GEMM peak.")
    parser.add_argument("--profile", action="store_true", help="also tell what ours spends its time on")
    add_device_option(parser)
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    report = Report("time of the DiT block ÷ time of the DiffuSSM block", device)
    has_bf16 = multiplies_bf16(device)
    if not has_bf16:
        report.notes.append("no bf16: this processor has no instructions for it, and emulates it many times slower")
    for case in CASES:
        for precision in DTYPES:
            if precision == "bf16" and not has_bf16:
                report.goals += goals(case, precision, why="no bf16 instructions here")
            elif quick and case is not CASES[0]:
                report.goals += goals(case, precision, why="left out by --quick")
            else:
                rows = time_blocks(case, precision, device, rounds=5)
                report.rows += rows
                report.goals += goals(case, precision, rows)
                if arguments.profile:
                    report.rows += profile_rows(case, precision, device)
    report.finish(arguments.json)


def time_blocks(case: Case, precision: str, device: torch.device, rounds: int) -> list[dict]:
    """A row for each ratio, and one for the share of GEMM peak."""
    label = describe(case, precision)
    say(f"block {label}")
    ours = our_passes(case, precision, device)
    dit = {patch: dit_passes(case, patch, precision, device) for patch in (1, 2)}

    def candidates(measure: str) -> dict[str, Callable[[], object]]:
        return {"ours": ours[measure]} | {f"patch {patch}": passes[measure] for patch, passes in dit.items()}

    with autocast(precision, device):
        turns = candidates("forward") | {"GEMM": gemm(precision, device)}
        forward = interleaved(turns, rounds, device, f"forward {label}")
    training = interleaved(candidates("forward+backward"), rounds, device, f"forward+backward {label}")
    rows = [
        {
            "name": f"{measure} {label}, patch {patch}",
            "ratio": seconds[f"patch {patch}"] / seconds["ours"],
            "dit_ms": 1e3 * seconds[f"patch {patch}"],
            "ours_ms": 1e3 * seconds["ours"],
        }
        for measure, seconds in (("forward", forward), ("forward+backward", training))
        for patch in dit
    ]
    flops = executed_flops(ours["forward"])
    rate, peak = flops / forward["ours"], 2 * GEMM_SIZE[device.type] ** 3 / forward["GEMM"]
    shown = {"share": rate / peak, "ours_GFLOP/s": rate / 1e9, "peak_GFLOP/s": peak / 1e9, "GFLOP": flops / 1e9}
    return [*rows, {"name": f"share of GEMM peak, forward {label}", **shown}]


def goals(case: Case, precision: str, rows: list[dict] | None = None, why: str = "") -> list[Goal]:
    """What is promised for a case, with the values that ``rows`` hold; without rows, why they could not be had."""
    values = {row["name"]: row.get("ratio", row.get("share")) for row in rows or []}
    promised = {f"forward+backward {describe(case, precision)}, patch 1": case.training}
    if case.width == XL_WIDTH:
        promised[f"share of GEMM peak, forward {describe(case, precision)}"] = SHARES[precision]
    return [Goal(name, values.get(name), goal, note=why) for name, goal in promised.items()]


def describe(case: Case, precision: str) -> str:
    return f"B {case.batch} L {case.length} D {case.width} {precision}"


def executed_flops(forward: Callable[[], object]) -> int:
    """Of the matrix products in a forward pass. FFTs and elementwise operations count as nothing."""
    forward()  # generates the kernel, which is cached
    with FlopCounterMode(display=False) as counted:
        forward()
    return counted.get_total_flops()


def our_passes(case: Case, precision: str, device: torch.device) -> dict[str, Callable[[], object]]:
    network = DiffuSSM(ModelConfig("custom", case.width, depth=1), channels=4, num_classes=0)
    block = network.blocks[0].to(device)
    return passes(block, (case.batch, case.length // network.size.hourglass, case.width), precision, device)


def dit_passes(case: Case, patch: int, precision: str, device: torch.device) -> dict[str, Callable[[], object]]:
    network = DiTTransformer2DModel(case.heads, case.width // case.heads, num_layers=1, sample_size=8)
    block = DiTBlock(network.transformer_blocks[0]).to(device)
    return passes(block, (case.batch, case.length // patch**2, case.width), precision, device)


class DiTBlock(nn.Module):
    """diffusers' block, given the condition. It embeds timestep and class anew in every block, which DiT does once."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.block.norm1.emb = Given()

    def forward(self, x_BLD: Tensor, condition_BD: Tensor) -> Tensor:
        return self.block(x_BLD, timestep=condition_BD)


class Given(nn.Module):
    """Stands where the condition is embedded: it is embedded already."""

    def forward(self, condition_BD: Tensor, class_labels: None, hidden_dtype: torch.dtype) -> Tensor:
        return condition_BD


def passes(
    block: nn.Module, shape: tuple[int, int, int], precision: str, device: torch.device
) -> dict[str, Callable[[], object]]:
    """forward in evaluation mode and forward+backward in training mode, over tokens [B, L, D]."""
    x_BLD = torch.randn(shape, device=device, requires_grad=True)
    condition_BD = torch.randn(shape[0], shape[2], device=device, requires_grad=True)
    evaluated, trained = copy.deepcopy(block).eval(), block.train()

    def forward(block: nn.Module) -> Tensor:
        with autocast(precision, device):
            return block(x_BLD, condition_BD)

    return {
        "forward": without_gradients(lambda: forward(evaluated)),
        "forward+backward": with_gradients(lambda: forward(trained), (x_BLD, condition_BD, *trained.parameters())),
    }


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Weights are cast once while the outermost is open: over all of sampling, but at each step of training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def gemm(precision: str, device: torch.device) -> Callable[[], object]:
    """A matrix product as large as the processor likes them."""
    size = GEMM_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=DTYPES[precision])
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def profile_rows(case: Case, precision: str, device: torch.device) -> list[dict]:
    """Shares of our time by kind of operator."""
    ours = our_passes(case, precision, device)
    with autocast(precision, device):
        shares = {"forward": profile_shares(ours["forward"], device)}
    shares["forward+backward"] = profile_shares(ours["forward+backward"], device)
    return [{"name": f"profile of {name} {describe(case, precision)}", **kinds} for name, kinds in shares.items()]


if __name__ == "__main__":
    run_command(main)
