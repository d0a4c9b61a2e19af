"""Partitions, sharded averages and the figures of a run against full ones, at every ZeRO stage.

On three ranks, sizes do not divide evenly.
"""

import sys
from pathlib import Path

import pytest
import runs

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 2), (2, 3), (3, 3)])
def test_equals_what_is_computed_in_full(stage, ranks, tmp_path):
    torchrun = str(Path(sys.executable).parent / "torchrun")
    worker = str(Path(__file__).parent / "ema_worker.py")
    port = str(runs.free_port())
    done = runs.run([torchrun, f"--nproc_per_node={ranks}", "--master_port", port, worker, str(stage), str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").read_text() == "21 parameters\n"
