"""The plan of a run against torch's own count of what it allocates, DeepSpeed's tensors, and closed forms."""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from diffussm.config import Config, TrainConfig, config_names, parse
from diffussm.errors import UserError
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.ops import fft
from diffussm.ops.s4d import s4d
from diffussm.training.engine import read_ds_config
from diffussm.training.plan import PARTS, REDUCE_BUCKET, Plan
from diffussm.training.plan_changes import describe_change, least_memory, smallest_change

pytestmark = pytest.mark.unit

GIB = 1 << 30
BATCH, LATENT, CLASSES = 4, (1, 16, 16), 3


def small_plan(hourglass: int = 2, precision: str = "fp32", checkpointing: bool = False, device: str = "cpu") -> Plan:
    """Of a model whose width outweighs what the plan leaves out: tensors of the latent's one channel."""
    train = TrainConfig(global_batch=BATCH, precision=precision, activation_checkpointing=checkpointing)
    return Plan(Config(model=ModelConfig("custom", 64, 2, hourglass, 8), train=train), LATENT, CLASSES, 1, 2, device)


def xl_plan(name: str = "xl256", ranks: int = 8, zero_stage: int = 2, **train: Any) -> Plan:
    config = parse(["--config", name]).config
    latent = {"xl256": (4, 32, 32), "xl512": (4, 64, 64)}[name]
    return Plan(replace(config, train=replace(config.train, **train)), latent, 1000, ranks, zero_stage)


def network(plan: Plan) -> DiffuSSM:
    torch.manual_seed(0)
    model = DiffuSSM(plan.model, plan.latent_shape[0], plan.num_classes, plan.checkpointing)
    model.set_ssm_backend("fft")
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model


def forward(model: DiffuSSM, bf16: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(BATCH, *LATENT, generator=generator), torch.arange(BATCH) % CLASSES
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(x, 100 * y, y)


def allocated(function: Callable[[], Any]) -> tuple[int, int, Any]:
    """(bytes that the function holds at most, bytes that it leaves behind, its result)."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())))
    return max(held), held[-1], result


# Activations


def held_after_forward(plan: Plan) -> int:
    """Bytes that the forward pass leaves behind, less the bf16 copies of weights that the backward pass needs."""
    model = network(plan)
    _, held, _ = allocated(lambda: forward(model, plan.bf16))
    copied = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not (hasattr(parameter, "is_ssm") or "embedding" in name or (plan.checkpointing and "blocks" in name))
    )
    return held - (2 * copied if plan.bf16 else 0)


@pytest.mark.parametrize("hourglass", [1, 2, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_the_forward_pass_leaves_behind(hourglass, precision, checkpointing):
    plan = small_plan(hourglass, precision, checkpointing)
    assert plan.activations() == pytest.approx(held_after_forward(plan), rel=0.03)


def test_activations_are_what_autograd_saves():
    plan = small_plan()
    model, saved = network(plan), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = forward(model, bf16=False)  # noqa: F841 - keeps what is saved, and so its addresses
    total = sum(size for address, size in saved.items() if address not in weights)
    assert plan.activations() == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_under_cudas_autocast(checkpointing, monkeypatch):
    """Which runs LayerNorm in fp32, where a CPU's leaves it in bf16."""

    def in_fp32(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return layer_norm(x.float(), *arguments)

    layer_norm = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", in_fp32)
    plan = small_plan(precision="bf16", checkpointing=checkpointing, device="cuda")
    assert plan.activations() == pytest.approx(held_after_forward(plan), rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_backward_pass_takes_no_more_than_planned(precision, checkpointing):
    plan = small_plan(precision=precision, checkpointing=checkpointing)
    model = network(plan)

    def step() -> None:
        forward(model, plan.bf16).square().mean().backward()

    step()  # gradients are allocated
    peak, _, _ = allocated(step)
    moments = [plan.memory()[moment] for moment in ("forward ends", "backward begins")]
    planned = max(sum(m[part] for part in ("bf16 weights", "activations", "kernel workspace")) for m in moments)
    assert 0.6 * planned < peak < planned


@pytest.mark.parametrize(("length", "batch", "block"), [(256, 16, 1 << 20), (1024, 8, 1 << 22), (4096, 1, 1 << 22)])
def test_the_convolution_takes_no_more_than_its_workspace(length, batch, block, monkeypatch):
    monkeypatch.setitem(fft.BLOCK_BYTES, "cpu", block)
    model = ModelConfig("custom", 128, 1, 1, 64)
    config = Config(model=model, train=TrainConfig(global_batch=batch, precision="fp32"))
    plan = Plan(config, (1, 1, length), 0, 1, 2, "cpu")
    ssm = DiffuSSM(model, 1, 0).blocks[0].ssm
    parameters = ssm.s4d_parameters()
    u = torch.randn(128, batch, length, requires_grad=True)
    y = s4d(u, parameters, layout="DBL", backend="fft")
    peak, held, _ = allocated(lambda: torch.autograd.grad(y, (u, *parameters), torch.ones_like(y)))
    assert 0.5 * plan.kernel_workspace() < peak - held - y.nbytes < plan.kernel_workspace()


@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointing_changes_neither_loss_nor_gradients(bf16):
    results = []
    for checkpointing in (False, True):
        model = network(small_plan(checkpointing=checkpointing))
        loss = forward(model, bf16).square().mean()
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_is_of_training_alone(monkeypatch):
    monkeypatch.setattr("diffussm.models.diffussm.checkpoint", None)  # would fail if it were called
    forward(network(small_plan(checkpointing=True)).eval(), bf16=False)


# What DeepSpeed holds


@pytest.mark.distributed
def test_state_step_and_checkpoint_are_those_of_an_engine(tmp_path):
    torchrun = str(Path(sys.executable).parent / "torchrun")
    worker = str(Path(__file__).parent / "plan_worker.py")
    port = f"--master_port={runs.free_port()}"
    done = runs.run([torchrun, "--nproc_per_node=2", port, worker, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    train = TrainConfig(global_batch=4, precision="fp32")
    config = Config(model=ModelConfig("custom", 128, 3, 2, 8), train=train)
    for stage, found in json.loads((tmp_path / "found.json").read_text()).items():
        plan = Plan(config, (4, 4, 4), 10, 2, int(stage), "cpu")
        P, step = plan.parameters, plan.memory()["optimizer step"]
        assert found["between"] == pytest.approx({"0": 16 * P, "1": 12 * P, "2": 12 * P, "3": 12 * P}[stage], rel=0.01)
        assert found["step"] == pytest.approx(sum(step.values()) - step["communication"], rel=0.03)
        assert found["checkpoint"] == pytest.approx(plan.checkpoint_bytes(), rel=0.02)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_are_of_deepspeeds_own_size(stage):
    zero = read_ds_config(str(runs.ROOT / f"ds_configs/zero{stage}.json"))["zero_optimization"]
    assert zero["overlap_comm"] and zero["contiguous_gradients"]
    assert not zero.keys() & {"reduce_bucket_size", "stage3_max_live_parameters"}


def test_a_gpu_holds_whole_buckets():
    for stage, bytes_per_element in ((1, 2 * (4 + 4)), (2, 2 * (4 + 4)), (3, 4 + 2)):
        begins = xl_plan(zero_stage=stage).memory()["backward begins"]
        assert begins["communication"] == bytes_per_element * REDUCE_BUCKET
    assert xl_plan(zero_stage=2, precision="fp32").memory()["backward begins"]["communication"] == 8 * REDUCE_BUCKET


def test_state_is_shared_among_the_ranks():
    whole, shared = xl_plan(ranks=1).memory()["forward ends"], xl_plan(ranks=64).memory()["forward ends"]
    assert whole["optimizer"] == 12 * xl_plan().parameters
    for part, shrinks in (("parameters", False), ("optimizer", True), ("EMA", True)):
        assert shared[part] == pytest.approx(whole[part] / (64 if shrinks else 1), rel=1e-6)
    assert xl_plan(ranks=64, zero_stage=3).memory()["backward ends"]["parameters"] == pytest.approx(
        whole["parameters"] / 64, rel=1e-6
    )


@pytest.mark.parametrize(("stage", "bytes_per_parameter"), [(0, 4), (1, 4), (2, 4 / 8), (3, 4 / 8)])
def test_accumulated_gradients_are_there_from_the_second_micro_batch_on(stage, bytes_per_parameter):
    plan = xl_plan(zero_stage=stage, micro_batch=16)
    assert plan.accumulation == 2
    gradients = plan.memory()["forward ends"]["gradients"]
    assert gradients == pytest.approx(bytes_per_parameter * plan.parameters, rel=1e-6)


# The paper's run


def test_the_papers_run_fits_its_gpus():
    plan = xl_plan()
    assert (plan.micro_batch, plan.accumulation) == (32, 1)
    assert plan.peak() < 72 * GIB
    assert xl_plan("xl512").peak() < 72 * GIB
    assert all(tuple(parts) == PARTS for parts in plan.memory().values())


def test_the_shipped_configurations_are_the_papers():
    assert {"xl256", "xl512"} <= set(config_names())
    for name, images in (("xl256", 660_000_000), ("xl512", 302_000_000)):
        config = parse(["--config", name]).config
        train = config.train
        assert (config.model.preset, train.total_images, train.global_batch, train.lr) == ("XL", images, 256, 1e-4)
        assert (1 - 256 / train.ema_images) == pytest.approx(0.9999)


def test_figures_of_the_papers_run():
    plan = xl_plan()
    figures = plan.figures(gpu_flops=312e12, mfu=0.5, images=660_000_000, sample_bytes=16_384)
    assert figures["steps"] == 2_578_125
    assert plan.macs_per_step() == pytest.approx(3 * 256 * 29 * 7.5 * 1024 * 1152**2, rel=0.03)
    rate = 8 * 312e12 * 0.5 / (3 * 2 * 29 * 7.5 * 1024 * 1152**2)
    assert figures["images_per_second"] == pytest.approx(rate, rel=0.03)
    assert figures["bytes_read_per_second"] == 16_384 * figures["images_per_second"]
    assert figures["stream_bytes"] == 32 * 16 << 20  # 32 images a rank, two windows of 4 to 8 MiB each
    assert figures["gpu_hours"] == pytest.approx(8 * 24 * figures["days"])
    assert figures["days"] == pytest.approx(660e6 / rate / 86_400, rel=0.03)
    assert figures["checkpoint_bytes"] == 16 * plan.parameters  # weights, two moments, one average
    json.dumps(figures)


def test_checkpointing_costs_a_forward_pass():
    without, kept = xl_plan(), xl_plan(activation_checkpointing=True)
    assert 3 * kept.macs_per_step() == 4 * without.macs_per_step()
    assert kept.images_per_second(1e12, 0.5) == without.images_per_second(1e12, 0.5)  # MFU does not count it
    assert kept.peak() < without.peak()


# What does not fit


@pytest.mark.parametrize(
    ("gib", "change"),
    [
        (140, ""),
        (80, "train.micro_batch 16"),
        (18, "train.micro_batch 1"),
        (17, "train.micro_batch 8, train.activation_checkpointing true"),
        (14, "train.micro_batch 1, --zero 3"),
        (10, "train.micro_batch 2, train.activation_checkpointing true, --zero 3"),
        (0.1, None),
    ],
)
def test_the_smallest_change_costs_the_least_speed(gib, change):
    plan = xl_plan("xl512", micro_batch=None)
    found = smallest_change(plan, int(gib * GIB))
    assert (found and describe_change(plan, found)) == change


def test_more_gpus_are_the_last_resort():
    plan = xl_plan(ranks=1, zero_stage=3)
    found = smallest_change(plan, 16 * GIB)
    assert found.ranks > 1 and found.zero_stage == 3
    assert plan.with_changes(ranks=found.ranks // 2, micro_batch=1, activation_checkpointing=True).peak() > 16 * GIB


def test_the_least_memory_is_below_every_limit_that_can_be_met():
    plan = xl_plan()
    least = least_memory(plan)
    assert smallest_change(plan, least.peak()) is not None
    assert smallest_change(plan, least.peak() - 1) is None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"ranks": 3}, "256 cannot be made by 3 ranks × accumulation: 255 or 258 can"),
        ({"micro_batch": 64}, "256 cannot be made by 8 ranks × train.micro_batch 64 × accumulation: 512 can"),
    ],
)
def test_batches_that_do_not_divide_are_refused(change, line):
    with pytest.raises(UserError, match=line):
        xl_plan().with_changes(**change)


def test_an_hourglass_that_does_not_divide_the_positions_is_refused():
    with pytest.raises(UserError, match=r"model\.hourglass 2 does not divide 3×5 positions: 1 does"):
        Plan(parse(["--config", "xl256"]).config, (4, 3, 5), 1000, 8, 2)
