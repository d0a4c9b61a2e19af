"""The analytic counts against torch's counter, real models, diffusers' DiT, and the papers' figures."""

import re
from collections import Counter

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from diffussm.models import diffussm as network
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.models.macs import (
    DIT_SIZES,
    DiTSize,
    dit_macs,
    dit_parameter_counts,
    forward_macs,
    kernel_macs,
    mix_into_down_macs,
    parameter_counts,
)
from diffussm.ops.kernel import S4DParameters
from diffussm.ops.s4d import kernel_spectrum

pytestmark = pytest.mark.unit

PARTS = {  # by the names of modules and parameters
    "W0": r"blocks\.\d+\.w0",
    "W_up": r"blocks\.\d+\.w_up",
    "SSM kernel": r"blocks\.\d+\.ssm\.\w+",
    "SSM mix": r"blocks\.\d+\.mix_and_down\.mix_\w+",
    "W_down": r"blocks\.\d+\.mix_and_down\.down_\w+",
    "W1": r"blocks\.\d+\.w1",
    "W2": r"blocks\.\d+\.w2",
    "W3": r"blocks\.\d+\.w3",
    "adaLN": r"blocks\.\d+\.modulation|final_modulation",
    "conditioning": r"time_mlp\.\d|class_embedding",
    "ends": r"embed|fold|unfold|decode",
}
DIT_PARTS = {
    "projections": r"transformer_blocks\.\d+\.attn1\.to_.+",
    "MLP": r"transformer_blocks\.\d+\.ff\..+",
    "adaLN": r"transformer_blocks\.\d+\.norm1\.linear|proj_out_1",
    "conditioning": r"transformer_blocks\.\d+\.norm1\.emb\..*(linear_.|embedding_table)",
    "ends": r"pos_embed\.proj|proj_out_2",
}


@pytest.fixture(autouse=True)
def no_padding(monkeypatch):
    """Rows that are added to a product of few images' conditions are no MACs of the network's."""
    monkeypatch.setattr(network, "ROWS", 1)


class CountByWeight(TorchDispatchMode):
    """What torch counts, in MACs, by the name of the weight that is multiplied with; under None what has no weight.

    By weight and not by module: a block may multiply with its weights in whatever order and layout is fast.
    """

    def __init__(self, model):
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.ndim > 1}
        self.macs = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with FlopCounterMode(display=False) as counter:
            result = function(*args, **(kwargs or {}))
        if flops := counter.get_total_flops():
            storages = [x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)]
            name = next((self.names[storage] for storage in storages if storage in self.names), None)
            self.macs[name and name.removesuffix(".weight")] += flops / 2
        return result


def torchs_macs(model, *inputs):
    count = CountByWeight(model.eval())
    with count, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # torch does not count the CPU's flash attention
        model(*inputs)
    return count.macs


def by_part(patterns, counts):
    """Counts of named things, summed by part; every name must belong to one."""
    parts = Counter()
    for name, count in counts.items():
        (part,) = [part for part, pattern in patterns.items() if re.fullmatch(pattern, name)]
        parts[part] += count
    return parts


def parameters_by_part(patterns, model):
    owners = Counter()
    for name, parameter in model.named_parameters():
        owners[re.sub(r"\.(weight|bias)$", "", name)] += parameter.numel()
    return by_part(patterns, owners)


@pytest.mark.parametrize("hourglass", [1, 2, 4])
@pytest.mark.parametrize("size", [(8, 8), (6, 12)])
@pytest.mark.parametrize("batch", [1, 3])
def test_each_part_equals_torchs_count(hourglass, size, batch):
    config, length = ModelConfig("custom", 128, 2, hourglass, 8), size[0] * size[1]  # at most 2D positions
    model = DiffuSSM(config, channels=4, num_classes=10)
    macs = torchs_macs(model, torch.randn(batch, 4, *size), torch.arange(batch), torch.arange(batch))
    counted = forward_macs(config, channels=4, length=length)
    assert counted.pop("SSM FFT") > 0  # torch counts no FFT
    assert macs.pop(None) == kernel_macs(config, length)["matmul"]
    assert by_part(PARTS, macs) == {part: batch * count for part, count in counted.items()}


@pytest.mark.parametrize("hourglass", [1, 2, 4])
def test_of_larger_batches_the_mix_is_multiplied_into_w_down_once(hourglass):
    config, batch, length = ModelConfig("custom", 32, 2, hourglass, 8), 2, 64
    model = DiffuSSM(config, channels=4, num_classes=10)
    macs = torchs_macs(model, torch.randn(batch, 4, 8, 8), torch.arange(batch), torch.arange(batch))
    counted = forward_macs(config, channels=4, length=length)
    del counted["SSM FFT"], counted["SSM mix"]
    assert macs.pop(None) == kernel_macs(config, length)["matmul"] + batch * counted.pop("W_down")
    parts = by_part(PARTS, macs)
    assert parts.pop("W_down") == mix_into_down_macs(config)
    assert parts == {part: batch * count for part, count in counted.items()}


@pytest.mark.parametrize("length", [1, 64, 72, 100, 1024])
def test_the_kernels_matmul_equals_torchs_count(length):
    width, depth, state = 32, 3, 8
    shapes = ((2, width), (2, width, state // 2), (2, width, state // 2), (2, width, state // 2, 2), (width,))
    parameters = S4DParameters(*map(torch.rand, shapes))
    counter = FlopCounterMode(display=False)
    with counter:
        kernel_spectrum(parameters, length)
    counted = kernel_macs(ModelConfig("custom", width, depth, 2, state), length)
    assert depth * counter.get_total_flops() / 2 == counted["matmul"]


def test_fft_by_hand():
    config = ModelConfig("custom", 32, 3, 2, 8)
    fft = 2.5 * 128 * 7  # operations of a real FFT of 128 points
    assert forward_macs(config, channels=4, length=64)["SSM FFT"] == 3 * 32 * (2 * fft / 2 + 65 * 4)
    assert kernel_macs(config, length=64)["FFT"] == 3 * 32 * fft / 2


@pytest.mark.parametrize("hourglass", [1, 2, 4])
@pytest.mark.parametrize("num_classes", [0, 10])
def test_parameters_are_those_of_a_model(hourglass, num_classes):
    config = ModelConfig("custom", 32, 3, hourglass, 8)
    model = DiffuSSM(config, channels=3, num_classes=num_classes)
    assert parameters_by_part(PARTS, model) == parameter_counts(config, channels=3, num_classes=num_classes)


def test_xl_has_the_papers_673_million_parameters():
    counted = parameter_counts(ModelConfig("XL"), channels=4, num_classes=1000)
    with torch.device("meta"):
        model = DiffuSSM(ModelConfig("XL"), channels=4, num_classes=1000)
    assert parameters_by_part(PARTS, model) == counted
    assert sum(counted.values()) == pytest.approx(673e6, rel=0.01)


@pytest.mark.parametrize(("length", "paper"), [(1024, 295.6e9), (4096, 1182.3e9)])
def test_xl_costs_what_the_papers_formula_says(length, paper):
    parts = forward_macs(ModelConfig("XL"), channels=4, length=length)
    dense = sum(parts[name] for name in ("W0", "W_up", "SSM mix", "W_down", "W1", "W2", "W3"))
    assert dense == 29 * 7.5 * length * 1152**2
    assert dense == pytest.approx(paper, rel=0.001)
    assert parts["SSM FFT"] < 0.02 * dense


@pytest.mark.parametrize("patch", [1, 2])
def test_dit_equals_torchs_count_of_diffusers(patch):
    size, depth = DiTSize(64, 2, patch), 2
    model = DiTTransformer2DModel(4, 16, 4, 8, depth, sample_size=8, patch_size=patch, num_embeds_ada_norm=10)
    macs = torchs_macs(model, torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([1]))
    counted = dit_macs(size, channels=4, length=64)
    assert macs.pop(None) == counted.pop("attention")
    parts = by_part(DIT_PARTS, macs)
    parts["conditioning"] /= depth + 1  # DiT embeds the timestep once; diffusers in each block and at the end
    assert parts == counted

    parts = parameters_by_part(DIT_PARTS, model)
    parts["conditioning"] /= depth
    assert parts == dit_parameter_counts(size, channels=4, num_classes=10)


@pytest.mark.parametrize(("length", "paper"), [(1024, 118.64e9), (4096, 524.60e9)])
def test_dit_xl_2_costs_what_its_paper_says(length, paper):
    size = DIT_SIZES["DiT-XL/2"]
    assert sum(dit_macs(size, channels=4, length=length).values()) == pytest.approx(paper, rel=0.001)
    assert sum(dit_parameter_counts(size, channels=4, num_classes=1000).values()) == pytest.approx(675e6, rel=0.001)
