"""Every ZeRO stage trains the same, and a run goes on at another number of ranks, stage or resolution."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import safetensors.torch
import torch
from conftest import shaded_images

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.encode import encode
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.training import checkpoint
from diffussm.training.monitor import log_of

pytestmark = pytest.mark.distributed

BATCH, HALF, TOTAL = 12, 48, 96  # images: ranks 1, 2 and 3 divide a batch


def train(data: Path, run: Path, ranks: int, zero: str, total: int = TOTAL, **overrides) -> None:
    keys = {
        "train__global_batch": BATCH, "train__micro_batch": "null", "train__log_images": BATCH,
        "train__total_images": total, "train__decay_images": 0, "train__checkpoint_images": 10 * TOTAL,
        "train__ema_images": "[40,400]",
    } | overrides  # fmt: skip
    arguments = [*runs.arguments(data, run, **keys), "--deepspeed", str(runs.ROOT / f"ds_configs/{zero}.json")]
    done = runs.run(runs.command("torchrun" if ranks > 1 else "python", ranks, arguments))
    assert done.returncode == 0, done.stderr


def losses(run: Path) -> list[float]:
    return [record["loss/total"] for record in log_of(run)]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.find(open_store(run / "checkpoints"))
    return {f"{kind}:{name}": tensor for kind in found.kinds for name, tensor in found.tensors(kind).items()}


@pytest.fixture(scope="module")
def unbroken(shades, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("elastic") / "unbroken"
    train(shades, run, 2, "zero2")
    return run


@pytest.fixture(scope="module")
def half(shades, tmp_path_factory):
    """(ranks, ZeRO config) → a run that has stopped half-way."""
    made: dict[tuple[int, str], Path] = {}

    def make(ranks: int, zero: str) -> Path:
        if (ranks, zero) not in made:
            made[ranks, zero] = tmp_path_factory.mktemp("half") / "run"
            train(shades, made[ranks, zero], ranks, zero, HALF)
        return made[ranks, zero]

    return make


@pytest.mark.parametrize("zero", ["zero1", "zero3", "zero3_offload"])
def test_the_same_ranks_and_stage_go_on_bit_for_bit(zero, shades, half, tmp_path):
    shutil.copytree(half(2, zero), tmp_path / "run")
    train(shades, tmp_path / "run", 2, zero)
    train(shades, tmp_path / "whole", 2, zero)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    broken, whole = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert len({name.split(":")[0] for name in whole}) == 5  # weights, two moments, two averages
    assert broken.keys() == whole.keys() and all(torch.equal(broken[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "zero2"), (1, "zero2")),
        ((2, "zero2"), (3, "zero2")),
        ((2, "zero2"), (2, "zero3")),
        ((2, "zero1"), (2, "zero2")),
        ((1, "zero3"), (2, "zero1")),
        ((2, "zero2"), (2, "zero3_offload")),
    ],
    ids=lambda place: f"{place[0]}x{place[1]}",
)
def test_other_ranks_and_stages_go_on(before, after, shades, half, unbroken, tmp_path):
    """The same samples, draws, weights, moments and averages: only sums are rounded otherwise."""
    run = tmp_path / "run"
    shutil.copytree(half(*before), run)
    train(shades, run, *after)
    assert losses(run) == pytest.approx(losses(unbroken), rel=1e-5)
    mine, theirs = tensors(run), tensors(unbroken)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(mine[name], tensor, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("after", [(1, "zero3"), (3, "zero1")], ids=lambda place: f"{place[0]}x{place[1]}")
def test_weights_are_taken_over_exactly(after, shades, half, tmp_path):
    """A step of a learning rate that is nothing in fp32 leaves them as other ranks saved them at another stage."""
    run = tmp_path / "run"
    shutil.copytree(half(2, "zero2"), run)
    before = tensors(run)
    train(shades, run, *after, HALF + BATCH, train__lr=1e-30, train__ssm_lr=1e-30)
    after_it = tensors(run)
    for name in (name for name in before if name.startswith("weight:")):
        assert torch.equal(before[name], after_it[name]), name
    assert len(losses(run)) == (HALF + BATCH) // BATCH


def test_stages_train_the_same_for_fifty_steps(shades, tmp_path):
    """With accumulation, clipping, two learning rates and activation checkpointing."""
    curves = {}
    for zero in ("zero1", "zero2", "zero3", "zero3_offload"):
        keys = {"train__micro_batch": 3, "train__activation_checkpointing": True, "train__clip": 0.5}
        train(shades, tmp_path / zero, 2, zero, 50 * BATCH, **keys)
        records = log_of(tmp_path / zero)
        assert len(records) == 50 and max(record["grad_norm"] for record in records) > 0.5
        assert all(record["lr/ssm"] == pytest.approx(record["lr/dense"] / 2) for record in records)
        curves[zero] = losses(tmp_path / zero)
    for zero, curve in curves.items():
        assert curve == pytest.approx(curves["zero2"], rel=0, abs=1e-6), zero


def test_stages_train_the_same_under_autocast(shades, tmp_path):
    curves = {}
    for zero in ("zero1", "zero2", "zero3"):
        train(shades, tmp_path / zero, 2, zero, 10 * BATCH, train__precision="bf16")
        curves[zero] = losses(tmp_path / zero)
        for name, weight in tensors(tmp_path / zero).items():
            if name.startswith("weight:") and name.endswith(("log_dt", "C", "skip")):
                assert (weight != weight.bfloat16().float()).float().mean() > 0.9, name
    for zero, curve in curves.items():
        assert curve == pytest.approx(curves["zero2"], rel=0, abs=1e-3), zero


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_a_compiled_engine_trains_the_same(zero, shades, half, tmp_path):
    train(shades, tmp_path / "run", 1, zero, HALF, train__compile="aot_eager", model__depth=1)
    train(shades, tmp_path / "plain", 1, zero, HALF, model__depth=1)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_gradients_travel_in_the_dtype_that_the_config_says(tmp_path):
    """Under autocast those of dense layers in bf16, those of the state space in fp32; or all of them in fp32."""
    torchrun = str(Path(sys.executable).parent / "torchrun")
    worker = str(Path(__file__).parent / "dtype_worker.py")
    port = f"--master_port={runs.free_port()}"
    done = runs.run([torchrun, "--nproc_per_node=2", port, worker, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "found.json").read_text())
    for stage in (1, 2, 3):
        by_default, in_fp32 = table["found"][f"None {stage}"], table["found"][f"fp32 {stage}"]
        assert by_default["bfloat16"] > 0.9 * table["total"]
        assert table["ssm"] <= by_default["float32"] < 0.1 * table["total"]
        assert "bfloat16" not in in_fp32 and in_fp32["float32"] >= table["total"]


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """The images of ``shades`` at twice the resolution: latents of 4×16×16."""
    folder = tmp_path_factory.mktemp("larger")
    small = shaded_images("train", 60, 0)
    images = np.kron(small.images, np.ones((1, 2, 2, 1), np.uint8))
    source = ArrayImages("shades32/train", small.class_names, images, small.labels)
    encode(source, PixelCodec(32, 32, 1, size=32), open_store(folder / "train"), 40)
    return folder


def test_a_run_begins_with_the_weights_of_another_resolution(trained, larger, tmp_path):
    found = checkpoint.find(open_store(trained / "checkpoints"))
    weights = found.tensors(checkpoint.ema_kind(found.meta["ema_images"][0]))
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    torch.save({"ema": weights}, tmp_path / "weights.pt")
    first = {}
    for number, place in enumerate(["null", found, tmp_path / "weights.safetensors", tmp_path / "weights.pt"]):
        run = tmp_path / str(number)
        keys = {"train__init_from": place, "train__total_images": 8, "train__decay_images": 0}
        done = runs.run(runs.command("python", 1, runs.arguments(larger, run, **keys)))
        assert done.returncode == 0, done.stderr
        first[number] = log_of(run)[0]["loss/total"]
    assert first[1] == first[2] == first[3] < 0.9 * first[0]


class Foreign:
    pass


def test_weights_that_are_not_this_models_are_refused(shades, trained, tmp_path):
    weights = {"blocks.0.w0.weight": torch.zeros(7, 7)}
    safetensors.torch.save_file(weights, tmp_path / "other.safetensors")
    torch.save({"model": Foreign}, tmp_path / "objects.pt")
    (tmp_path / "text.safetensors").write_text("no weights at all")
    for place, line in (
        (tmp_path / "other.safetensors", "it is of another model"),
        (tmp_path / "objects.pt", "objects are never unpickled"),
        (tmp_path / "text.safetensors", "is not a safetensors file"),
        ("/nowhere", "neither a checkpoint nor a file"),
    ):
        arguments = runs.arguments(shades, tmp_path / "run", train__init_from=place)
        done = runs.run(runs.command("python", 1, arguments))
        assert done.returncode == 2
        (error,) = [text for text in done.stderr.splitlines() if text.startswith("error:")]
        assert line in error
        assert not list((tmp_path / "run").glob("checkpoints/images-*"))
