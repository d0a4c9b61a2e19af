"""Two ranks at each ZeRO stage, under autocast: in which dtypes how many elements of gradients travel."""

import json
import sys
from collections import Counter
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from diffussm.config import TrainConfig
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.training.cluster import connect
from diffussm.training.engine import complete_ds_config, make_engine

out = Path(sys.argv[1])
cluster = connect()
train = TrainConfig(global_batch=2, precision="bf16")
sent: Counter[str] = Counter()


def recording(function):
    def call(*arguments, **keywords):
        tensor = keywords.get("input", keywords.get("tensor", arguments[-1] if arguments else None))
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            sent[str(tensor.dtype)[6:]] += tensor.numel()
        return function(*arguments, **keywords)

    return call


found = {}
for wanted in (None, "fp32"):
    for stage in (1, 2, 3):
        torch.manual_seed(0)
        model = DiffuSSM(ModelConfig("custom", 32, 2, 2, 8), 4, 10)
        model.set_ssm_backend("fft")
        ssm = sum(p.numel() for p in model.parameters() if hasattr(p, "is_ssm"))
        table = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        table |= {"communication_data_type": wanted} if wanted else {}
        engine = make_engine(model, complete_ds_config(table, train, cluster), train)
        loss = engine(torch.randn(1, 4, 4, 4), torch.tensor([1])).square().mean()
        backend = deepspeed.comm.comm.cdb
        places = [(dist, "all_reduce"), (dist, "reduce"), (backend, "reduce_scatter_function")]
        originals = [(place, name, getattr(place, name)) for place, name in places]
        sent.clear()
        for place, name, function in originals:
            setattr(place, name, recording(function))
        engine.backward(loss)
        engine.step()
        for place, name, function in originals:
            setattr(place, name, function)
        found[f"{wanted} {stage}"] = dict(sent)
        if stage < 3:
            total = sum(p.numel() for p in model.parameters())
        del engine, model
if cluster.is_main:
    (out / "found.json").write_text(json.dumps({"ssm": ssm, "total": total, "found": found}))
cluster.barrier()
