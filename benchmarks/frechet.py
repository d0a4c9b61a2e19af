"""The Fréchet distance against the textbook's matrix square root, by SciPy, in time and in the last digits.

    python -m benchmarks.frechet --quick

From moments such as a published reference file holds to other such moments, and to fewer samples than dimensions: 512
with --quick, else 2048.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from benchmarks.common import Goal, Report, interleaved, make_parser
from diffussm.evaluation.frechet import Gaussian, frechet_distance

FASTER = 2.0  # than the textbook, at least
APART = 1e-6  # relatively, at most


def main() -> None:
    arguments = make_parser("frechet", __doc__.splitlines()[0]).parse_args()
    size, rounds = (512, 3) if arguments.quick else (2048, 1)
    report = Report("the textbook's time over ours", torch.device("cpu"))
    reference, many = moments(draw(10_000, size, seed=0)), moments(draw(10_000, size, seed=1))
    few = draw(size // 2, size, seed=2)
    compare(
        report,
        "moments",
        lambda: frechet_distance(Gaussian.of_moments(*many), Gaussian.of_moments(*reference)),
        lambda: by_matrix_square_root(many, reference),
        rounds,
    )
    compare(
        report,
        "fewer samples than dimensions",
        lambda: frechet_distance(Gaussian.of_samples(few), Gaussian.of_moments(*reference)),
        lambda: by_matrix_square_root(moments(few), reference),
        rounds,
    )
    report.finish(arguments.json)


def compare(report: Report, name: str, ours: Callable[[], float], textbook: Callable[[], float], rounds: int) -> None:
    """Time both, and compare what they find."""
    found: dict[str, float] = {}

    def keeping(key: str, function: Callable[[], float]) -> Callable[[], None]:
        return lambda: found.update({key: function()})

    candidates = {"ours": keeping("ours", ours), "textbook": keeping("textbook", textbook)}
    seconds = interleaved(candidates, rounds, report.device, name)
    ratio, apart = seconds["textbook"] / seconds["ours"], abs(found["ours"] / found["textbook"] - 1)
    report.rows.append({"name": name, "ratio": ratio} | {f"{key} s": value for key, value in seconds.items()})
    report.goals += [
        Goal(f"{name}: times as fast", ratio, FASTER),
        Goal(f"{name}: relative difference", apart, APART, at_most=True),
    ]


def draw(count: int, size: int, seed: int) -> Tensor:
    """Float32 samples [count, size] whose variances fall as those of real features do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.logspace(0, -2, size)[:, None] / size**0.5
    return torch.randn(count, size, generator=generator) @ mix + 0.1 * torch.randn(size, generator=generator)


def moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance."""
    found = Gaussian.of_samples(samples)
    return found.mean, found.covariance


def by_matrix_square_root(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Between means and covariances, as everybody writes it."""
    root = scipy.linalg.sqrtm((a[1] @ b[1]).numpy())
    return float((a[0] - b[0]).square().sum() + (a[1] + b[1]).trace()) - 2 * float(np.trace(root).real)


if __name__ == "__main__":
    main()
