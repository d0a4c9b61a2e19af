from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffussm.autoencoders import kl
from diffussm.autoencoders.codec import codec_from_spec
from diffussm.autoencoders.kl import AutoencoderKLCodec
from diffussm.data.encode import Encoding, encode
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.errors import UserError

pytestmark = pytest.mark.unit

Make = Callable[..., Path]
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
KINDS = {
    "factor 2": {},
    "factor 8, 3 channels": {"levels": 4, "latent_channels": 3},
    "with a shift": {"scaling_factor": 0.36, "shift_factor": 0.12, "latent_channels": 16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_diffusers_own(make_autoencoder: Make, kind: str) -> None:
    folder = make_autoencoder(**KINDS[kind])
    codec = AutoencoderKLCodec.open(str(folder), 16, "float32")
    network = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        posterior = network.encode(torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    moments = codec.encode(IMAGES)
    factor, channels = 2 ** (len(network.config.block_out_channels) - 1), network.config.latent_channels
    assert codec.latent_shape == (channels, 16 // factor, 16 // factor) and codec.posterior
    assert moments.dtype == np.float32 and moments.shape == (5, 2 * channels, 16 // factor, 16 // factor)
    np.testing.assert_allclose(moments[:, :channels], posterior.mean, atol=1e-5)
    np.testing.assert_allclose(moments[:, channels:], posterior.logvar, atol=1e-5)
    assert (codec.scale, codec.shift) == (network.config.scaling_factor, network.config.shift_factor or 0)
    half = AutoencoderKLCodec.open(str(folder), 16).encode(IMAGES)
    np.testing.assert_array_equal(half, moments.astype(np.float16))


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_is_diffusers_own(make_autoencoder: Make, kind: str) -> None:
    folder = make_autoencoder(**KINDS[kind])
    codec = AutoencoderKLCodec.open(str(folder), 16)
    latents = torch.randn(5, *codec.latent_shape, generator=torch.Generator().manual_seed(0))
    network = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        pixels = network.decode(latents / codec.scale + codec.shift).sample
    images = codec.decode(latents)
    assert images.dtype == np.uint8 and images.shape == (5, 16, 16, 3)
    expected = ((pixels + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert np.abs(images - expected.numpy()).max() <= 0.501


def test_the_spec_brings_back_the_codec_and_loads_nothing_before_it_must(make_autoencoder: Make) -> None:
    folder = make_autoencoder()
    codec = AutoencoderKLCodec.open(str(folder), 16, "float32")
    moved = folder.with_name("moved")
    folder.rename(moved)
    spec = json.loads(json.dumps(codec.spec()))
    again = codec_from_spec(spec)
    assert (again.latent_shape, again.dtype, again.scale, again.spec()) == (
        codec.latent_shape, codec.dtype, codec.scale, codec.spec(),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"is neither a folder nor to be had from the hub .*: give a folder"):
        again.load()
    found = codec_from_spec(spec, str(moved))
    np.testing.assert_array_equal(found.encode(IMAGES), codec.encode(IMAGES))


def test_other_weights_are_refused(make_autoencoder: Make) -> None:
    spec = AutoencoderKLCodec.open(str(make_autoencoder()), 16).spec()
    for other in (make_autoencoder(seed=1), make_autoencoder(act_fn="relu")):
        with pytest.raises(
            UserError, match=r"has other weights \(\w{12}\) than those that encoded .*data\.autoencoder"
        ):
            codec_from_spec(spec, str(other)).load()
    assert AutoencoderKLCodec.open(str(make_autoencoder(scaling_factor=0.5)), 16).spec() != spec


def test_the_hash_is_of_the_weights_and_not_of_their_files(make_autoencoder: Make, tmp_path: Path) -> None:
    folder = make_autoencoder()
    weights = AutoencoderKLCodec.open(str(folder), 16).weights
    AutoencoderKL.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert AutoencoderKLCodec.open(str(tmp_path / "shards"), 16).weights == weights
    shutil.copytree(folder, tmp_path / "pipeline/vae")
    assert AutoencoderKLCodec.open(str(tmp_path / "pipeline"), 16).weights == weights
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert AutoencoderKLCodec.open(str(folder), 16).weights != weights


def test_large_images_go_in_batches_that_do_not_depend_on_the_rest(
    make_autoencoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = AutoencoderKLCodec.open(str(make_autoencoder()), 16, "float32", "cpu")
    moments, latents = codec.encode(IMAGES), torch.randn(5, *codec.latent_shape)
    images = codec.decode(latents)
    for name in ("PIXELS_AT_ONCE", "PIXELS_A_THREAD"):
        monkeypatch.setattr(kl, name, 2 * 16 * 16)
    np.testing.assert_allclose(codec.encode(IMAGES), moments, atol=1e-5)
    np.testing.assert_array_equal(codec.encode(IMAGES)[:4], codec.encode(IMAGES[:4]))
    for number, image in enumerate(images):  # of decoding not even the last bit does
        np.testing.assert_array_equal(codec.decode(latents[number : number + 1])[0], image)


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may change how many there are."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_gone_on_with_by_another_number_of_threads_the_bytes_are_the_same(make_autoencoder: Make, tmp_path: Path):
    codec = AutoencoderKLCodec.open(str(make_autoencoder(levels=4)), 64, "float32", "cpu")
    pixels = np.random.default_rng(1).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    images, whole, broken = ArrayImages("noise", [], pixels, np.zeros(40, np.int64)), tmp_path / "a", tmp_path / "b"
    torch.set_num_threads(1)
    encode(images, codec, open_store(whole), 10)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Encoding, "publish", lambda self: (_ for _ in ()).throw(RuntimeError("killed")))
        encode(images, codec, open_store(broken), 10)
    for number in (1, 3):
        (broken / f"finished-0000{number}.json").unlink()
    torch.set_num_threads(2)
    encode(images, codec, open_store(broken), 10)
    for path in whole.iterdir():
        assert path.read_bytes() == (broken / path.name).read_bytes(), path.name


def test_a_resume_on_another_kind_of_processor_is_refused(make_autoencoder: Make, tmp_path: Path, monkeypatch) -> None:
    folder = make_autoencoder()
    moved = shutil.copytree(folder, tmp_path / "moved")
    codec = AutoencoderKLCodec.open(str(folder), 16, device="cpu")
    images = ArrayImages("noise", [], IMAGES, np.zeros(5, np.int64))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Encoding, "publish", lambda self: (_ for _ in ()).throw(RuntimeError("killed")))
        encode(images, codec, open_store(tmp_path / "out"), 2)
    gpu = replace(codec, device="cuda:1")
    with pytest.raises(UserError, match="another encoding: its device is cpu, not cuda"):
        encode(images, gpu, open_store(tmp_path / "out"), 2)
    with pytest.raises(UserError, match="another encoding: its device is cpu, not cuda"):  # two ranks of one run
        Encoding(images, gpu, open_store(tmp_path / "out"), 2, 0, False, False).publish()
    # The same weights in another place are the same codec; and what is finished is so for every machine.
    encode(images, AutoencoderKLCodec.open(str(moved), 16, device="cpu"), open_store(tmp_path / "out"), 2)
    encode(images, gpu, open_store(tmp_path / "out"), 2)
    other = AutoencoderKLCodec.open(str(make_autoencoder(seed=1)), 16, device="cpu")
    with pytest.raises(UserError, match="another encoding: its codec is"):
        encode(images, other, open_store(tmp_path / "out"), 2)


def test_what_does_not_fit_is_one_line(make_autoencoder: Make) -> None:
    folder = str(make_autoencoder(levels=4))
    with pytest.raises(UserError, match=r"--size 20 is no multiple of 8, .*: 24 is"):
        AutoencoderKLCodec.open(folder, 20)
    with pytest.raises(UserError, match="takes 1 channels, not RGB's 3"):
        AutoencoderKLCodec.open(str(make_autoencoder(in_channels=1, out_channels=1)), 16)
    codec = AutoencoderKLCodec.open(folder, 16)
    with pytest.raises(UserError, match=r"takes uint8 images \[16, 16, 3\], got float32 \[16, 16, 3\]"):
        codec.encode(IMAGES.astype(np.float32))
    with pytest.raises(UserError, match=r"decodes \(4, 2, 2\), got \(4, 4, 4\)"):
        codec.decode(torch.zeros(1, 4, 4, 4))


def test_moments_beyond_float16_name_the_way_out(make_autoencoder: Make) -> None:
    folder = make_autoencoder()
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["quant_conv.bias"][:4] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not a finite float16, but fits --dtype float32"):
        AutoencoderKLCodec.open(str(folder), 16).encode(IMAGES)
    assert AutoencoderKLCodec.open(str(folder), 16, "float32").encode(IMAGES).max() > 65_504
    tensors["quant_conv.bias"][:4] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"is not a finite float32$"):
        AutoencoderKLCodec.open(str(folder), 16, "float32").encode(IMAGES)


def test_pickles_and_what_is_no_autoencoder_are_not_read(make_autoencoder: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"its weights are a pickle, .*safe_serialization=True"):
        AutoencoderKLCodec.open(str(make_autoencoder(safe=False)), 16)
    with pytest.raises(UserError, match=r"config\.json is missing"):
        AutoencoderKLCodec.open(str(tmp_path), 16)
    folder = make_autoencoder()
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be loaded: ") as failure:
        AutoencoderKLCodec.open(str(folder), 16)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("key", "value"), [("weights", None), ("dtype", "int8"), ("size", 0), ("factor", "8"), ("unknown", 1)]
)
def test_a_spec_that_is_none_is_refused(make_autoencoder: Make, key: str, value: object) -> None:
    spec = AutoencoderKLCodec.open(str(make_autoencoder()), 16).spec()
    with pytest.raises(UserError, match="codec 'autoencoder-kl' does not take the configuration"):
        codec_from_spec(spec | {key: value})
