"""All figures together: what they rank, and references as images and as files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from diffussm.data.workers import Alone
from diffussm.errors import UserError
from diffussm.evaluation import reference as reference_module
from diffussm.evaluation.efficientnet import EfficientNetLite0
from diffussm.evaluation.frechet import Gaussian, frechet_distance
from diffussm.evaluation.reference import Reference, read_reference
from diffussm.evaluation.score import bootstrap_distances, interval, score
from diffussm.evaluation.scoring import Scoring
from diffussm.evaluation.summary import Measured, Summary, measure_stream

pytestmark = pytest.mark.unit

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz")


def scored(real: Path, samples: Path, extractor, **options: object) -> dict:
    """The row of a whole evaluation by one process."""
    scoring = Scoring(extractor, Alone(), samples.parent / "scoring" / "samples.npz", None, **options)
    scoring.compare_with(real, None)
    scoring.add("samples", samples)
    (row,) = scoring.run()
    assert row.pop("name") == "samples"
    scoring.remove()
    assert not (samples.parent / "scoring").exists()
    return row


def write(real: Path, target: Path, extractor) -> None:
    Scoring(extractor, Alone(), target.parent / "scoring" / target.name, None).write_reference(real, None, target)


@pytest.fixture
def files(tmp_path: Path, images: np.ndarray) -> tuple[Path, Path]:
    real, samples = tmp_path / "real.npz", tmp_path / "samples.npz"
    np.savez(real, images[:50])
    np.savez(samples, images[50:] // 2)
    return real, samples


def test_figures_are_those_of_the_definitions(files, images: np.ndarray, block_means) -> None:
    row = scored(*files, block_means)
    assert list(row) == [
        *(f"{metric} (block-means)" for metric in ("FID", "sFID", "IS", "precision", "recall")),
        "images",
    ]
    assert row["images"] == 40
    real, samples = block_means(images[:50]), block_means(images[50:] // 2)
    for metric, kind in ("FID", "pool"), ("sFID", "spatial"):
        expected = frechet_distance(*(Gaussian.of_samples(getattr(f, kind)) for f in (real, samples)))
        assert row[f"{metric} (block-means)"] == pytest.approx(expected, rel=1e-6) and expected > 1
    assert row["FID (block-means)"] != row["sFID (block-means)"]


def test_a_reference_file_gives_the_figures_of_its_images(
    files, tmp_path: Path, block_means, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, samples = files
    expected = scored(real, samples, block_means)
    write(real, tmp_path / "reference.npz", block_means)
    assert not (tmp_path / "scoring").exists()
    with np.load(tmp_path / "reference.npz", allow_pickle=False) as written:
        arrays = dict(written)
    pool = np.stack([block_means(image[None]).pool[0].numpy() for image in np.load(real)["arr_0"]]).astype(np.float64)
    np.testing.assert_allclose(arrays["mu"], pool.mean(0), rtol=1e-6)
    np.testing.assert_allclose(arrays["sigma"], np.cov(pool, rowvar=False), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(arrays["arr_0"], np.load(real)["arr_0"])
    assert scored(tmp_path / "reference.npz", samples, block_means) == pytest.approx(expected, rel=1e-6)
    # As ADM publishes them: without the features of arr_0; and without arr_0.
    for name in ("features", "extractor", "count"):
        arrays.pop(name)
    np.savez(tmp_path / "published.npz", **arrays)
    assert scored(tmp_path / "published.npz", samples, block_means) == pytest.approx(expected, rel=1e-6)
    arrays.pop("arr_0")
    np.savez(tmp_path / "moments.npz", **arrays)
    row = scored(tmp_path / "moments.npz", samples, block_means)
    assert row["precision (block-means)"] is None and row["recall (block-means)"] is None
    assert row["FID (block-means)"] == pytest.approx(expected["FID (block-means)"], rel=1e-6)


def test_a_reference_keeps_some_images_and_counts_all(
    tmp_path: Path, images: np.ndarray, block_means, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffussm.evaluation.scoring.MAX_REFERENCE", 20)
    monkeypatch.setattr(reference_module, "IMAGES_AT_ONCE", 7)
    np.savez(tmp_path / "real.npz", images)
    target = tmp_path / "reference.npz"
    write(tmp_path / "real.npz", target, block_means)
    with np.load(target, allow_pickle=False) as written:
        assert written["count"] == 90 and written["arr_0"].shape == (20, 20, 24, 3)
        np.testing.assert_allclose(written["features"], block_means(written["arr_0"]).pool, rtol=1e-6)
        np.testing.assert_allclose(written["mu"], block_means(images).pool.double().mean(0), rtol=1e-6)
    reference, missing = read_reference(target, block_means)
    assert reference.count == 90 and len(reference.features) == 20 and missing is None


def moments_file(path: Path, size: int, spatial: int, **more: object) -> Path:
    moments = {"mu": np.zeros(size), "sigma": np.eye(size), "mu_s": np.zeros(spatial), "sigma_s": np.eye(spatial)}
    np.savez(path, **moments | more)
    return path


@pytest.mark.parametrize(
    ("size", "spatial", "owner", "way_out"),
    [
        (2048, 2023, None, "--extractor inception-2015"),
        (17, 4, None, "another"),
        (16, 4, "efficientnet-lite0", "--extractor efficientnet-lite0"),
    ],
)
def test_statistics_of_another_extractor(
    size: int, spatial: int, owner: str | None, way_out: str, tmp_path: Path, block_means
) -> None:
    more = {"extractor": np.array(owner)} if owner else {}
    path = moments_file(tmp_path / "r.npz", size, spatial, **more)
    with pytest.raises(UserError, match=f"holds statistics of {size} and {spatial} .*block-means.*{way_out}"):
        read_reference(path, block_means)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sigma": -np.eye(16)}, "a covariance has the eigenvalue -1"),
        ({"sigma": np.triu(np.ones((16, 16)))}, "a covariance is not symmetric"),
        ({"sigma_s": np.eye(5)}, r"a mean of \(4,\) does not go with a covariance of \(5, 5\)"),
        ({"count": np.array([1, 2])}, "count is not a number"),
        ({"mu": np.full(16, np.inf)}, "mu is not an array of finite"),
        ({"extractor": np.array("\x1b[2J")}, r"'\\x1b\[2J', which this version does not have"),
    ],
)
def test_statistics_that_are_none(changes: dict, problem: str, tmp_path: Path, block_means) -> None:
    path = moments_file(tmp_path / "r.npz", 16, 4, **changes)
    with pytest.raises(UserError, match=rf"r\.npz.*{problem}"):
        read_reference(path, block_means)


def test_a_figure_that_is_not_finite(files, tmp_path: Path, block_means) -> None:
    with pytest.raises(UserError, match="a figure is not finite"):
        scored(moments_file(tmp_path / "r.npz", 16, 4, mu=np.full(16, 1e200)), files[1], block_means)


def test_features_are_kept_only_where_something_needs_them(files, tmp_path: Path, block_means, monkeypatch) -> None:
    kept = []
    monkeypatch.setattr("diffussm.evaluation.scoring.score", lambda measured, *_: kept.append(len(measured.features)))
    moments = moments_file(tmp_path / "moments.npz", 16, 4)
    for real, options in ((moments, {}), (moments, {"bootstrap": 20}), (files[0], {})):
        with pytest.raises(TypeError):  # it was to return figures
            scored(real, files[1], block_means, **options)
    assert kept == [0, 40, 40]
    assert len(measure_stream([np.zeros((50, 20, 24, 3), np.uint8)], block_means, keep=False).features) == 0


def test_what_is_damaged_or_too_small_is_told_before_anything_is_measured(files, tmp_path: Path, block_means) -> None:
    real, samples = files
    content = bytearray(samples.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(content)
    np.savez(tmp_path / "three.npz", np.load(samples)["arr_0"][:3])
    block_means.__class__.__call__, before = None, block_means.__class__.__call__
    try:
        for name, problem in ("flipped.npz", "arr_0 is damaged"), ("three.npz", "at least 4 images in each set, got 3"):
            with pytest.raises(UserError, match=problem):
                scored(real, tmp_path / name, block_means)
    finally:
        block_means.__class__.__call__ = before
    assert not (tmp_path / "scoring").exists()


def test_an_evaluation_is_by_one_launch_at_a_time(files, tmp_path: Path, block_means) -> None:
    real, samples = files

    def scoring(name: str) -> Scoring:
        made = Scoring(block_means, Alone(), tmp_path / "scoring" / name, None)
        made.compare_with(real, None)
        made.add("samples", samples)
        return made

    first = scoring("samples.npz")
    expected = first.run()
    with pytest.raises(UserError, match=r"scoring/samples\.npz is in use by process"):
        scoring("samples.npz").run()
    other = scoring("other.npz")  # with the same reference
    assert other.run() == expected
    other.remove()
    first.remove()
    assert not (tmp_path / "scoring").exists()


def test_a_folder_is_measured_anew_where_its_images_are_drawn_anew(tmp_path: Path, images, block_means) -> None:
    """They are as long as before; an earlier launch has ended before all were compared."""
    folder = tmp_path / "samples"
    folder.mkdir()
    np.savez(tmp_path / "real.npz", images[:50])

    def run(pixels: np.ndarray) -> list[dict]:
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{number:02}.bmp")
        scoring = Scoring(block_means, Alone(), tmp_path / "scoring" / "samples", None)
        scoring.compare_with(tmp_path / "real.npz", None)
        scoring.add("samples", folder)
        rows = scoring.run()
        scoring._lock.close()
        return rows

    first = run(images[50:])
    assert run(images[50:] // 3) != first
    assert run(images[50:]) == first


def test_features_that_are_not_finite(images: np.ndarray, block_means) -> None:
    features = block_means(images)
    features.pool[3, 1] = np.nan
    with pytest.raises(UserError, match="features of images 10 to 99 are not finite"):
        Summary(block_means).update(10, features)


def test_ones_and_zeros_are_no_images(images: np.ndarray, block_means) -> None:
    with pytest.raises(UserError, match="samples: the images hold nothing but 0 and 1"):
        measure_stream([images // 255, images // 255], block_means).check("samples")


def test_a_stream_gives_the_figures_of_a_file(files, images: np.ndarray, block_means) -> None:
    real, samples = files
    expected = scored(real, samples, block_means)
    reference = Reference.of(measure_stream([images[:50]], block_means))
    measured = measure_stream(np.array_split(images[50:] // 2, 3), block_means)
    assert score(measured, reference, block_means) == pytest.approx(expected, rel=1e-6)


def test_the_bootstrap_tells_how_figures_of_other_images_would_spread() -> None:
    """Against the spread of 300 sets that are truly drawn anew."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(count, 6, generator=generator) * torch.linspace(0.5, 2, 6) + 0.3

    reference = Gaussian.of_moments(torch.zeros(6), torch.eye(6))
    true = torch.tensor([frechet_distance(Gaussian.of_samples(draw(400)), reference) for _ in range(300)])
    widths, hits = [], 0
    for _ in range(20):
        samples = draw(400)
        distance = frechet_distance(Gaussian.of_samples(samples), reference)
        low, high = interval(distance, list(bootstrap_distances(samples, reference, 200, samples.device)))
        assert low < distance < high
        widths.append(high - low)
        hits += low < true.mean() < high
    expected = (true.quantile(0.975) - true.quantile(0.025)).item()
    assert np.mean(widths) == pytest.approx(expected, rel=0.15)
    assert hits >= 16  # of 20 that hold what they tell of with probability 0.95


def test_an_interval_on_request(files, block_means) -> None:
    row = scored(*files, block_means, bootstrap=20)
    low, high = row["FID 95% (block-means)"]
    assert 0 <= low < row["FID (block-means)"] < high


def test_two_sets_of_one_name(files, block_means) -> None:
    scoring = Scoring(block_means, Alone(), files[0].parent / "scoring", None)
    scoring.add("samples", files[0])
    with pytest.raises(UserError, match="two sets are called samples"):
        scoring.add("samples", files[1])


@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_ranks_real_above_blurred_above_noise(efficientnet: EfficientNetLite0) -> None:
    pixels = np.frombuffer(gzip.decompress(FASHION_MNIST.read_bytes()), np.uint8, 120 * 28 * 28, offset=16)
    reference, real = pixels.reshape(2, 60, 28, 28, 1).copy()
    blurred = gaussian_filter(real, (0, 1, 1, 0))
    noise = np.random.default_rng(0).integers(0, 256, real.shape, dtype=np.uint8)

    def measure(images: np.ndarray) -> Measured:
        return measure_stream([images], efficientnet)

    prepared = Reference.of(measure(reference))
    rows = [score(measure(images), prepared, efficientnet) for images in (real, blurred, noise)]
    fid, sfid, inception, precision, recall = (
        [row[f"{metric} (efficientnet-lite0)"] for row in rows]
        for metric in ("FID", "sFID", "IS", "precision", "recall")
    )
    assert fid[0] < 0.7 * fid[1] < 0.5 * fid[2]
    assert sfid[0] < 0.6 * sfid[2]
    assert inception[0] > inception[1] > inception[2]
    assert precision[0] > 0.5 and precision[0] > precision[1] > precision[2] == 0
    assert recall[0] > 0.5 and recall[0] > 2 * recall[1] >= recall[2] == 0
