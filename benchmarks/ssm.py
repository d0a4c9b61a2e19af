"""The state space layer against the textbook's S4D (benchmarks/textbook.py): time, and peak memory.

    python -m benchmarks.ssm                       every shape, about 10 minutes on 2 cores
    python -m benchmarks.ssm --quick               one shape, and the memory of another
    python -m benchmarks.ssm --profile             and what kinds of operators ours spends its time on

forward             without gradients; both make their kernels from the parameters
forward+backward    with the gradients of the input and of every parameter
cached              our forward with the kernel's spectrum at hand, as sampling has it, against the textbook's forward,
                    which makes its kernels each time
peak memory         of forward+backward, each in a fresh process, beyond inputs and parameters

Without the pointwise mix of the channels, which both would share. State size 64; fp32; the textbook takes [B, D, L],
ours [D, B, L], as the block hands it over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.common import (
    Goal,
    Report,
    add_device_option,
    in_fresh_process,
    interleaved,
    make_parser,
    peak_memory,
    profile_shares,
    say,
    with_gradients,
    without_gradients,
)
from benchmarks.textbook import textbook_s4d
from diffussm.errors import run_command
from diffussm.models.s4d import BiSSM
from diffussm.ops.kernel import S4DParameters
from diffussm.ops.s4d import kernel_spectrum, s4d

STATE = 64
SHAPES = [(2, 384, 1024), (1, 1152, 1024), (8, 1152, 1024), (1, 1152, 4096), (1, 384, 16384)]  # B, D, L
PROMISED = (1, 1152, 1024)  # the shape of the goals for time, and of a quick run
MEMORY_SHAPE = (1, 1152, 4096)
GOALS = {"forward+backward": 30, "forward": 60, "cached": 200}  # times faster, at PROMISED
MEMORY_GOAL = 0.1  # of the textbook's, at MEMORY_SHAPE


def main() -> None:
    parser = make_parser("ssm", "Time and memory of the state space layer against the textbook's S4D.")
    parser.add_argument("--profile", action="store_true", help="also tell what ours spends its time on")
    add_device_option(parser)
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    report = Report("the textbook's S4D ÷ ours, in wall time and in peak memory", device)
    for shape in [PROMISED] if quick else SHAPES:
        report.rows += time_rows(shape, device, rounds=2 if quick else 5)
    for shape in [MEMORY_SHAPE] if quick else SHAPES:
        report.rows.append(memory_row(shape, device))
    ratios = {row["name"]: row["ratio"] for row in report.rows}
    for measure, goal in GOALS.items():
        name = f"{measure} {PROMISED}"
        report.goals.append(Goal(name, ratios[name], goal))
    name = f"peak memory {MEMORY_SHAPE}"
    report.goals.append(Goal(f"{name}, ours ÷ textbook's", 1 / ratios[name], MEMORY_GOAL, at_most=True))
    if arguments.profile:
        for name, function in our_measures(PROMISED, device).items():
            report.rows.append({"name": f"profile of {name} {PROMISED}", **profile_shares(function, device)})
    report.finish(arguments.json)


def time_rows(shape: tuple[int, int, int], device: torch.device, rounds: int) -> list[dict]:
    """A row for each measure."""
    say(f"ssm {shape}")
    textbook, ours = textbook_measures(shape, device), our_measures(shape, device)
    seconds: dict[str, float] = {}
    for measures in (("forward", "cached"), ("forward+backward",)):
        candidates = {f"textbook {measure}": textbook[measure] for measure in measures if measure in textbook}
        candidates |= {f"ours {measure}": ours[measure] for measure in measures}
        seconds |= interleaved(candidates, rounds, device, f"{shape} {', '.join(measures)}")
    seconds["textbook cached"] = seconds["textbook forward"]
    return [
        {
            "name": f"{measure} {shape}",
            "ratio": seconds[f"textbook {measure}"] / seconds[f"ours {measure}"],
            "textbook_ms": 1e3 * seconds[f"textbook {measure}"],
            "ours_ms": 1e3 * seconds[f"ours {measure}"],
        }
        for measure in ("forward", "forward+backward", "cached")
    ]


def memory_row(shape: tuple[int, int, int], device: torch.device) -> dict:
    say(f"ssm {shape}: memory")
    textbook = in_fresh_process(peak_of_training, "textbook", shape, device)
    ours = in_fresh_process(peak_of_training, "ours", shape, device)
    return {
        "name": f"peak memory {shape}",
        "ratio": textbook / ours,
        "textbook_MB": textbook / 1e6,
        "ours_MB": ours / 1e6,
    }


def peak_of_training(implementation: str, shape: tuple[int, int, int], device: torch.device) -> int:
    """Bytes at the peak of forward+backward."""
    if implementation == "textbook":
        textbook_measures((1, 8, 32), device)["forward+backward"]()  # loads libraries, starts threads
        return peak_memory(textbook_measures(shape, device)["forward+backward"], device)
    train = our_measures(shape, device)["forward+backward"]
    train()  # chooses the backend by timing both, which is no part of a step
    return peak_memory(train, device)


def textbook_measures(shape: tuple[int, int, int], device: torch.device) -> dict[str, Callable[[], object]]:
    batch, width, length = shape
    parameters = random_parameters(width, device)
    u_BDL = torch.randn(batch, width, length, device=device, requires_grad=True)
    return {
        "forward": without_gradients(lambda: textbook_s4d(u_BDL, *parameters)),
        "forward+backward": with_gradients(lambda: textbook_s4d(u_BDL, *parameters), (u_BDL, *parameters)),
    }


def our_measures(shape: tuple[int, int, int], device: torch.device) -> dict[str, Callable[[], object]]:
    batch, width, length = shape
    parameters = random_parameters(width, device)
    u_DBL = torch.randn(width, batch, length, device=device, requires_grad=True)
    spectrum = kernel_spectrum(parameters, length)
    return {
        "forward": without_gradients(lambda: s4d(u_DBL, parameters, layout="DBL")),
        "forward+backward": with_gradients(lambda: s4d(u_DBL, parameters, layout="DBL"), (u_DBL, *parameters)),
        "cached": without_gradients(lambda: s4d(u_DBL, parameters, layout="DBL", spectrum=spectrum)),
    }


def random_parameters(width: int, device: torch.device) -> S4DParameters:
    """As the network initialises them."""
    return BiSSM(width, STATE).to(device).s4d_parameters()


if __name__ == "__main__":
    run_command(main)
