"""Two ranks at each ZeRO stage: the bytes of their tensors between steps and at a step's peak, and of a checkpoint."""

import gc
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from diffussm.config import TrainConfig
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.training.cluster import connect
from diffussm.training.ema import ShardedEMA
from diffussm.training.engine import make_engine
from diffussm.training.partition import MOMENTS, Partition
from diffussm.training.plan import REDUCE_BUCKET
from diffussm.training.tensor_file import pack

out = Path(sys.argv[1])
cluster = connect()
train = TrainConfig(global_batch=4, precision="fp32")


def held() -> int:
    """Bytes of all tensors but DeepSpeed's buckets, of which next to nothing is ever filled."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for size in sizes.values() if size != 4 * REDUCE_BUCKET)


def peak(function) -> int:
    """Bytes that the function holds at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [change.nbytes() for change in sorted(changes, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))


found = {}
for stage in range(4):
    before = held()
    torch.manual_seed(0)
    model = DiffuSSM(ModelConfig("custom", 128, 3, 2, 8), 4, 10)
    model.set_ssm_backend("fft")
    ds_config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": 0,  # every parameter of so small a model would stay gathered
        },
    }
    engine = make_engine(model, ds_config, train)
    partition = Partition(engine)
    ema = ShardedEMA(partition, [40])
    for _ in range(2):  # Adam's moments are made in the first step
        engine.backward(engine(torch.randn(2, 4, 4, 4), torch.tensor([1, 2])).square().mean())
        step = held() + peak(engine.step)
    between = held()
    kinds = {"weight": partition.masters, "ema": ema.shadows[40]} | {key: partition.moments(key) for key in MOMENTS}
    file = pack({f"{kind}:{f.name}": f.of(flats) for kind, flats in kinds.items() for f in partition.fragments})
    written = torch.tensor(len(file))
    dist.all_reduce(written)
    found[stage] = {"between": between - before, "step": step - before, "checkpoint": int(written)}
    del model, engine, partition, ema, kinds, file
if cluster.is_main:
    (out / "found.json").write_text(json.dumps(found))
cluster.barrier()
