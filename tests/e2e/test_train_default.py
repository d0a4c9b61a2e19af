"""`deepspeed diffussm/train.py` with nothing else said trains the embedded default, and prepares its data."""

import shutil
from pathlib import Path

import pytest
import runs

from diffussm.training.monitor import log_of

pytestmark = pytest.mark.e2e

IMAGES = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not IMAGES.exists(), reason=f"no Fashion-MNIST in {IMAGES}: apt-get install dataset-fashion-mnist")
def test_with_no_configuration(tmp_path):
    shutil.copytree(runs.ROOT / "ds_configs", tmp_path / "ds_configs")
    one_step = ["--train.total_images=32", "--train.decay_images=0"]
    command = runs.command("deepspeed", 2, ["--deepspeed", "ds_configs/zero2.json", *one_step])
    done = runs.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "60,000 samples of 4×16×16" in done.stderr
    assert (tmp_path / "data/fashion32/test/index.json").exists()
    (record,) = log_of(tmp_path / "runs/fashion32")
    assert 0.9 < record["loss/mse"] < 1.1  # a fresh network predicts no noise: E ε² = 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--train.lrr", "1"], "unknown config key train.lrr: did you mean train.lr?"),
        (["--deepspeed", "bf16.json"], "bf16.enabled rounds the state space parameters"),
        (["--data.prepare", "null", "--data.path", "nowhere"], "no index.json in"),
    ],
)
def test_bad_input_ends_the_launcher_with_one_line_and_code_2(tmp_path, arguments, line):
    (tmp_path / "bf16.json").write_text('{"bf16": {"enabled": true}}')
    zero2 = ["--deepspeed", str(runs.ROOT / "ds_configs/zero2.json")]
    done = runs.run(runs.command("deepspeed", 2, [*zero2, *arguments]), cwd=tmp_path)
    assert done.returncode == 2
    (message,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert line in message
    assert not list(tmp_path.glob("runs/*/config.yaml"))
