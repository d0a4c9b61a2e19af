"""The figures that a run logs, against closed forms on one rank; on several, see tests/distributed/ema_worker.py."""

import math
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist

from diffussm.diffusion.losses import Losses
from diffussm.training.optimizer import NormedAdamW, sum_of_squares
from diffussm.training.partition import Fragment
from diffussm.training.telemetry import LossMeter, StepClock, gradient_norms, memory_figures, weight_figures

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses(*mse):
    """With vlb = 2 mse and total = 3 mse."""
    mse = torch.tensor(mse)
    return Losses(3 * mse, mse, 2 * mse)


def test_means_are_of_micro_batches_and_quarters_of_samples():
    meter = LossMeter(steps=1000, device=CPU)
    meter.add(losses(1.0, 3.0), torch.tensor([0, 249]))
    meter.add(losses(8.0), torch.tensor([999]))
    meter.add(losses(4.0, 6.0, 2.0), torch.tensor([250, 999, 750]))
    meter.commit()
    assert meter.means() == {
        "loss/total": 14.0,
        "loss/mse": 14 / 3,  # of 2, 8 and 4
        "loss/vlb": 28 / 3,
        "loss/mse_q1": 2.0,
        "loss/mse_q2": 4.0,
        "loss/mse_q4": 16 / 3,
    }
    assert meter.means() == {}


def test_losses_of_steps_not_taken_do_not_count():
    meter = LossMeter(steps=8, device=CPU)
    meter.add(losses(1.0), torch.tensor([0]))
    meter.commit()
    meter.add(losses(2.0), torch.tensor([3]))
    meter.add(losses(math.nan, math.inf), torch.tensor([0, 7]))
    meter.drop()
    meter.add(losses(3.0), torch.tensor([4]))
    meter.commit()
    meter.add(losses(100.0), torch.tensor([7]))
    means = meter.means()
    assert (means["loss/mse"], means["loss/mse_q1"], means["loss/mse_q3"]) == (2.0, 1.0, 3.0)
    assert "loss/mse_q2" not in means and "loss/mse_q4" not in means
    meter.commit()
    assert meter.means()["loss/mse"] == 100.0, "what waits outlasts a record"


def test_the_clock_tells_parts_apart():
    clock = StepClock(CPU)
    made = time.perf_counter()
    for _ in range(2):
        with clock.part("data"):
            time.sleep(0.02)
        for _ in range(2):
            with clock.part("forward"):
                time.sleep(0.01)
    before = time.perf_counter()
    with clock.part("save"):
        time.sleep(0.1)
    saved = 1e3 * (time.perf_counter() - before)
    passed = 1e3 * (time.perf_counter() - made)
    means = clock.means(2)
    assert list(means) == ["time/data_ms", "time/forward_ms", "time/save_ms", "time/step_ms"]
    assert min(means["time/data_ms"], means["time/forward_ms"]) >= 20
    assert 50 <= means["time/save_ms"] <= saved / 2
    assert means["time/step_ms"] >= means["time/data_ms"] + means["time/forward_ms"]
    assert means["time/step_ms"] >= (passed - saved) / 2
    assert list(clock.means(1)) == ["time/step_ms"]


def test_ranges_are_of_what_the_logarithms_stand_for():
    flat = torch.tensor([3.0, 4.0, math.log(0.5), math.log(0.1), math.log(0.02), 0.0, 99.0])
    partition = SimpleNamespace(
        masters=[flat],
        device=CPU,
        fragments=[
            Fragment("w", "dense", 0, 2, 0, 0),
            Fragment("ssm.log_A_real", "ssm", 0, 1, 0, 2),
            Fragment("ssm.log_dt", "ssm", 0, 2, 0, 3),
            Fragment("ssm.C", "ssm", 0, 1, 0, 5),  # and padding after it
        ],
    )
    shadow = flat.clone()
    shadow[0] += 2
    shadow[6] = -1
    figures = weight_figures(partition, {2560000.0: [shadow]})
    ssm = math.log(0.5) ** 2 + math.log(0.1) ** 2 + math.log(0.02) ** 2
    assert figures == pytest.approx(
        {
            "norm/dense": 5.0,
            "norm/ssm": ssm**0.5,
            "ssm/dt_min": 0.02,
            "ssm/dt_max": 0.1,
            "ssm/decay_min": 0.5,
            "ssm/decay_max": 0.5,
            "ema/distance_2560000": 2 / (25 + ssm) ** 0.5,
        }
    )


def test_gradient_norms_are_scaled_back():
    assert gradient_norms({"dense": torch.tensor(0.09), "ssm": 0.16}, 10.0, CPU) == pytest.approx(
        {"grad_norm/dense": 6.0, "grad_norm/ssm": 8.0}
    )
    assert gradient_norms({"dense": 9.0, "ssm": 16.0}, None, CPU, whole=True) == {
        "grad_norm/dense": 3.0,
        "grad_norm/ssm": 4.0,
    }
    assert gradient_norms({"dense": 0.0, "ssm": 0.0}, 0.0, CPU) == {"grad_norm/dense": 0.0, "grad_norm/ssm": 0.0}
    assert gradient_norms({}, math.inf, CPU) == {}


def test_squares_are_summed_by_chunk(monkeypatch):
    monkeypatch.setattr("diffussm.training.optimizer.CHUNK", 4)
    assert sum_of_squares(torch.arange(11.0).view(11, 1).expand(11, 2)).item() == pytest.approx(770)


def test_memory_is_this_process_s():
    assert memory_figures(CPU) == {"memory/rss_gib": pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.5)}


def optimizers(**options):
    """A NormedAdamW and torch's own, of equal parameters in two groups."""
    made = []
    for cls, extra in ((NormedAdamW, options), (torch.optim.AdamW, {})):
        torch.manual_seed(0)
        dense, ssm = torch.randn(3, 2), torch.randn(5)
        groups = [{"name": "dense", "params": [dense]}, {"name": "ssm", "params": [ssm], "lr": 0.1}]
        made.append((cls(groups, lr=0.01, **extra), (dense, ssm)))
    return made


def test_the_optimizer_is_torch_s_and_tells_squares():
    (normed, mine), (plain, theirs) = optimizers(guard=True)
    for recording in (False, True):
        normed.recording = recording
        for optimizer, weights in ((normed, mine), (plain, theirs)):
            for number, weight in enumerate(weights, 1):
                weight.grad = torch.full_like(weight, number)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert normed.squares == (pytest.approx({"dense": 6.0, "ssm": 20.0}) if recording else {})
    both = normed.param_groups
    for group in both:  # as DeepSpeed does it
        normed.param_groups = [group]
        normed.step()
    assert normed.squares == pytest.approx({"dense": 12.0, "ssm": 40.0})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_guard_leaves_everything_as_it_was(bad):
    ((normed, (dense, ssm)), _) = optimizers(guard=True)
    normed.recording = True
    dense.grad, ssm.grad = torch.ones_like(dense), torch.ones_like(ssm)
    normed.step()
    weights, first = (dense.clone(), ssm.clone()), normed.state[dense]["exp_avg"].clone()
    normed.squares.clear()
    ssm.grad[3] = bad
    normed.step()
    assert normed.overflow
    assert torch.equal(dense, weights[0]) and torch.equal(ssm, weights[1])
    assert torch.equal(normed.state[dense]["exp_avg"], first) and normed.state[dense]["step"] == 1
    assert normed.squares == {}
    ssm.grad[3] = 1
    normed.step()
    assert not normed.overflow and normed.state[ssm]["step"] == 2
