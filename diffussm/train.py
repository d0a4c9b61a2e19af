"""Train DiffuSSM.

    deepspeed diffussm/train.py --deepspeed ds_configs/zero2.json                        the embedded default
    deepspeed diffussm/train.py --deepspeed ds_configs/zero2.json --config xl256 --train.lr 2e-4
    torchrun --nproc_per_node 8 diffussm/train.py --deepspeed ds_configs/zero2.json --config run.yaml
    python diffussm/train.py                                                             one process

Run again after an interruption, it goes on from the newest complete checkpoint. `--help` lists every key.
"""

from __future__ import annotations

import sys
from pathlib import Path

from diffussm.config import parse
from diffussm.data.prepare import prepare
from diffussm.errors import run_command
from diffussm.training.cluster import connect
from diffussm.training.engine import read_ds_config
from diffussm.training.trainer import Trainer


def main() -> None:
    launch = parse(sys.argv[1:])
    ds_config = read_ds_config(launch.deepspeed)
    cluster = connect()
    data = launch.config.data
    if data.prepare and cluster.is_main:
        prepare(data.prepare, Path(data.path).parent)
    cluster.barrier()
    Trainer(launch.config, ds_config, cluster).fit()


if __name__ == "__main__":
    run_command(main)
