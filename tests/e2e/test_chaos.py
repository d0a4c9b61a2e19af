"""A run that is killed at random moments gives what an undisturbed one gives: `benchmarks/chaos.py`, in few kills."""

import json
import subprocess
import sys

import pytest
import runs

pytestmark = pytest.mark.e2e


def chaos(tmp_path, *arguments) -> dict:
    command = [sys.executable, "-m", "benchmarks.chaos", "--json", str(tmp_path / "chaos.json"), *arguments]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads((tmp_path / "chaos.json").read_text())
    assert all(goal["ok"] for goal in found["goals"])
    return {goal["name"]: goal["value"] for goal in found["goals"]}


def test_five_kills(tmp_path):
    found = chaos(tmp_path, "--kills=5", "--seed=931")  # each of the moments that are looked for
    assert found == {
        "kills done": 5,
        "curve identical": 1,
        "last checkpoint identical": 1,
        "torn checkpoints": 0,
        "litter": 0,
    }


@pytest.mark.nightly
@pytest.mark.parametrize("store", ["disk", "s3"])
def test_twenty_kills(tmp_path, store):
    assert chaos(tmp_path, "--kills=20", f"--store={store}")["kills done"] == 20
