"""Some ranks train a small network; each step the masters are gathered, and averaged in full beside the sharded EMA."""

import math
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param

from diffussm.config import TrainConfig
from diffussm.models.block import HourglassBlock
from diffussm.training.cluster import connect
from diffussm.training.ema import ShardedEMA
from diffussm.training.engine import make_engine, set_rates

stage, out = int(sys.argv[1]), Path(sys.argv[2])
cluster = connect()
BATCH = 2 * cluster.world_size
torch.manual_seed(0)


model = HourglassBlock(8, 2, 4)
torch.nn.init.normal_(model.modulation.weight)
train = TrainConfig(lr=1e-2, ssm_lr=1e-3, global_batch=BATCH)
ds_config = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
}
engine = make_engine(model, ds_config, train)
ema = ShardedEMA(engine, length=40)


def masters():
    full = {}
    for name, parameter in engine.module.named_parameters():
        gathered = safe_get_full_fp32_param(parameter)
        full[name] = (parameter if gathered is None else gathered).detach().clone()
    return full


reference = masters()
for step in range(1, 9):
    set_rates(engine, train, 1.0)
    generator = torch.Generator().manual_seed(10 * step + cluster.rank)
    loss = engine(torch.randn(2, 3, 8, generator=generator), torch.randn(2, 8, generator=generator)).square().mean()
    engine.backward(loss)
    engine.step()
    before = masters()
    ema.update(BATCH * step, BATCH)
    decay = min(math.exp(-BATCH / 40), step / (step + 9))
    for name, weight in before.items():
        reference[name] = torch.lerp(reference[name], weight, 1 - decay)

state = ema.state_dict()
after = masters()
for name, weight in reference.items():
    assert torch.equal(state[name], weight), name
    assert torch.equal(before[name], after[name]), f"{name}: the masters have changed"
    assert not torch.equal(state[name], after[name]), f"{name}: the average is not one"

fresh = ShardedEMA(engine, length=40)
fresh.load_state_dict(state)
assert all(torch.equal(fresh.state_dict()[name], state[name]) for name in state)
assert all(torch.equal(weight, after[name]) for name, weight in masters().items())
if cluster.is_main:
    (out / "done").write_text(f"{len(state)} parameters\n")
cluster.barrier()
