"""The console commands of an installed package: each is what tools/NAME.py, or diffussm/train.py, is in a checkout."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from diffussm.errors import run_command


def _command(module: str) -> Callable[[], None]:
    return lambda: run_command(lambda: import_module(module).main())


train = _command("diffussm.train")
sample = _command("diffussm.commands.sample")
encode = _command("diffussm.commands.encode_latents")
eval_fid = _command("diffussm.commands.eval_fid")
count_flops = _command("diffussm.commands.count_flops")
convert = _command("diffussm.commands.convert_checkpoint")
plan_run = _command("diffussm.commands.plan_run")
preflight = _command("diffussm.commands.preflight")
verify_shards = _command("diffussm.commands.verify_shards")
