"""The Fréchet distance against the textbook's matrix square root, by SciPy, in time and in the last digits.

    python -m benchmarks.frechet --quick

Between moments, as of a published reference file, and 10,000 or 1,000 samples: of more or fewer than dimensions.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from benchmarks.common import Goal, Report, interleaved, make_parser
from diffussm.evaluation.frechet import Gaussian, Moments, frechet_distance

FASTER = 2.0  # than the textbook, at least
APART = 1e-6  # relatively, at most


def main() -> None:
    arguments = make_parser("frechet", __doc__.splitlines()[0]).parse_args()
    size = 512 if arguments.quick else 2048
    device = torch.device("cpu")
    report = Report("the textbook's time over ours", device)
    reference = Moments(size)
    reference.update(draw(10_000, size, seed=0))
    for name, count in (("more samples than dimensions", 10_000), ("fewer samples", size // 2)):
        samples = draw(count, size, seed=1)
        found: dict[str, float] = {}

        def ours(samples: Tensor = samples, found: dict[str, float] = found) -> None:
            of_reference = Gaussian.of_moments(reference.mean, reference.covariance)
            found["ours"] = frechet_distance(Gaussian.of_samples(samples), of_reference)

        def textbook(samples: Tensor = samples, found: dict[str, float] = found) -> None:
            found["textbook"] = by_matrix_square_root(samples, reference)

        seconds = interleaved({"ours": ours, "textbook": textbook}, rounds=3 if arguments.quick else 1, device=device)
        ratio = seconds["textbook"] / seconds["ours"]
        apart = abs(found["ours"] / found["textbook"] - 1)
        row = {"name": name, "ratio": ratio, "samples": count, "dimensions": size, "apart": apart}
        report.rows.append(row | {f"{key} s": value for key, value in seconds.items()})
        report.goals += [
            Goal(f"speed, {name}", ratio, FASTER),
            Goal(f"relative difference, {name}", apart, APART, at_most=True),
        ]
    report.finish(arguments.json)


def draw(count: int, size: int, seed: int) -> Tensor:
    """Float32 samples [count, size] whose variances fall as those of real features do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.logspace(0, -2, size)[:, None] / size**0.5
    return torch.randn(count, size, generator=generator) @ mix + 0.1 * torch.randn(size, generator=generator)


def by_matrix_square_root(samples: Tensor, reference: Moments) -> float:
    """As everybody writes it: NumPy's covariance, SciPy's root of the product."""
    values = samples.double().numpy()
    mean, covariance = values.mean(0), np.cov(values, rowvar=False)
    other_mean, other = reference.mean.numpy(), reference.covariance.numpy()
    root = scipy.linalg.sqrtm(covariance @ other)
    return float(((mean - other_mean) ** 2).sum() + np.trace(covariance + other) - 2 * np.trace(root).real)


if __name__ == "__main__":
    main()
