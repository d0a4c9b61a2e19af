"""DeepSpeed's config: what is filled in, and what is refused."""

import json

import pytest
import torch

from diffussm.config import TrainConfig
from diffussm.errors import UserError
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.training.cluster import Cluster
from diffussm.training.engine import (
    LOW_PRECISION_MODULES,
    complete_ds_config,
    parameter_groups,
    read_ds_config,
    split_batch,
)

pytestmark = pytest.mark.unit

TWO = Cluster(rank=0, world_size=2, local_rank=0, device=torch.device("cpu"), host="here", control=None, saving=None)


def written(tmp_path, config):
    path = tmp_path / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def test_only_the_state_space_and_the_classes_send_fp32_gradients():
    model = DiffuSSM(ModelConfig("custom", 16, 2), channels=4, num_classes=3)
    owners = {type(m) for m in model.modules() if list(m.parameters(recurse=False))}
    high = {cls.__name__ for cls in owners if f"{cls.__module__}.{cls.__qualname__}" not in LOW_PRECISION_MODULES}
    assert high == {"BiSSM", "Embedding"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_auto_is_filled(stage):
    config = read_ds_config(f"ds_configs/zero{stage}.json")
    filled = complete_ds_config(config, TrainConfig(global_batch=24, micro_batch=4, clip=0.5, precision="bf16"), TWO)
    assert '"auto"' not in json.dumps(filled)
    assert (filled["train_batch_size"], filled["train_micro_batch_size_per_gpu"]) == (24, 4)
    assert filled["gradient_accumulation_steps"] == 3
    assert filled["gradient_clipping"] == 0.5
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": LOW_PRECISION_MODULES}
    assert filled["torch_autocast"] == autocast
    assert filled["zero_optimization"]["stage"] == stage


def test_fp32_turns_autocast_off():
    config = read_ds_config("ds_configs/zero2.json")
    assert not complete_ds_config(config, TrainConfig(precision="fp32"), TWO)["torch_autocast"]["enabled"]


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "split"),
    [(64, None, 2, (32, 1)), (64, 8, 2, (8, 4)), (6, 1, 3, (1, 2)), (5, None, 1, (5, 1))],
)
def test_batches_split(global_batch, micro_batch, world_size, split):
    assert split_batch(TrainConfig(global_batch=global_batch, micro_batch=micro_batch), world_size) == split


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "values"),
    [
        (64, None, 3, ": 63 or 66 can$"),
        (64, 24, 2, ": 48 or 96 can, or train.micro_batch 16 can$"),
        (65, 24, 2, ": 48 or 96 can$"),
        (256, 8, 64, ": 512 can, or train.micro_batch 4 can$"),
        (2, None, 4, ": 4 can$"),
    ],
)
def test_impossible_batches_are_refused_with_those_that_work(global_batch, micro_batch, world_size, values):
    with pytest.raises(UserError, match=values):
        split_batch(TrainConfig(global_batch=global_batch, micro_batch=micro_batch), world_size)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"bf16": {"enabled": True}}, "bf16.enabled .*torch_autocast"),
        ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}, "bf16.enabled"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "must be bfloat16"),
        ({"optimizer": {"type": "Adam"}}, "optimizer belongs to"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"bf16": 3}', "bf16 is not a JSON object"),
    ],
)
def test_refused_configs(tmp_path, config, line):
    with pytest.raises(UserError, match=line):
        read_ds_config(written(tmp_path, config))


def test_a_missing_config_names_one_that_exists(tmp_path):
    with pytest.raises(UserError, match="zero2"):
        read_ds_config(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("key", "value"), [("train_batch_size", 32), ("gradient_clipping", 0.1), ("train_micro_batch_size_per_gpu", 1)]
)
def test_a_number_that_contradicts_the_run_is_refused(key, value):
    with pytest.raises(UserError, match=key):
        complete_ds_config({key: value}, TrainConfig(global_batch=64), TWO)


def test_state_space_parameters_have_their_own_rate_and_no_decay():
    model = DiffuSSM(ModelConfig("custom", 16, 2, 2, 8), channels=4, num_classes=10)
    dense, ssm = parameter_groups(model, TrainConfig(lr=1e-3, ssm_lr=1e-4, weight_decay=0.1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    ssm_names = {names[p].split(".ssm.")[1] for p in ssm["params"]}
    assert ssm_names == {"log_dt", "log_A_real", "A_imag", "C", "skip"}
    assert (ssm["lr"], ssm["weight_decay"]) == (1e-4, 0.0)
    assert (dense["lr"], dense["weight_decay"]) == (1e-3, 0.1)
    assert len(dense["params"]) + len(ssm["params"]) == len(names)


@pytest.mark.parametrize("modules", [None, ["torch.nn.Linear"]])
def test_gradients_travel_in_fp32_where_the_config_says_so(modules):
    table = {"communication_data_type": "fp32"} | (
        {"torch_autocast": {"lower_precision_safe_modules": modules}} if modules else {}
    )
    filled = complete_ds_config(table, TrainConfig(global_batch=2, precision="bf16"), TWO)
    assert filled["torch_autocast"]["lower_precision_safe_modules"] == []


def test_bf16_gradients_of_an_fp32_run_are_refused():
    table = {"communication_data_type": "bf16"}
    with pytest.raises(UserError, match="rounds the state space's gradients"):
        complete_ds_config(table, TrainConfig(global_batch=2, precision="fp32"), TWO)
    complete_ds_config(table, TrainConfig(global_batch=2, precision="bf16"), TWO)
