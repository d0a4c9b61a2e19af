"""Train DiffuSSM.

    deepspeed diffussm/train.py --deepspeed ds_configs/zero2.json                        the embedded default
    deepspeed diffussm/train.py --deepspeed ds_configs/zero2.json --config run.yaml --train.lr 2e-4
    torchrun --nproc_per_node 8 diffussm/train.py --deepspeed ds_configs/zero2.json --config run.yaml
    mpirun -np 8 python diffussm/train.py --deepspeed ds_configs/zero2.json --config run.yaml
    python diffussm/train.py                                                             one process
    deepspeed --module diffussm.train --deepspeed zero2                                  installed, without a checkout

Run again after an interruption, it goes on from the newest complete checkpoint. `--help` lists every key.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO

from diffussm.config import parse
from diffussm.data.prepare import ensure_encoded
from diffussm.errors import run_command
from diffussm.files import hold_lock
from diffussm.training.cluster import Attempt, connect, identify
from diffussm.training.engine import read_ds_config
from diffussm.training.trainer import Trainer


def main() -> None:
    launch = parse(sys.argv[1:])
    ds_config = read_ds_config(launch.deepspeed)
    data = launch.config.data
    identity = identify()
    if identity.rank == 0:  # the others wait for it in connect()
        lock = hold_run(Path(launch.config.run_dir))  # noqa: F841 - held until this process ends
        if data.prepare:
            ensure_encoded(data.prepare, data.path)
    Trainer(launch.config, ds_config, connect(identity)).fit()


def hold_run(run: Path) -> IO[str]:
    """Lock the run's folder; an earlier attempt of this job, which SLURM has given up, gives way."""
    attempt = Attempt.here()
    return hold_lock(run / "lock", str(attempt), lambda holder: attempt.replaces(Attempt.in_text(holder)))


if __name__ == "__main__":
    run_command(main)
