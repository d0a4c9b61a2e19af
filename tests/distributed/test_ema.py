"""The sharded EMA against a full one, at every ZeRO stage, on two ranks."""

import sys
from pathlib import Path

import pytest
import runs

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_equals_a_full_average_bit_for_bit(stage, tmp_path):
    torchrun = str(Path(sys.executable).parent / "torchrun")
    worker = str(Path(__file__).parent / "ema_worker.py")
    done = runs.run([torchrun, "--nproc_per_node", "2", "--master_port", "29518", worker, str(stage), str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").read_text() == "23 parameters\n"
