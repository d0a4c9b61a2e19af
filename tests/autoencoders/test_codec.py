from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from diffussm.autoencoders.codec import codec_from_spec
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.errors import UserError

pytestmark = pytest.mark.unit


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def normalised(codec: PixelCodec, moments: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ((torch.from_numpy(moments).double() - codec.shift) * codec.scale).to(dtype)


@pytest.mark.parametrize(
    ("codec", "latent_shape"),
    [
        (PixelCodec(28, 28, 1), (4, 16, 16)),
        (PixelCodec(32, 32, 3), (12, 16, 16)),
        (PixelCodec(5, 8, 3, size=10), (12, 5, 5)),
    ],
)
def test_round_trip_is_exact(codec: PixelCodec, latent_shape: tuple[int, int, int]) -> None:
    images = random_images(7, codec.height, codec.width, codec.channels)
    images[0] = np.resize(np.arange(256), images[0].shape)
    moments = codec.encode(images)
    assert moments.dtype == np.uint8 and moments.shape == (7, *latent_shape) == (7, *codec.latent_shape)
    latents = normalised(codec, moments)
    assert latents.min() >= -1 and latents.max() <= 1
    np.testing.assert_array_equal(codec.decode(latents), images)
    np.testing.assert_array_equal(codec.decode(normalised(codec, moments, torch.float64)), images)


def test_every_value_survives() -> None:
    codec = PixelCodec(16, 16, 1, size=16)
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(codec.decode(normalised(codec, codec.encode(images))), images)


def test_layout_is_a_centred_image_through_pixel_unshuffle() -> None:
    images = random_images(2, 28, 28, 3)
    padded = functional.pad(torch.from_numpy(images).permute(0, 3, 1, 2), (2, 2, 2, 2))
    expected = functional.pixel_unshuffle(padded, 2)
    np.testing.assert_array_equal(PixelCodec(28, 28, 3).encode(images), expected.numpy())


def test_decode_rounds_to_nearest_and_clamps() -> None:
    codec = PixelCodec(2, 2, 1, size=2)
    values = torch.tensor([-1.5, (100.4 - 127.5) / 127.5, (100.6 - 127.5) / 127.5, 1.2])
    assert codec.decode(values.view(1, 4, 1, 1)).ravel().tolist() == [0, 100, 101, 255]
    assert codec.decode(values.view(1, 4, 1, 1).bfloat16()).ravel().tolist() == [0, 100, 101, 255]
    assert codec.decode(values.view(1, 4, 1, 1), "down").ravel().tolist() == [0, 100, 100, 255]


def test_spec_makes_the_same_codec() -> None:
    codec = PixelCodec(28, 28, 1)
    assert codec_from_spec(json.loads(json.dumps(codec.spec()))) == codec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "jpeg"}, "unknown codec 'jpeg'"),
        ({}, "unknown codec None"),
        ({"name": ["pixel"]}, "unknown codec"),
        ({"name": "pixel", "height": 28}, "does not take the configuration"),
        ({"name": "pixel", "height": 28, "width": 28, "channels": 1, "depth": 2}, "does not take the configuration"),
        ({"name": "pixel", "height": 28, "width": 28, "channels": 0}, "whole numbers"),
        ({"name": "pixel", "height": "28", "width": 28, "channels": 1}, "whole numbers"),
        ({"name": "pixel", "height": 40, "width": 28, "channels": 1}, "at least 40"),
        ({"name": "pixel", "height": 28, "width": 28, "channels": 1, "size": 29}, "even"),
    ],
)
def test_bad_spec(spec: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        codec_from_spec(spec)


def test_wrong_arrays_are_refused() -> None:
    codec = PixelCodec(28, 28, 1)
    with pytest.raises(UserError, match="uint8 images"):
        codec.encode(random_images(1, 28, 28, 3))
    with pytest.raises(UserError, match="uint8 images"):
        codec.encode(random_images(1, 28, 28, 1).astype(np.float32))
    with pytest.raises(UserError, match="decodes"):
        codec.decode(torch.zeros(1, 12, 16, 16))
