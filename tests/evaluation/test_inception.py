"""The 2015 Inception graph against a published port of it, layer by layer, and where its weights come from."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffussm.commands.eval_fid import main
from diffussm.errors import UserError
from diffussm.evaluation import inception as module
from diffussm.evaluation.extractors import make_extractor
from diffussm.evaluation.inception import Inception2015, load_weights, resize
from diffussm.files import sha256_of

pytestmark = pytest.mark.unit

# What torch-fidelity 0.4.0's FeatureExtractorInceptionV3 makes of edges() with seeded_weights(): by convolution the
# shape of its kernel and the figures() of its output after batch norm and ReLU; of the features, every 97th number;
# of the resized images [N, H, W, C] every 9973th.
PORT = json.loads(Path(__file__).with_name("inception_port.json").read_text())
TENSORFLOW = json.loads(Path(__file__).with_name("tensorflow_resize.json").read_text())


def edges() -> np.ndarray:
    """uint8 [2, 40, 52, 3]: patches of colour."""
    n, y, x, c = np.ogrid[:2, :40, :52, :3]
    return ((37 * (y // 5) + 59 * (x // 4) * (1 + y // 8) + 101 * c + 71 * n) % 256).astype(np.uint8)


def seeded_weights(kernels: dict[str, list[int]]) -> dict[str, Tensor]:
    """A file's content for convolutions of these shapes, at random; activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {}
    for name, shape in sorted(kernels.items()):
        weights[f"{name}.conv.weight"] = draw(*shape) * math.sqrt(2 / math.prod(shape[1:]))
        weights[f"{name}.bn.weight"] = 1 + 0.1 * draw(shape[0])
        weights[f"{name}.bn.bias"] = 0.1 * draw(shape[0])
        weights[f"{name}.bn.running_mean"] = 0.1 * draw(shape[0])
        weights[f"{name}.bn.running_var"] = 1 + 0.5 * torch.rand(shape[0], generator=generator)
    weights["fc.weight"] = 0.1 * draw(1008, 2048)
    weights["fc.bias"] = draw(1008)
    return weights


def figures(output: Tensor) -> list[float]:
    """Root mean squares over the channels [N, C, H, W]: at a corner, in the midst, at the other corner, and of all."""
    squares = output.double().square().mean(1)
    height, width = squares.shape[1:]
    pixels = squares[0, 0, 0], squares[0, height // 3, width // 2], squares[1, -1, -1], squares.mean()
    return [value.sqrt().item() for value in pixels]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return seeded_weights({name: layer["kernel"] for name, layer in PORT["layers"].items()})


@pytest.fixture(scope="module")
def network(weights: dict[str, Tensor]) -> Inception2015:
    return Inception2015(weights)


class Recorder(Inception2015):
    """Keeps the figures of every convolution's output."""

    def _convolve(self, name: str, x: Tensor) -> Tensor:
        output = super()._convolve(name, x)
        self.found[name] = figures(output)
        return output


def test_every_layer_computes_what_the_port_does(weights: dict[str, Tensor]) -> None:
    recorder = Recorder(weights)
    recorder.found = {}
    features = recorder(edges())
    assert recorder.found.keys() == PORT["layers"].keys()
    for name, layer in PORT["layers"].items():
        assert recorder.found[name] == pytest.approx(layer["figures"], rel=2e-5), name
    for name, shape in {"pool": (2, 2048), "spatial": (2, 2023), "probabilities": (2, 1008)}.items():
        found, expected = getattr(features, name), torch.tensor(PORT["features"][name])
        assert found.shape == shape and found.dtype == torch.float32
        torch.testing.assert_close(found.flatten()[::97], expected, rtol=2e-5, atol=2e-5 * expected.max().item())


def test_features_depend_on_the_image_alone(network: Inception2015) -> None:
    """Whatever images come with it."""
    images = np.concatenate([edges(), 255 - edges()])
    together, alone = network(images), network(images[:1])
    assert torch.equal(together.pool[0], alone.pool[0]) and torch.equal(together.spatial[0], alone.spatial[0])
    torch.testing.assert_close(together.probabilities[0], alone.probabilities[0], rtol=1e-5, atol=0)
    assert (together.pool[0] - together.pool[2]).abs().max() > 0.01


def test_grey_is_three_equal_channels(network: Inception2015) -> None:
    grey = edges()[:1, ..., :1]
    assert torch.equal(network(grey).pool, network(grey.repeat(3, axis=3)).pool)


def by_the_formula(images: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's bilinear resizing as documented, pixel by pixel in float64."""
    n, height, width, channels = images.shape
    out = np.empty((n, size, size, channels))
    for row in range(size):
        for column in range(size):
            y, x = row * height / size, column * width / size
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = images[:, top, left] * (left + 1 - x) + images[:, top, right] * (x - left)
            below = images[:, bottom, left] * (left + 1 - x) + images[:, bottom, right] * (x - left)
            out[:, row, column] = above * (top + 1 - y) + below * (y - top)
    return out


@pytest.mark.parametrize("case", ["edges", "noise"])  # enlarged, and shrunk
def test_resizes_as_tensorflow_does_to_the_last_bit(case: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, 512, 384, 3)).astype(np.uint8)
    images = {"edges": edges(), "noise": noise}[case]
    found = resize(torch.from_numpy(images).float(), 299)
    assert torch.equal(found.flatten()[::9973], torch.tensor(TENSORFLOW[case]))


def test_resizes_as_the_port_does_to_the_last_bit() -> None:
    found = resize(torch.from_numpy(edges()).float(), 299)
    assert torch.equal(found.flatten()[::9973], torch.tensor(PORT["resized"]))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 70), (30, 30), (64, 47), (1, 5)])
def test_resizes_by_tensorflows_formula(height: int, width: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.float32)
    found = resize(torch.from_numpy(images), 30)
    np.testing.assert_allclose(found, by_the_formula(images.astype(np.float64), 30), atol=5e-3)  # float32 positions


def test_resizing_keeps_the_corner_at_the_top_left() -> None:
    """By hand; with half-pixel centres [0, 10] would become 0, 2.5, 7.5, 10, and averaging alter what shrinks."""
    line = torch.tensor([0.0, 10.0]).reshape(1, 1, 2, 1)
    assert resize(line, 4)[0, 0, :, 0].tolist() == [0, 5, 10, 10]
    assert resize(torch.arange(8.0).reshape(1, 1, 8, 1) ** 2, 2)[0, 0, :, 0].tolist() == [0, 16]
    assert resize(torch.arange(3.0).reshape(1, 3, 1, 1) ** 2, 2)[0, :, 0, 0].tolist() == [0, 2.5]


def test_the_command_scores_by_a_published_reference_file(
    weights: dict[str, Tensor],
    network: Inception2015,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(weights, "weights.pth")
    monkeypatch.setattr(module, "WEIGHTS_SHA256", sha256_of("weights.pth"))
    samples = np.concatenate([edges(), 255 - edges(), edges()[:, ::-1]])
    np.savez("samples.npz", samples)
    moments = {"mu": np.ones(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": 4 * np.eye(2023)}
    np.savez("reference.npz", edges()[:, :, ::-1].repeat(2, axis=0), **moments)
    command = "eval_fid samples.npz --reference reference.npz --inception-weights weights.pth --json report.json"
    monkeypatch.setattr(sys, "argv", command.split())
    main()
    report = json.loads(Path("report.json").read_text())
    assert report["extractor"] == "inception-2015"
    features = network(samples)
    row = report["rows"][0]
    for metric, values, mean, scale in (("FID", features.pool, 1, 1), ("sFID", features.spatial, 0, 2)):
        # The reference's covariance is scale² times the identity, so that the root of the product is scale times Σ^½.
        values = values.double().numpy()
        stds = np.linalg.svd(values - values.mean(0), compute_uv=False) / math.sqrt(len(values) - 1)
        expected = ((values.mean(0) - mean) ** 2).sum() + (stds**2).sum() + scale**2 * values.shape[1]
        assert row[f"{metric} (inception-2015)"] == pytest.approx(expected - 2 * scale * stds.sum(), rel=1e-6)
    assert row["images"] == 6 and row["IS (inception-2015)"] > 1 and row["recall (inception-2015)"] is not None


@pytest.fixture
def weights_file(tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as the published one, at the address of the published one; and an empty cache."""
    path = tmp_path / "server" / "weights.pth"
    path.parent.mkdir()
    torch.save({name: weights[name] for name in ("fc.weight", "fc.bias")}, path)
    monkeypatch.setattr(module, "WEIGHTS_SHA256", sha256_of(path))
    monkeypatch.setattr(module, "WEIGHTS_URL", path.as_uri())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def test_weights_of_a_file(weights_file: Path, weights: dict[str, Tensor]) -> None:
    found = load_weights(weights_file)
    assert torch.equal(found["fc.weight"], weights["fc.weight"])


def test_weights_are_downloaded_once(weights_file: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    assert torch.equal(load_weights()["fc.bias"], weights["fc.bias"])
    cached = tmp_path / "cache/diffussm/weights.pth"
    assert list(cached.parent.iterdir()) == [cached]
    weights_file.unlink()
    assert torch.equal(load_weights()["fc.bias"], weights["fc.bias"])


def test_other_weights_are_refused(weights_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({}, other)
    digest = sha256_of(other)[:8]
    with pytest.raises(UserError, match=rf"^{other} does not hold the weights .* begins with {digest}, not"):
        make_extractor("inception-2015", other)
    with pytest.raises(UserError, match=r"^there is no file .*absent\.pth$"):
        make_extractor("inception-2015", tmp_path / "absent.pth")
    weights_file.write_bytes(b"an error page")
    with pytest.raises(UserError, match=r"^file:.*weights.pth does not hold the weights"):
        make_extractor("inception-2015")
    assert list((tmp_path / "cache/diffussm").iterdir()) == []


def test_weights_of_another_extractor(weights_file: Path) -> None:
    with pytest.raises(UserError, match="--inception-weights are not those of the extractor efficientnet-lite0"):
        make_extractor("efficientnet-lite0", weights_file)


def test_without_a_network(weights_file: Path) -> None:
    weights_file.unlink()
    with pytest.raises(UserError, match=r"^cannot download file:.*--inception-weights FILE.* efficientnet-lite0$"):
        make_extractor("inception-2015")


def test_the_published_file() -> None:
    """PyTorch puts the first digits of a file's sha256 into its name."""
    assert module.WEIGHTS_URL.endswith(f"-{module.WEIGHTS_SHA256[:8]}.pth") and len(module.WEIGHTS_SHA256) == 64
