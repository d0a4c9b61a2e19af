"""What a run will take, before it is started: `tools/plan_run.py`."""

from __future__ import annotations

import argparse
import math
from typing import Any

from diffussm.commands.common import Parser, emit_json, latent_shape
from diffussm.config import config_names, parse
from diffussm.data.index import INDEX_NAME, Index
from diffussm.data.store import open_store
from diffussm.errors import UserError
from diffussm.training.hardware import GPU_PEAKS
from diffussm.training.plan import PARTS, Plan
from diffussm.training.plan_changes import describe_change, least_memory, smallest_change

GIB = 1 << 30
GPUS = [name for name in GPU_PEAKS if name != "V100"]  # which has no bf16
MOMENT_BYTES = 2  # of a number of the stored moments: float16


def main() -> None:
    arguments, overrides = parse_arguments()
    config = parse(["--config", arguments.config, *overrides]).config
    shape, classes, sample_bytes = read_data(config.data.path, arguments)
    plan = Plan(config, shape, classes, arguments.gpus, arguments.zero)
    if not (plan.bf16 or arguments.gpu_peak):
        raise UserError("train.precision fp32: the peaks known here are those of bf16: give --gpu-peak TFLOPS")
    flops = 1e12 * arguments.gpu_peak if arguments.gpu_peak else GPU_PEAKS[arguments.gpu]
    limit, images = int(arguments.gpu_memory * GIB), arguments.images or config.train.total_images
    figures = {"config": arguments.config, **plan.figures(flops, arguments.mfu, images, sample_bytes)}
    change = None if plan.peak() <= limit else smallest_change(plan, limit)
    figures |= {"gpu_memory": limit, "fits": plan.peak() <= limit, "change": change and describe_change(plan, change)}
    if arguments.json != "-":
        print_plan(figures)
    emit_json(arguments.json, figures)
    if not figures["fits"]:
        needs = f"{arguments.config} needs {plan.peak() / GIB:.1f} GiB of {arguments.gpu_memory:g} on each GPU"
        if change:
            raise UserError(f"{needs}: set {figures['change']} ({change.peak() / GIB:.1f} GiB)")
        least = least_memory(plan)
        settings = f"{least.peak() / GIB:.1f} GiB, with {describe_change(plan, least) or 'these settings'}"
        raise UserError(f"{needs}, and nothing makes it fit: the least is {settings}: choose a smaller model")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command's own arguments, and those that training knows, for :func:`diffussm.config.parse`."""
    parser = Parser(
        "Plan a run: memory per GPU, computation, reading, checkpoints, time. Further options, --section.key VALUE, "
        "are those of training. Where the run does not fit: exit code 2, and the smallest change that makes it fit.",
        "python tools/plan_run.py xl256 --gpus 8 --zero 2 --latent 4x32x32 --train.micro_batch 16",
    )
    parser.add_argument("config", metavar="CONFIG", help=f"one of {', '.join(config_names())}, or a YAML file")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks, one a GPU")
    parser.add_argument("--zero", type=int, default=2, choices=range(4), help="ZeRO stage (default: %(default)s)")
    parser.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="of each (default: %(default)s)")
    parser.add_argument("--gpu", default="A100", choices=GPUS, help="whose bf16 peak counts (default: %(default)s)")
    parser.add_argument("--gpu-peak", type=float, metavar="TFLOPS", help="or another peak")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of it reached, as training logs it (0.4)")
    parser.add_argument("--images", type=int, metavar="N", help="to train on (default: train.total_images)")
    parser.add_argument("--latent", type=latent_shape, metavar="CxHxW", help="(default: from the data set's index)")
    parser.add_argument("--classes", type=int, default=1000, metavar="N", help="beside --latent (default: %(default)s)")
    parser.add_json_option()
    arguments, overrides = parser.parse_known_args()
    for option in overrides:
        if option.startswith("-") and "." not in option.split("=")[0]:
            parser.error(f"unknown option {option}: one is of this command, or --section.key of training")
    for name in ("gpus", "gpu_memory", "gpu_peak", "images"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < 1e15:
            parser.error(f"--{name.replace('_', '-')} {value:g} must be positive, and below 1e15")
    if not 1e-6 < arguments.mfu <= 1:
        parser.error(f"--mfu {arguments.mfu:g} must be above 0 and at most 1, usually 0.3 to 0.5")
    if arguments.classes < 0:
        parser.error(f"--classes {arguments.classes} must be at least 0, which is unconditional")
    return arguments, overrides


def read_data(path: str, arguments: argparse.Namespace) -> tuple[tuple[int, ...], int, int]:
    """(latent's shape, number of classes, bytes of a stored sample), as the options say, or else the index."""
    if arguments.latent:
        return arguments.latent, arguments.classes, 2 * MOMENT_BYTES * math.prod(arguments.latent)
    store = open_store(path)
    if not store.exists(INDEX_NAME):
        raise UserError(
            f"{path} has no {INDEX_NAME} that tells the latents' shape: give --latent 4x32x32 --classes 1000"
        )
    index = Index.load(store)
    return index.latent_shape, len(index.class_names), math.prod(index.moments_shape) * index.dtype.itemsize


def print_plan(plan: dict[str, Any]) -> None:
    model, latent = plan["model"], "×".join(map(str, plan["latent"]))
    print(f"{plan['config']}: {plan['parameters'] / 1e6:,.1f}M parameters, depth {model['depth']}, latents {latent}")
    split = f"{plan['gpus']} GPUs × {plan['micro_batch']} images × {plan['accumulation']} accumulated"
    print(f"{split} = {plan['global_batch']} a step, ZeRO {plan['zero_stage']}, {plan['precision']}\n")
    print(f"{'GiB on each GPU':18}", *(f"{moment:>16}" for moment in plan["memory"]))
    for part in (*PARTS, "total"):
        cells = (parts[part] / GIB for parts in plan["memory"].values())
        print(f"{part:18}", *(f"{f'{cell:.2f}' if cell else '–':>16}" for cell in cells))
    fits = "fits" if plan["fits"] else "does not fit"
    print(f"\npeak            {plan['peak'] / GIB:.1f} of {plan['gpu_memory'] / GIB:g} GiB: {fits}")
    for name, value in plan["activations"].items():
        now = ", as here" if (name == "with checkpointing") == plan["activation_checkpointing"] else ""
        print(f"activations     {value['bytes'] / GIB:.2f} GiB {name}: peak {value['peak'] / GIB:.1f} GiB{now}")
    print("not counted     CUDA context, NCCL, sample grids, what the allocator leaves unused: keep a tenth free\n")
    passes = "forward, again, and backward" if plan["activation_checkpointing"] else "forward and backward"
    print(f"computation     {number(plan['macs_per_step'] / 1e12)} TMACs a step ({passes})")
    peak = f"{plan['mfu']:.0%} of {plan['gpu_flops'] / 1e12:g} TFLOP/s a GPU"
    print(f"speed           {number(plan['images_per_second'])} images/s at {peak}")
    held = f"up to {number(plan['stream_bytes'] / GIB)} GiB of a rank's host memory"
    print(f"reading         {number(plan['bytes_read_per_second'] / 1e6)} MB/s, ahead into {held}")
    print(f"checkpoint      {number(plan['checkpoint_bytes'] / 1e9)} GB")
    time = f"{number(plan['days'])} days, {number(plan['gpu_hours'])} GPU-hours"
    print(f"{plan['images']:,} images: {plan['steps']:,} steps, {time}")


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
