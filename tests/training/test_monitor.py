"""The log of a run that is killed and resumed is that of one unbroken run."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffussm.training.monitor import Monitor, duration, log_of

pytestmark = pytest.mark.unit


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    first = Monitor(tmp_path, 0, 100)
    for images in (10, 20, 30):
        first.scalars(images, {"loss/total": 1.0 / images})
    first.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"images": 40, "lo')  # killed while writing
    second = Monitor(tmp_path, 20, 100)
    second.scalars(30, {"loss/total": 7.0})
    second.picture("samples", 30, np.zeros((4, 4, 3), np.uint8))
    second.close()
    assert [(r["images"], r["loss/total"]) for r in log_of(tmp_path)] == [(10, 0.1), (20, 0.05), (30, 7.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss/total")] == [(10, 0.1), (20, 0.05), (30, 7.0)]
    assert [e.step for e in events.Images("samples")] == [30]


def test_non_finite_values_stay_valid_json(tmp_path):
    monitor = Monitor(tmp_path, 0, 100)
    monitor.scalars(10, {"loss/total": float("nan")})
    monitor.close()
    line = (tmp_path / "log.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["loss/total"] is None


def test_progress_in_a_file_is_lines(tmp_path, capsys):
    monitor = Monitor(tmp_path, 0, 100)
    monitor.report(50, loss="0.5")
    monitor.report(60, loss="0.4")  # too soon after the first
    monitor.report(100, loss="0.3")
    monitor.close()
    assert capsys.readouterr().err.splitlines() == ["50 of 100 images  loss 0.5", "100 of 100 images  loss 0.3"]


def test_duration():
    assert duration(3725.9) == "1:02:05"
