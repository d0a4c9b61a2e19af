"""Some ranks train a small network; averages, norms and means are computed in full beside the sharded ones.

Clipping acts at stages 1 to 3, whose engines tell the norm before it; at stage 0 there is none.
"""

import math
import sys
from pathlib import Path

import deepspeed
import psutil
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch.distributed.tensor.debug import CommDebugMode

from diffussm.config import TrainConfig
from diffussm.diffusion.losses import Losses
from diffussm.models.block import HourglassBlock
from diffussm.training.cluster import connect
from diffussm.training.ema import ShardedEMA
from diffussm.training.engine import parameter_groups, set_rates
from diffussm.training.optimizer import NormedAdamW
from diffussm.training.partition import Partition
from diffussm.training.telemetry import LossMeter, gradient_norms, memory_figures, weight_figures

stage, out = int(sys.argv[1]), Path(sys.argv[2])
cluster = connect()
BATCH = 2 * cluster.world_size
LENGTHS = [2, 40]  # images: with 4 or 6 a step, the young run shortens the second only
torch.manual_seed(0)


model = HourglassBlock(8, 2, 4)
torch.nn.init.normal_(model.modulation.weight)
whole = HourglassBlock(8, 2, 4)
train = TrainConfig(lr=1e-2, ssm_lr=1e-3, global_batch=BATCH)
ds_config = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.1 if stage else 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 300},
}
optimizer = NormedAdamW(parameter_groups(model, train), guard=stage == 0, betas=train.betas)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
partition = Partition(engine)
ema = ShardedEMA(partition, LENGTHS)
assert stage < 3 or len(partition.masters) > 2, "stage 3 steps each group in several parts"


def masters():
    full = {}
    for name, parameter in engine.module.named_parameters():
        gathered = safe_get_full_fp32_param(parameter)
        full[name] = (parameter if gathered is None else gathered).detach().clone()
    return full


def loss_of(network, step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    x, condition = torch.randn(2, 3, 8, generator=generator), torch.randn(2, 8, generator=generator)
    return network(x, condition).square().mean()


def train_step(step, factor=1.0):
    set_rates(engine, train, 1.0)
    engine.backward(factor * loss_of(engine, step, cluster.rank))
    engine.step()


def norm(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).double().norm().item()


def by_group(tensors):
    """The tensors of each optimizer group, of a dict by name."""
    groups = {"dense": [], "ssm": []}
    for name, parameter in whole.named_parameters():
        groups["ssm" if hasattr(parameter, "is_ssm") else "dense"].append(tensors[name])
    return groups


# fragments cover each element once
places = [None] * cluster.world_size
dist.all_gather_object(places, [(fragment.name, fragment.start, fragment.size) for fragment in partition.fragments])
for name, parameter in whole.named_parameters():
    covered = torch.zeros(parameter.numel(), dtype=torch.int)
    for _, start, size in (place for rank in places for place in rank if place[0] == name):
        assert 0 <= start < start + size <= parameter.numel()
        covered[start : start + size] += 1
    assert bool((covered == 1).all()), name
    assert partition.shapes[name] == parameter.shape

# averages, against full ones
reference = {length: masters() for length in LENGTHS}
for step in range(1, 9):
    weights = masters()
    optimizer.recording = step == 8
    train_step(step)
    assert engine.was_step_applied()
    after = masters()
    with CommDebugMode() as calls:
        ema.update(BATCH * step, BATCH)
    assert calls.get_total_counts() == 0, calls.get_comm_counts()
    for length in LENGTHS:
        decay = min(math.exp(-BATCH / length), step / (step + 9))
        for name, weight in after.items():
            reference[length][name] = torch.lerp(reference[length][name], weight, 1 - decay)
for length in LENGTHS:
    average = ema.gather(length)
    for name, weight in reference[length].items():
        assert torch.equal(average[name], weight), name
        assert not torch.equal(average[name], after[name]), f"{name}: the average is not one"
assert not torch.equal(reference[2]["w0.weight"], reference[40]["w0.weight"])
gathered = partition.gather(partition.masters)
for name, weight in masters().items():
    assert torch.equal(weight, after[name]), f"{name}: the masters have changed"
    assert torch.equal(weight, gathered[name]), name

# gradients of the last step, against a plain network's on the same global batch
whole.load_state_dict(weights)
sum(loss_of(whole, 8, rank) for rank in range(cluster.world_size)).div(cluster.world_size).backward()
gradients = by_group({name: parameter.grad for name, parameter in whole.named_parameters()})
total = norm([*gradients["dense"], *gradients["ssm"]])
told = engine.get_global_grad_norm()
assert total > 0.2, "clipping has nothing to do"
assert told is None if stage == 0 else float(told) == pytest.approx(total, rel=1e-5)
norms = gradient_norms(optimizer.squares, told, cluster.device, whole=stage == 0)
assert norms == pytest.approx({f"grad_norm/{group}": norm(each) for group, each in gradients.items()}, rel=1e-5)

# weights
with CommDebugMode() as calls:
    figures = weight_figures(partition, ema.shadows)
assert calls.get_total_counts() == 2, "the counter counts, and there are two calls"
groups = by_group(after)
expected = {f"norm/{group}": norm(each) for group, each in groups.items()}
for name, figure in (("ssm.log_dt", "ssm/dt"), ("ssm.log_A_real", "ssm/decay")):
    expected |= {f"{figure}_min": after[name].exp().min().item(), f"{figure}_max": after[name].exp().max().item()}
for length in LENGTHS:
    distance = norm([reference[length][name] - weight for name, weight in after.items()])
    expected[f"ema/distance_{length}"] = distance / norm(after.values())
assert figures == pytest.approx(expected, rel=1e-6)
assert expected["ssm/decay_min"] < expected["ssm/decay_max"]

# losses: rank r adds a micro-batch of mse r and 3 r at timesteps of quarters 1 and r + 1
ranks = range(cluster.world_size)
meter = LossMeter(steps=100, device=cluster.device)
mse = torch.tensor([cluster.rank, 3.0 * cluster.rank])
meter.add(Losses(3 * mse, mse, 2 * mse), torch.tensor([24, 25 * cluster.rank]))
meter.commit()
means = meter.means()
mean = sum(2 * r for r in ranks) / len(ranks)
first = sum(ranks) / (len(ranks) + 1)
later = {f"loss/mse_q{r + 1}": 3.0 * r for r in ranks if r}
assert means == pytest.approx(
    {"loss/total": 3 * mean, "loss/mse": mean, "loss/vlb": 2 * mean, "loss/mse_q1": first, **later}
)

# all ranks tell the same
own = psutil.Process().memory_info().rss / 2**30
memory = memory_figures(cluster.device)
assert memory["memory/rss_gib"] > 0.99 * own
answers = [None] * cluster.world_size
dist.all_gather_object(answers, (norms, figures, means, memory))
assert all(answer == answers[0] for answer in answers)

# a gradient that one rank finds not finite
train_step(9, factor=math.nan if cluster.is_main else 1.0)
assert not engine.was_step_applied()
assert all(torch.equal(weight, after[name]) for name, weight in masters().items())
assert partition.steps == 8
train_step(10)
assert engine.was_step_applied()
assert not torch.equal(masters()["w0.weight"], after["w0.weight"])

if cluster.is_main:
    (out / "done").write_text(f"{len(after)} parameters\n")
cluster.barrier()
