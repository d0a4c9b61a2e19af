"""The real entry point under its launchers: progress is exact through kills, launchers and world sizes."""

import shutil
import signal
import time
from pathlib import Path

import pytest
import runs
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffussm.data.index import Index
from diffussm.data.store import open_store
from diffussm.errors import UserError
from diffussm.files import hold_lock
from diffussm.training import checkpoint
from diffussm.training.monitor import log_of

pytestmark = pytest.mark.distributed

EXACT = ("images", "loss/total", "loss/mse", "loss/vlb", "grad_norm", "lr/dense", "lr/ssm")


KEPT = [".owner.lock", "images-000000000064", "images-000000000096", "latest", "owner"]
FILES = ["checkpoints", "config.yaml", "ds_config.json", "lock", "log.jsonl", "tensorboard"]


def seen(run: Path) -> int:
    """Images of the last record."""
    return max((record["images"] for record in log_of(run)), default=0)


def curve(run: Path) -> list[tuple]:
    return [tuple(record[key] for key in EXACT) for record in log_of(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.find(open_store(run / "checkpoints"))
    return {f"{kind}:{name}": tensor for kind in found.kinds for name, tensor in found.tensors(kind).items()}


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
    assert kept == KEPT
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    for name in ("loss/total", "loss/mse", "loss/vlb", "grad_norm", "lr/dense", "lr/ssm", "images_per_second", "mfu"):
        assert [e.step for e in events.Scalars(name)] == list(range(8, 97, 8)), name
    assert [e.step for e in events.Images("samples")] == [48, 96]
    assert (trained / "config.yaml").is_file()


def test_killed_at_any_moment_it_goes_on_bit_for_bit(trained, shades, tmp_path):
    run = tmp_path / "run"
    command = runs.command("deepspeed", 2, runs.arguments(shades, run))
    for images in (24, 40, 88):  # before the first checkpoint, at and after others
        with runs.started(command, tmp_path / "log", lambda so_far=images: seen(run) >= so_far):
            pass
    done = runs.run(command)
    assert done.returncode == 0, done.stderr
    assert curve(run) == curve(trained)
    assert same(weights(run), weights(trained))
    assert sorted(p.name for p in run.iterdir()) == FILES
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == KEPT


def test_a_torn_checkpoint_is_passed_over(trained, shades, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (victim,) = run.glob("checkpoints/images-000000000096/rank-00001-*.safetensors")
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
        if name.startswith("weight:") and name.endswith(("log_dt", "C", "skip", "w0.weight")):
            assert (weight != weight.bfloat16().float()).float().mean() > 0.9, name


@pytest.mark.parametrize("stage", [1, 3])
def test_other_zero_stages_resume_and_agree(stage, trained, shades, tmp_path):
    run = tmp_path / "run"
    zero = ["--deepspeed", str(runs.ROOT / f"ds_configs/zero{stage}.json")]
    once = [*runs.arguments(shades, run), *zero]
    with runs.started(runs.command("torchrun", 2, once), tmp_path / "log", lambda: seen(run) >= 40):
        pass
    done = runs.run(runs.command("torchrun", 2, once))
    assert done.returncode == 0, done.stderr
    assert "going on at" in done.stderr
    for mine, theirs in zip(curve(run), curve(trained), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    for name, weight in weights(run).items():
        assert torch.allclose(weight, weights(trained)[name], atol=1e-5), name


@pytest.mark.parametrize("backend", ["fft", "chunked"])
def test_a_run_keeps_the_backend_that_it_began_with(backend, shades, tmp_path):
    """Whichever is the faster here: with the other it would round otherwise from there on."""
    run = tmp_path / "run"
    for ssm_backend, images in ((backend, 32), ("auto", 64)):
        overrides = {"train__ssm_backend": ssm_backend, "train__total_images": images}
        done = runs.run(runs.command("python", 1, runs.arguments(shades, run, **overrides)))
        assert done.returncode == 0, done.stderr
        assert f"S4D by {backend};" in done.stderr
        assert yaml.safe_load((run / "config.yaml").read_text())["train"]["ssm_backend"] == backend
    assert seen(run) == 64


def test_auto_is_chosen_once_for_all_ranks(shades, tmp_path):
    run = tmp_path / "run"
    overrides = {"train__ssm_backend": "auto", "train__total_images": 32, "train__decay_images": 0}
    done = runs.run(runs.command("torchrun", 2, runs.arguments(shades, run, **overrides)))
    assert done.returncode == 0, done.stderr
    chosen = yaml.safe_load((run / "config.yaml").read_text())["train"]["ssm_backend"]
    assert chosen in ("fft", "chunked")
    saved = checkpoint.find(open_store(run / "checkpoints")).meta
    assert saved["config"]["train"]["ssm_backend"] == chosen


def test_records_between_checkpoints_are_those_of_an_unbroken_run(shades, tmp_path):
    keys = {"train__log_images": 24, "train__checkpoint_images": 32, "train__decay_images": 0}
    whole = runs.run(runs.command("python", 1, runs.arguments(shades, tmp_path / "a", train__total_images=64, **keys)))
    assert whole.returncode == 0, whole.stderr
    for total in (32, 64):
        args = runs.arguments(shades, tmp_path / "b", train__total_images=total, **keys)
        assert runs.run(runs.command("python", 1, args)).returncode == 0
    assert [images for images, *_ in curve(tmp_path / "a")] == [24, 32, 48, 64]
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(shades, tmp_path):
    run = tmp_path / "run"
    keys = {"train__lr": 1e30, "train__ssm_lr": 1e30, "train__warmup_images": 0, "train__max_skipped": 2}
    done = runs.run(runs.command("python", 1, runs.arguments(shades, run, train__clip=0, **keys)))
    assert done.returncode == 2
    assert "3 steps in a row had a loss that is not finite" in errors(done.stderr)[0]
    assert not list((run / "checkpoints").glob("images-*"))


def test_many_ranks_refuse_with_one_line(trained, shades, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    done = runs.run(runs.command("deepspeed", 2, runs.arguments(shades, run, train__resume="none")))
    assert done.returncode == 2
    assert len(errors(done.stderr)) == 1 and "say auto" in errors(done.stderr)[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"model__width": 32}, "was saved with model"),
        ({"train__global_batch": 16}, "was saved with global_batch 8, this run has 16"),
        ({"train__seed": 1}, "was saved with seed 0, this run has 1"),
        ({"train__resume": "/nowhere"}, "exists: say auto, or choose another --run_dir"),
    ],
)
def test_what_does_not_continue_the_run_is_refused(trained, shades, tmp_path, overrides, line):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"}
    done = runs.run(runs.command("python", 1, runs.arguments(shades, run, **overrides)))
    assert done.returncode == 2
    assert len(errors(done.stderr)) == 1 and line in errors(done.stderr)[0]
    assert before == {p: p.read_bytes() for p in before}


def test_a_path_that_is_no_checkpoint_is_refused(shades, tmp_path):
    args = runs.arguments(shades, tmp_path / "run", train__resume="/nowhere")
    done = runs.run(runs.command("python", 1, args))
    assert done.returncode == 2
    assert "/nowhere is not a complete checkpoint" in errors(done.stderr)[0]


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
    run = tmp_path / "run"
    command = runs.command("python", 1, runs.arguments(shades, run, train__total_images=100_000))
    with runs.started(command, tmp_path / "log", lambda: seen(run) > 0) as first:
        second = runs.run(command)
        assert second.returncode == 2
        assert f"is in use by process {first.pid}" in second.stderr
        assert first.poll() is None


def test_ranks_end_with_their_launcher(shades, tmp_path):
    run = tmp_path / "run"
    command = runs.command("torchrun", 2, runs.arguments(shades, run, train__total_images=100_000))
    with runs.started(command, tmp_path / "log", lambda: seen(run) > 0) as launcher:
        launcher.send_signal(signal.SIGKILL)  # the launcher alone
        launcher.wait()
        deadline = time.monotonic() + 20
        while True:
            try:
                hold_lock(run / "lock").close()
                break
            except UserError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
