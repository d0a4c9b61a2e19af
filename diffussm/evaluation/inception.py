"""The Inception network of 2015, whose features published FIDs are of, as ADM's evaluator runs it.

It is Inception-v3 (Szegedy et al., arXiv 1512.00567) with three peculiarities of TensorFlow's inception-2015-12-05:
1008 logits, average pools that leave padding out of the count, and a maximum where the last block should pool averages.
Its weights are taken from the file that pytorch-fid and torch-fidelity both publish, and so are the layers' names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from diffussm.errors import UserError
from diffussm.evaluation.features import BATCH_ON_GPU, Features, extracting
from diffussm.files import atomic_path, sha256_of

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
TIMEOUT = 30  # seconds without an answer

IMAGE_SIZE = 299
SPATIAL_CHANNELS = 7
BATCH_NORM_EPSILON = 1e-3

# Chains of layers, each after the one before. A comma parts layers of the same input, a bar whole chains of it; their
# outputs are stacked as channels, in this order.
STEM = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 halve Conv2d_3b_1x1 Conv2d_4a_3x3 halve"
A = "branch1x1 | branch5x5_1 branch5x5_2 | branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 | average branch_pool"
B = "branch3x3 | branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 | halve"
C = (
    "branch1x1 | branch7x7_1 branch7x7_2 branch7x7_3"
    " | branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5 | average branch_pool"
)
D = "branch3x3_1 branch3x3_2 | branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4 | halve"
E = (
    "branch1x1 | branch3x3_1 branch3x3_2a,branch3x3_2b"
    " | branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a,branch3x3dbl_3b | average branch_pool"
)
TO_SPATIAL = {"Mixed_5b": A, "Mixed_5c": A, "Mixed_5d": A, "Mixed_6a": B, "Mixed_6b": C, "Mixed_6c": C, "Mixed_6d": C}
TO_POOL = {"Mixed_6e": C, "Mixed_7a": D, "Mixed_7b": E, "Mixed_7c": E.replace("average", "maximum")}
HALVING = {  # convolutions of stride 2
    "Conv2d_1a_3x3",
    "Mixed_6a.branch3x3",
    "Mixed_6a.branch3x3dbl_3",
    "Mixed_7a.branch3x3_2",
    "Mixed_7a.branch7x7x3_4",
}
UNPADDED = HALVING | {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}  # the others keep height and width
POOLS = {
    "average": lambda x: functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: functional.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: functional.max_pool2d(x, 3, stride=2),
}


class Inception2015:
    """The network with the weights of :func:`load_weights`.

    Images are resized to 299×299 by :func:`resize`, scaled by (x - 128) / 128, and grey ones made to three channels.
    The spatial features are the first 7 channels of Mixed_6d, TensorFlow's mixed_6/conv, flattened channels last; the
    class probabilities leave out the bias.
    """

    name = "inception-2015"
    identity = f"{name} {WEIGHTS_SHA256[:8]}"  # no others are loaded
    pool_size = 2048
    spatial_size = 17 * 17 * SPATIAL_CHANNELS
    batch_size = 4
    device = torch.device("cpu")

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device = device) -> None:
        self._convolutions = {
            name: (kernel.to(device), bias.to(device)) for name, (kernel, bias) in _fuse_batch_norms(weights).items()
        }
        self._class_weight = weights["fc.weight"].to(device)  # [1008, 2048]
        if device.type != "cpu":
            self.device, self.batch_size = device, BATCH_ON_GPU

    def __call__(self, images: np.ndarray) -> Features:
        with extracting(self.device):
            x_NHWC = (resize(torch.from_numpy(images).to(self.device).float(), IMAGE_SIZE) - 128) / 128
            x_NCHW = x_NHWC.expand(-1, -1, -1, 3).contiguous().permute(0, 3, 1, 2)
            middle = self._blocks(TO_SPATIAL, self._chain(STEM, x_NCHW))
            pool = self._blocks(TO_POOL, middle).mean((2, 3))
            return Features(
                pool=pool.cpu(),
                spatial=middle[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).cpu(),
                probabilities=functional.linear(pool, self._class_weight).softmax(1).cpu(),
            )

    def _blocks(self, blocks: dict[str, str], x: Tensor) -> Tensor:
        for name, block in blocks.items():
            x = torch.cat([self._chain(chain, x, f"{name}.") for chain in block.split("|")], 1)
        return x

    def _chain(self, chain: str, x: Tensor, prefix: str = "") -> Tensor:
        for step in chain.split():
            if step in POOLS:
                x = POOLS[step](x)
            else:
                outputs = [self._convolve(prefix + name, x) for name in step.split(",")]
                x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return x

    def _convolve(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._convolutions[name]
        padding = "valid" if name in UNPADDED else "same"
        return functional.conv2d(x, weight, bias, stride=2 if name in HALVING else 1, padding=padding).relu_()


def resize(images: Tensor, size: int) -> Tensor:
    """Float32 images [N, H, W, C] to [N, size, size, C] as TensorFlow 1's ``resize_bilinear`` does by default.

    Output pixel i lies at i · in / out: the corners at the top left coincide, not the pixels' centres. It takes the two
    pixels beside it in each direction, so that shrinking leaves some out. In float32 and in TensorFlow's order, columns
    first, as the last bits depend on it.
    """
    for axis in (2, 1):
        length = images.shape[axis]
        position = torch.arange(size, dtype=torch.float32, device=images.device) * torch.tensor(
            length / size, dtype=torch.float32
        )
        lower = position.long()
        fraction = (position - lower).view(-1, *[1] * (3 - axis))
        before, after = images.index_select(axis, lower), images.index_select(axis, (lower + 1).clamp(max=length - 1))
        images = before + (after - before) * fraction
    return images


def load_weights(path: str | Path | None = None) -> dict[str, Tensor]:
    """The published weights, by layer: of a file, or else of the user's cache, into which they are downloaded once.

    Raises:
        UserError: the file is not that of the published weights, or it cannot be downloaded.
    """
    if path is None:
        path = _cached_weights()
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    _check_digest(path, str(path))
    return torch.load(path, map_location="cpu", weights_only=True)


def _cached_weights() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "diffussm" / WEIGHTS_URL.rpartition("/")[2]
    if not path.exists():
        try:
            _download(path)
        except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
            raise UserError(
                f"cannot download {WEIGHTS_URL} ({error}): "
                f"give the file with --inception-weights FILE, or score with --extractor efficientnet-lite0"
            ) from None
    return path


def _download(path: Path) -> None:
    with (
        urlopen(WEIGHTS_URL, timeout=TIMEOUT) as response,
        atomic_path(path) as temporary,
        open(temporary, "wb") as file,
        tqdm.wrapattr(response, "read", int(response.headers["Content-Length"] or 0) or None, desc=path.name) as source,
    ):
        shutil.copyfileobj(source, file)
        file.flush()
        _check_digest(temporary, WEIGHTS_URL)


def _check_digest(path: Path, source: str) -> None:
    digest = sha256_of(path)
    if digest != WEIGHTS_SHA256:
        raise UserError(
            f"{source} does not hold the weights of inception-2015-12-05: its sha256 begins with {digest[:8]}, not "
            f"{WEIGHTS_SHA256[:8]}; they are at {WEIGHTS_URL}"
        )


def _fuse_batch_norms(weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """By convolution, its kernel and bias with the batch norm after it folded in: the same function in fewer passes."""
    fused = {}
    for key in weights:
        name, found, _ = key.partition(".conv.weight")
        if found:
            gain, bias, mean, variance = (
                weights[f"{name}.bn.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gain / (variance + BATCH_NORM_EPSILON).sqrt()
            kernel = (weights[key].double() * scale[:, None, None, None]).float()
            fused[name] = kernel.contiguous(memory_format=torch.channels_last), (bias - mean * scale).float()
    return fused
