"""tools/plan_run.py: text, JSON and refusals; and a real run with activation checkpointing."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import runs

from diffussm.commands.plan_run import main
from diffussm.training.monitor import log_of

pytestmark = pytest.mark.e2e

GIB = 1 << 30
XL = ("xl256", "--gpus", "8", "--latent", "4x32x32")


@pytest.fixture
def plan(call: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command: its exit code, stdout and stderr."""
    return functools.partial(call, main)


def test_plans_the_papers_run_by_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, runs.ROOT / "tools/plan_run.py", *XL, "--json", "plan.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert (figures["gpus"], figures["zero_stage"], figures["micro_batch"], figures["accumulation"]) == (8, 2, 32, 1)
    assert (figures["precision"], figures["activation_checkpointing"]) == ("bf16", False)
    assert (figures["fits"], figures["change"]) == (True, None)
    assert figures["parameters"] == pytest.approx(673e6, rel=0.01)
    assert figures["checkpoint_bytes"] == 16 * figures["parameters"]
    assert figures["steps"] == 2_578_125
    assert figures["bytes_read_per_second"] == 2 * 4 * 32 * 32 * 2 * figures["images_per_second"]
    for parts in figures["memory"].values():
        assert parts["total"] == sum(value for part, value in parts.items() if part != "total")
    assert figures["peak"] == max(parts["total"] for parts in figures["memory"].values())
    kept = figures["activations"]
    assert kept["without checkpointing"]["peak"] == figures["peak"] > kept["with checkpointing"]["peak"]

    lines = done.stdout.splitlines()
    assert lines[0] == "xl256: 674.1M parameters, depth 29, latents 4×32×32"
    assert lines[1] == "8 GPUs × 32 images × 1 accumulated = 256 a step, ZeRO 2, bf16"
    total = next(line.split() for line in lines if line.startswith("total"))
    assert total[1:] == [f"{parts['total'] / GIB:.2f}" for parts in figures["memory"].values()]
    assert f"peak            {figures['peak'] / GIB:.1f} of 80 GiB: fits" in lines
    assert lines[-1].startswith("660,000,000 images: 2,578,125 steps, ")


def test_takes_the_options_of_training(plan: Callable[..., tuple[int, str, str]]) -> None:
    changed = ("--train.micro_batch", "8", "--train.activation_checkpointing=true", "--zero", "3", "--mfu", "0.2")
    _, out, _ = plan(*XL, "--json", "-")
    _, changed_out, _ = plan(*XL, *changed, "--images", "1000", "--gpu", "H100", "--json", "-")
    before, after = json.loads(out), json.loads(changed_out)
    assert (after["micro_batch"], after["accumulation"], after["zero_stage"]) == (8, 4, 3)
    assert after["macs_per_step"] * 3 == before["macs_per_step"] * 4
    rate = before["images_per_second"] * 989 / 312 * 0.5
    assert after["images_per_second"] == pytest.approx(rate)
    assert (after["images"], after["steps"]) == (1000, 4)
    assert after["gpu_hours"] == pytest.approx(8 * 1000 / rate / 3600)


def test_the_index_tells_shape_classes_and_bytes(plan: Callable[..., tuple[int, str, str]], shades: Path) -> None:
    fashion = ("fashion32", "--gpus", "2", f"--data.path={shades / 'train'}", "--json", "-")
    code, out, _ = plan(*fashion)
    figures = json.loads(out)
    assert code == 0
    assert (figures["latent"], figures["classes"]) == ([4, 8, 8], 3)
    assert figures["bytes_read_per_second"] == 4 * 8 * 8 * figures["images_per_second"]  # pixels, a byte each
    _, out, _ = plan(*fashion, "--latent", "4x16x16", "--classes", "10")
    assert (json.loads(out)["latent"], json.loads(out)["classes"]) == ([4, 16, 16], 10)


def test_what_does_not_fit_is_shown_and_refused(plan: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = plan(*XL, "--gpu-memory", "40")
    assert code == 2
    assert "of 40 GiB: does not fit" in out
    found = re.fullmatch(r"error: xl256 needs ([\d.]+) GiB of 40 on each GPU: set (.+) \(([\d.]+) GiB\)\n", err)
    assert found, err
    assert float(found[1]) > 40 > float(found[3])
    name, value = found[2].split()
    code, out, err = plan(*XL, "--gpu-memory", "40", f"--{name}", value)
    assert (code, err) == (0, "")
    assert f"peak            {found[3]} of 40 GiB: fits" in out


def test_what_cannot_fit_is_refused_with_the_least(plan: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = plan(*XL, "--gpu-memory", "1", "--json", "-")
    assert code == 2
    assert json.loads(out)["fits"] is False and json.loads(out)["change"] is None
    assert re.fullmatch(
        r"error: xl256 needs .* and nothing makes it fit: the least is [\d.]+ GiB, with "
        r"train.activation_checkpointing true, --zero 3, --gpus 256: choose a smaller model\n",
        err,
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["xl256", "--gpus", "8"], "imagenet256/train has no index.json .* give --latent 4x32x32 --classes 1000"),
        (["xl256", "--latent", "4x32x32"], "--gpus"),
        (["xl9", "--gpus", "8"], "'xl9' is neither a file nor one of fashion32, lsun_bedroom, .*xl256, xl512"),
        ([*XL, "--gpus", "3"], "256 cannot be made by 3 ranks × accumulation: 255 or 258 can"),
        ([*XL, "--gpus", "0"], "--gpus 0 must be positive"),
        ([*XL, "--gpu-memory", "-1"], "--gpu-memory -1 must be positive"),
        ([*XL, "--gpu-memory", "nan"], "--gpu-memory nan must be positive"),
        ([*XL, "--gpu-memory", "1e300"], r"--gpu-memory 1e\+300 must be positive, and below 1e15"),
        ([*XL, "--gpu-memory", "inf"], "--gpu-memory inf must be positive, and below 1e15"),
        ([*XL, "--mfu", "1e-300"], "--mfu 1e-300 must be above 0"),
        ([*XL, "--config", "xl512"], "unknown option --config"),
        ([*XL, "--deepspeed", "ds_configs/zero3.json"], "unknown option --deepspeed"),
        ([*XL, "--images", "0"], "--images 0 must be positive"),
        ([*XL, "--gpu-peak", "0"], "--gpu-peak 0 must be positive"),
        ([*XL, "--mfu", "1.5"], "--mfu 1.5 must be above 0 and at most 1"),
        ([*XL, "--mfu", "nan"], "--mfu nan must be above 0"),
        ([*XL, "--zero", "4"], "--zero"),
        ([*XL, "--gpu", "V100"], "--gpu"),
        ([*XL, "--classes", "-1"], "--classes -1 must be at least 0"),
        (["xl256", "--gpus", "8", "--latent", "4x32"], "--latent"),
        (["xl256", "--gpus", "8", "--latent", "4x3x5"], r"model.hourglass 2 does not divide 3×5 positions: 1 does"),
        ([*XL, "--train.micro_bach", "8"], r"unknown config key train.micro_bach: did you mean train.micro_batch\?"),
        ([*XL, "--train.precision", "fp32"], "give --gpu-peak TFLOPS"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], line: str, plan: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = plan(*arguments)
    assert (code, out) == (2, "")
    assert re.match(f"error: .*{line}", err) and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_with_activation_checkpointing_is_the_run_without(
    trained: Path, shades: Path, tmp_path: Path, stage: int
) -> None:
    run = tmp_path / "run"
    overrides = {"train__activation_checkpointing": "true", "train__total_images": 32, "train__decay_images": 0}
    zero = f"--deepspeed={runs.ROOT / f'ds_configs/zero{stage}.json'}"
    done = runs.run(runs.command("torchrun", 2, [*runs.arguments(shades, run, **overrides), zero]))
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(log_of(run), log_of(trained)[:4], strict=True):
        assert mine["images"] == theirs["images"]
        for key in ("loss/total", "grad_norm"):  # stage 3 sums in another order than the run without, at stage 2
            assert mine[key] == pytest.approx(theirs[key], rel=0 if stage == 2 else 1e-5)
