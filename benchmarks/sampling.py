"""Sampling: images/s of the frozen model, against the same one that keeps nothing and against its products alone.

    python -m benchmarks.sampling                  batches of 1 and 8, with guidance too, about 5 minutes on 2 cores
    python -m benchmarks.sampling --quick          a batch of 1

The network has XL's width and 2 of its 29 blocks, at 256 px (L 1024), and is sampled from as `tools/sample.py` does, by
`generate`: DDIM, without guidance and with it.

nothing kept      the same weights, with the kernel of every state space layer generated anew, and the mix multiplied
                  into W_down or applied, in each call
products alone    what the matrix products that the frozen model executes would take at the rate of one large square
                  GEMM of the same precision, which takes its turns with it

The steps of a sample are alike, so one tells images/s of 250: they are given for the whole XL model, by its depth over
ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.block import GEMM_SIZE, autocast, executed_flops, gemm
from benchmarks.common import Goal, Report, add_device_option, interleaved, make_parser, say
from diffussm.diffusion.generate import generate
from diffussm.diffusion.schedule import Schedule
from diffussm.errors import run_command
from diffussm.models.diffussm import PRESETS, DiffuSSM, ModelConfig
from diffussm.training.hardware import multiplies_bf16

LATENT, CLASSES = (4, 32, 32), 1000
WIDTH, XL_DEPTH = PRESETS["XL"]
DEPTH = 2
STEPS, PAPER_STEPS = 1, 250
FASTER, SHARE = 1.3, 0.7  # goals: times the model that keeps nothing, and of the rate of its products alone


class Case(NamedTuple):
    """What is sampled. Guidance, whose model sees twice the batch, has no goals of its own."""

    batch: int
    guidance: float
    precision: str

    def __str__(self) -> str:
        return f"B {self.batch} {self.precision}" + (f", guidance {self.guidance:g}" if self.guidance != 1 else "")


def main() -> None:
    parser = make_parser("sampling", "Images a second of the frozen model, against one that keeps nothing.")
    add_device_option(parser)
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    report = Report("images/s ÷ those of the model that keeps nothing", device)
    for precision in ("fp32", "bf16"):
        why = ""
        if precision == "bf16" and not multiplies_bf16(device):
            why = "no bf16 instructions here"
        for batch in (1, 8):
            reason = why or ("left out by --quick" if quick and batch > 1 else "")
            for guidance in (1.0,) if quick or reason else (1.0, 4.0):
                case = Case(batch, guidance, precision)
                row = None if reason else time_case(case, device, rounds=3 if quick else 5)
                report.rows += [row] if row else []
                if guidance == 1:
                    report.goals += goals(case, row, reason)
    report.finish(arguments.json)


def goals(case: Case, row: dict | None, why: str) -> list[Goal]:
    return [
        Goal(f"images/s ÷ nothing kept, {case}", row and row["ratio"], FASTER, note=why),
        Goal(f"share of the rate of products alone, {case}", row and row["share_of_products"], SHARE, note=why),
    ]


def time_case(case: Case, device: torch.device, rounds: int) -> dict:
    say(f"sampling {case}")
    model = DiffuSSM(ModelConfig("custom", WIDTH, DEPTH), LATENT[0], CLASSES).to(device).eval()
    frozen = copy.deepcopy(model).freeze()
    candidates = {"frozen": sampling(frozen, case, device), "nothing kept": sampling(Forgetful(model), case, device)}
    with autocast(case.precision, device):
        flops = executed_flops(candidates["frozen"])
        turns = candidates | {"GEMM": gemm(case.precision, device)}
        seconds = interleaved(turns, rounds, device, str(case))
    products = flops * seconds["GEMM"] / (2 * GEMM_SIZE[device.type] ** 3)
    calls = PAPER_STEPS / STEPS * XL_DEPTH / DEPTH
    return {
        "name": f"images/s, {case}",
        "ratio": seconds["nothing kept"] / seconds["frozen"],
        "share_of_products": products / seconds["frozen"],
        "ms_a_step": 1e3 * seconds["frozen"] / STEPS,
        "products_ms": 1e3 * products / STEPS,
        "nothing_kept_ms": 1e3 * seconds["nothing kept"] / STEPS,
        f"XL_images/s_of_{PAPER_STEPS}_steps": case.batch / (seconds["frozen"] * calls),
    }


class Forgetful:
    """A model each of whose calls generates its kernels."""

    def __init__(self, model: DiffuSSM) -> None:
        self.model = model

    def __call__(self, *inputs: Tensor) -> Tensor:
        for block in self.model.blocks:
            block.ssm._kept = None
        return self.model(*inputs)


def sampling(model: Callable[..., Tensor], case: Case, device: torch.device) -> Callable[[], Tensor]:
    schedule = Schedule.linear().respace(STEPS)
    indices = range(case.batch)
    return lambda: generate(
        model, schedule, LATENT, indices, indices, num_classes=CLASSES, sampler="ddim", guidance=case.guidance, seed=0,
        device=device,
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
