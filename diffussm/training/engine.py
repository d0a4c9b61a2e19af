"""DeepSpeed's engine for a run: its config checked and completed, the parameter groups, the engine itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffussm.config import TrainConfig
from diffussm.errors import UserError
from diffussm.models.block import IntoChannels, MixAndDown
from diffussm.training.cluster import Cluster
from diffussm.training.hardware import multiplies_bf16
from diffussm.training.optimizer import NormedAdamW

# Under torch_autocast DeepSpeed sends the gradients of these in bf16, and all others, the state space's, in fp32.
LOW_PRECISION_MODULES = [f"{cls.__module__}.{cls.__qualname__}" for cls in (nn.Linear, IntoChannels, MixAndDown)]

OFFLOADED = ("optimizer", "param")


def read_ds_config(path: str) -> dict[str, Any]:
    """DeepSpeed's JSON config. Raises UserError if it is none, or if it would break the state space parameters."""
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--deepspeed {path}: {error.strerror or error}; give zero2, or a JSON file") from None
    except ValueError as error:
        raise UserError(f"--deepspeed {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed {path} is not a JSON object")
    for section in ("bf16", "fp16", "torch_autocast", "zero_optimization"):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(f"{path}: {section} is not a JSON object")
    for half in ("bf16", "fp16"):
        if config.get(half, {}).get("enabled"):
            raise UserError(
                f"{path}: {half}.enabled rounds the state space parameters, whose recurrence then goes wrong;"
                ' use "torch_autocast": {"enabled": "auto", "dtype": "bfloat16"}, which keeps parameters in fp32'
            )
    if config.get("communication_data_type") not in (None, "fp32", "bf16"):
        raise UserError(
            f'{path}: communication_data_type must be "fp32", or "bf16", in which the dense weights\' gradients travel'
        )
    if config.get("torch_autocast", {}).get("dtype", "bfloat16") not in ("bfloat16", "bf16"):
        raise UserError(f"{path}: torch_autocast.dtype must be bfloat16: float16 overflows without a loss scale")
    if any(
        config.get("zero_optimization", {}).get(f"offload_{what}", {}).get("device") == "nvme" for what in OFFLOADED
    ):
        raise UserError(f'{path}: offloading to nvme keeps the weights where no average is taken of them: say "cpu"')
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UserError(f"{path}: {key} belongs to the run's YAML (train.lr, train.warmup_images, ...): remove it")
    return config


def split_batch(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """(micro-batch a rank, accumulation) such that world_size × micro-batch × accumulation = train.global_batch.

    Raises UserError with the nearest global batches that work, where there are none.
    """
    unit = world_size * (train.micro_batch or 1)
    if train.global_batch % unit:
        below = train.global_batch // unit * unit
        ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
        micro = f" × train.micro_batch {train.micro_batch}" if train.micro_batch else ""
        works = " or ".join(str(batch) for batch in (below, below + unit) if batch)
        share, rest = divmod(train.global_batch, world_size)
        if train.micro_batch and not rest:
            smaller = next(size for size in range(train.micro_batch, 0, -1) if share % size == 0)
            works += f" can, or train.micro_batch {smaller}"
        raise UserError(
            f"train.global_batch {train.global_batch} cannot be made by {ranks}{micro} × accumulation: {works} can"
        )
    micro_batch = train.micro_batch or train.global_batch // world_size
    return micro_batch, train.global_batch // (world_size * micro_batch)


def complete_ds_config(config: dict[str, Any], train: TrainConfig, cluster: Cluster) -> dict[str, Any]:
    """``config`` with every "auto" filled from the run's YAML. UserError where it says something else than that."""
    micro_batch, accumulation = split_batch(train, cluster.world_size)
    use_bf16 = train.precision == "bf16" or (train.precision == "auto" and multiplies_bf16(cluster.device))
    filled = json.loads(json.dumps(config))
    filled["torch_autocast"] = autocast = {
        "dtype": "bfloat16",
        "enabled": "auto",
        "lower_precision_safe_modules": LOW_PRECISION_MODULES,
    } | filled.get("torch_autocast", {})
    if filled.get("communication_data_type") == "fp32":  # under autocast DeepSpeed looks at this alone
        autocast["lower_precision_safe_modules"] = []
    if autocast["enabled"] == "auto":
        autocast["enabled"] = use_bf16
    elif train.precision != "auto" and autocast["enabled"] != use_bf16:
        raise UserError(
            f"torch_autocast.enabled {json.dumps(autocast['enabled'])} of the DeepSpeed config contradicts"
            f' train.precision {train.precision}: set the former to "auto"'
        )
    if filled.get("communication_data_type") == "bf16" and not autocast["enabled"]:
        raise UserError(
            "communication_data_type bf16 of the DeepSpeed config rounds the state space's gradients, but nothing else "
            "is bf16: remove it, or set train.precision bf16"
        )
    for key, value, source in (
        ("train_batch_size", train.global_batch, "train.global_batch"),
        ("train_micro_batch_size_per_gpu", micro_batch, "train.micro_batch"),
        ("gradient_accumulation_steps", accumulation, "train.global_batch and train.micro_batch"),
        ("gradient_clipping", train.clip, "train.clip"),
    ):
        if filled.setdefault(key, "auto") not in ("auto", value):
            raise UserError(
                f'{key} {filled[key]} of the DeepSpeed config is not the run\'s {value}: say "auto", and set {source}'
            )
        filled[key] = value
    return filled


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Dense weights, and the state space parameters (tagged ``is_ssm``): their own learning rate, no weight decay."""
    ssm_lr = train.lr if train.ssm_lr is None else train.ssm_lr
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for parameter in model.parameters():
        groups[getattr(parameter, "is_ssm", False)].append(parameter)
    return [
        {"name": "dense", "params": groups[False], "lr": train.lr, "weight_decay": train.weight_decay},
        {"name": "ssm", "params": groups[True], "lr": ssm_lr, "weight_decay": 0.0},
    ]


def make_engine(model: nn.Module, ds_config: dict[str, Any], train: TrainConfig) -> Any:
    """DeepSpeed's engine around ``model`` and a client AdamW, whose groups keep their own rates at every ZeRO stage.

    Raises:
        UserError: train.compile names no backend of torch.compile.
    """
    import deepspeed

    zero = ds_config.get("zero_optimization", {})
    optimizer = NormedAdamW(
        parameter_groups(model, train),
        betas=train.betas,
        guard=zero.get("stage", 0) == 0,
        # on a CPU beside GPUs, torch's own fused kernel is what DeepSpeed's would be, and needs no compiler
        fused=True if zero.get("offload_optimizer", {}).get("device") == "cpu" else None,
    )
    ours = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}  # it trusts no subclass
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config | ours)
    if train.compile:
        known = torch._dynamo.list_backends(None)
        if train.compile not in known:
            raise UserError(f"train.compile {train.compile} is none of torch.compile's backends: {', '.join(known)}")
        engine.compile(backend=train.compile)
    return engine


def set_rates(engine: Any, train: TrainConfig, factor: float) -> None:
    """Before each step, the run's own hyperparameters, whatever a loaded checkpoint had; rates times ``factor``."""
    dense, ssm = engine.optimizer.param_groups
    for group, lr, decay in ((dense, train.lr, train.weight_decay), (ssm, train.ssm_lr or train.lr, 0.0)):
        group.update(lr=factor * lr, weight_decay=decay, betas=train.betas)
