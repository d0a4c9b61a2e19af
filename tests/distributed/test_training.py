"""The real entry point under its launchers: progress is exact through kills, launchers and world sizes."""

import shutil
import signal
import time
from pathlib import Path

import pytest
import runs
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffussm.data.index import Index
from diffussm.data.store import open_store
from diffussm.errors import UserError
from diffussm.files import hold_lock
from diffussm.training import checkpoint
from diffussm.training.monitor import log_of

pytestmark = pytest.mark.distributed

EXACT = ("images", "loss/total", "loss/mse", "loss/vlb", "grad_norm", "lr/dense", "lr/ssm")


def curve(run: Path) -> list[tuple]:
    return [tuple(record[key] for key in EXACT) for record in log_of(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_ema(checkpoint.find(run / "checkpoints"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error:")]


def test_a_run_leaves_what_it_promises(trained):
    records = log_of(trained)
    assert [record["images"] for record in records] == list(range(8, 97, 8))
    assert records[-1]["loss/total"] < 0.9 * records[0]["loss/total"]
    assert [r["lr/dense"] for r in records] == pytest.approx(
        [1e-2 * f for f in (0.25, 0.5, 0.75, *[1] * 6, 0.75, 0.5, 0.25)]
    )
    assert all(r["lr/ssm"] == pytest.approx(r["lr/dense"] / 2) for r in records)
    kept = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert kept == ["images-000000000064", "images-000000000096", "latest"]
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    for name in ("loss/total", "loss/mse", "loss/vlb", "grad_norm", "lr/dense", "lr/ssm", "images_per_second", "mfu"):
        assert [e.step for e in events.Scalars(name)] == list(range(8, 97, 8)), name
    assert [e.step for e in events.Images("samples")] == [48, 96]
    assert (trained / "config.yaml").is_file()


def test_killed_at_any_moment_it_goes_on_bit_for_bit(trained, shades, tmp_path):
    run = tmp_path / "run"
    command = runs.command("deepspeed", 2, runs.arguments(shades, run))
    for images in (24, 40, 88):  # before the first checkpoint, at and after others
        process = runs.start(command)
        deadline = time.monotonic() + 120
        while not (log := log_of(run)) or log[-1]["images"] < images:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.01)
        runs.kill(process)
    done = runs.run(command)
    assert done.returncode == 0, done.stderr
    assert curve(run) == curve(trained)
    assert same(weights(run), weights(trained))
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml", "lock", "log.jsonl", "tensorboard"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir())[-1] == "latest"


def test_a_torn_checkpoint_is_passed_over(trained, shades, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = checkpoint.find(run / "checkpoints")
    victim = next((newest / "deepspeed").glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-100])
    done = runs.run(runs.command("torchrun", 2, runs.arguments(shades, run)))
    assert done.returncode == 0, done.stderr
    assert f"{victim.name} is not the file that was saved" in done.stderr
    assert "going on at 64 images" in done.stderr
    assert curve(run) == curve(trained)
    assert same(weights(run), weights(trained))


def test_one_process_without_a_launcher_sees_the_same_batches(trained, shades, tmp_path):
    """The samples, draws and gradients of a step do not depend on the world size; only the order of sums does."""
    done = runs.run(runs.command("python", 1, runs.arguments(shades, tmp_path / "run")))
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(curve(tmp_path / "run"), curve(trained), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)


def test_bf16_autocast_keeps_parameters_in_fp32(trained, shades, tmp_path):
    overrides = {"train__precision": "bf16", "train__total_images": 32, "train__decay_images": 0}
    done = runs.run(runs.command("torchrun", 2, runs.arguments(shades, tmp_path / "run", **overrides)))
    assert done.returncode == 0, done.stderr
    assert "bfloat16" in done.stderr
    for mine, theirs in zip(log_of(tmp_path / "run"), log_of(trained)[:4], strict=True):
        assert mine["loss/mse"] == pytest.approx(theirs["loss/mse"], rel=0.02)
    for name, weight in weights(tmp_path / "run").items():
        if name.endswith(("log_dt", "C", "skip", "w0.weight")):
            assert (weight != weight.bfloat16().float()).float().mean() > 0.9, name


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"model__width": 32}, "was saved with model"),
        ({"train__global_batch": 16}, "was saved with train.global_batch 8, this run has 16"),
        ({"train__seed": 1}, "was saved with train.seed 0, this run has 1"),
        ({"train__resume": "none"}, "holds checkpoints: say auto"),
        ({"train__resume": "/nowhere"}, "/nowhere is not a complete checkpoint"),
        ({}, "was saved with world size 2, this run has 1"),
    ],
)
def test_what_does_not_continue_the_run_is_refused(trained, shades, tmp_path, overrides, line):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in ("lock", "config.yaml")}
    done = runs.run(runs.command("python", 1, runs.arguments(shades, run, **overrides)))
    assert done.returncode == 2
    assert len(errors(done.stderr)) == 1 and line in errors(done.stderr)[0]
    assert before == {p: p.read_bytes() for p in before}


def test_an_altered_sample_stops_the_run_and_is_named(shades, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shades, data)
    shard = sorted((data / "train").glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    index = Index.load(open_store(data / "train"))
    for sample in index.samples[: index.shards[0].count]:
        content[int(sample["offset"]) + 100] ^= 1
    shard.write_bytes(content)
    done = runs.run(runs.command("deepspeed", 2, runs.arguments(data, tmp_path / "run")))
    assert done.returncode == 2
    assert shard.name in errors(done.stderr)[0] and "sample" in errors(done.stderr)[0]


def test_two_runs_cannot_write_into_one_folder(shades, tmp_path):
    command = runs.command("python", 1, runs.arguments(shades, tmp_path / "run", train__total_images=100_000))
    first = runs.start(command)
    while not log_of(tmp_path / "run"):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    second = runs.run(command)
    assert second.returncode == 2
    assert f"is in use by process {first.pid}" in second.stderr
    assert first.poll() is None
    runs.kill(first)


def test_ranks_end_with_their_launcher(shades, tmp_path):
    args = runs.arguments(shades, tmp_path / "run", train__total_images=100_000)
    launcher = runs.start(runs.command("torchrun", 2, args))
    while not log_of(tmp_path / "run"):
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.05)
    launcher.send_signal(signal.SIGKILL)  # the launcher alone
    launcher.wait()
    deadline = time.monotonic() + 20
    while True:
        try:
            hold_lock(tmp_path / "run/lock").close()
            break
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    runs.kill(launcher)
