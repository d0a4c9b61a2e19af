"""The network as a model of diffusers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file

from diffussm.errors import UserError
from diffussm.hub import DiffuSSMModel
from diffussm.models.block import HourglassBlock
from diffussm.models.diffussm import DiffuSSM, ModelConfig

pytestmark = pytest.mark.unit

X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T, Y = torch.tensor([0, 500, 999]), torch.tensor([0, 3, 2])


def model(num_classes: int = 3) -> DiffuSSMModel:
    """Of random weights: none is 0, as some are when training begins."""
    torch.manual_seed(1)
    made = DiffuSSMModel(4, 8, num_classes, 16, 2, 2, 4)
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@torch.no_grad()
def output(network: torch.nn.Module) -> torch.Tensor:
    return network(X, T, Y, return_dict=False)[0]


def is_ssm(name: str) -> bool:
    return ".ssm." in name


def test_it_computes_what_the_network_computes():
    ours, theirs = model(), DiffuSSM(ModelConfig("custom", 16, 2, 2, 4), 4, 3).eval()
    theirs.load_state_dict(ours.state_dict())  # the same names
    with torch.no_grad():
        expected = theirs(X, T, Y)
        assert torch.equal(ours(hidden_states=X, timestep=T, class_labels=Y).sample, expected)
        assert torch.equal(ours(X, T, Y, return_dict=False)[0], expected)
        assert torch.equal(ours(X, 500, Y).sample, theirs(X, torch.full((3,), 500), Y))
        assert torch.equal(ours(X, T).sample, theirs(X, T, torch.full((3,), 3)))  # no label is the null class


def test_saved_and_loaded_it_is_the_same_bit_for_bit(tmp_path):
    saved = model()
    saved.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[name], parameter) for name, parameter in saved.named_parameters())
    for loaded in (DiffuSSMModel.from_pretrained(tmp_path), DiffuSSMModel.from_pretrained(str(tmp_path))):
        assert isinstance(loaded, ModelMixin) and not loaded.training
        assert (loaded.config.width, loaded.config.num_classes, loaded.dtype) == (16, 3, torch.float32)
        assert torch.equal(output(loaded), output(saved))


def test_the_state_space_stays_exact_in_half_precision(tmp_path):
    exact = model()
    exact.save_pretrained(tmp_path)
    values = exact.state_dict()
    assert sum(map(is_ssm, values)) == 10
    casts = {
        "loaded": lambda: DiffuSSMModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16),
        "to": lambda: model().to(torch.bfloat16),
        "to, with a device": lambda: model().to("cpu", torch.bfloat16),
        "bfloat16": lambda: model().bfloat16(),
        "float16": lambda: model().half(),
    }
    for how, make in casts.items():
        half = make()
        dtype = torch.float16 if how == "float16" else torch.bfloat16
        assert half.dtype == dtype, how
        for name, parameter in half.named_parameters():
            expected = values[name] if is_ssm(name) else values[name].to(dtype)
            assert torch.equal(parameter, expected) and parameter.dtype == expected.dtype, (how, name)
        error = (output(half) - output(exact)).abs().mean() / output(exact).abs().mean()
        assert output(half).dtype == torch.float32 and 0 < error < 0.03, how
    back = model().to(torch.bfloat16).float()
    for name, parameter in back.named_parameters():  # what was rounded stays so
        assert torch.equal(parameter, values[name] if is_ssm(name) else values[name].bfloat16().float()), name


def test_a_cast_keeps_gradients_of_the_state_space(tmp_path):
    network = model().train()
    network(X, T, Y).sample.square().mean().backward()
    before = {name: p.grad.clone() for name, p in network.named_parameters() if is_ssm(name)}
    network.bfloat16()
    for name, parameter in network.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
        assert not is_ssm(name) or torch.equal(parameter.grad, before[name])
    network(X, T, Y).sample.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_moved_to_another_device_it_keeps_its_dtypes():
    moved = model().to(torch.bfloat16).to("meta")
    assert {parameter.device.type for parameter in moved.parameters()} == {"meta"}
    assert {parameter.dtype for name, parameter in moved.named_parameters() if is_ssm(name)} == {torch.float32}


def test_gradient_checkpointing_computes_blocks_again_and_changes_nothing(monkeypatch):
    calls, forward = [], HourglassBlock.forward
    monkeypatch.setattr(HourglassBlock, "forward", lambda self, *a: calls.append(1) or forward(self, *a))
    gradients, counts = {}, {}
    for enabled in (False, True):
        network = model().train()
        network.set_ssm_backend("fft")
        if enabled:
            network.enable_gradient_checkpointing()
        assert network.is_gradient_checkpointing == enabled
        calls.clear()
        network(X, T, Y).sample.square().mean().backward()
        counts[enabled], gradients[enabled] = len(calls), [p.grad for p in network.parameters()]
    assert counts == {False: 2, True: 4}
    assert all(map(torch.equal, *gradients.values()))
    network.disable_gradient_checkpointing()
    assert not network.is_gradient_checkpointing


def test_an_unconditional_model(tmp_path):
    model(num_classes=0).save_pretrained(tmp_path)
    loaded = DiffuSSMModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(X, T).sample, model(num_classes=0)(X, T).sample)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("diffussm.train, diffussm.models.diffussm", "diffusers"),
        ("diffussm.hub, diffussm.hub.export, diffussm.commands.convert_checkpoint", "deepspeed"),
        ("diffussm.commands.convert_checkpoint", "diffusers"),
    ],
)
def test_what_is_not_imported(modules, absent):
    code = f"import sys\nimport {modules}\nassert {absent!r} not in sys.modules, 'imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_pickle_is_not_read(tmp_path):
    model().save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").exists()
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors"):
        DiffuSSMModel.from_pretrained(tmp_path, use_safetensors=None)


def test_weights_that_are_not_all_the_models_are_refused(tmp_path):
    model().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    name, tensor = next(iter(whole.items()))
    damages = {
        "missing": {key: value for key, value in whole.items() if key != name},
        "unexpected": {**whole, "blocks.9.x": torch.zeros(2)},
        "mismatched": {**whole, name: torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)},
    }
    for problem, weights in damages.items():
        save_file(weights, file, {"format": "pt"})
        for options in ({}, {"low_cpu_mem_usage": False}):
            with pytest.raises(UserError, match=f"{problem} weights: .*{'blocks.9.x' if problem[0] == 'u' else name}"):
                DiffuSSMModel.from_pretrained(tmp_path, **options)
    save_file(whole, file, {"format": "pt"})
    loaded, info = DiffuSSMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(output(loaded), output(model())) and not info["missing_keys"]


def test_a_dtype_that_is_none_of_torchs_is_refused(tmp_path):
    model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="dtype 'auto' is not one of torch's"):
        DiffuSSMModel.from_pretrained(tmp_path, torch_dtype="auto")
