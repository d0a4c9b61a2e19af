import json
import sys

import pytest
import torch

from benchmarks.common import Goal, Report, in_fresh_process, interleaved, make_parser, peak_memory, profile_shares
from diffussm.errors import run_command

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
MB = 1 << 20


def test_candidates_take_turns(monkeypatch):
    monkeypatch.setattr("benchmarks.common.TURN_SECONDS", 0)
    calls = []
    medians = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, device=CPU)
    assert "".join(calls) == "aabb" + "ababab"  # twice to warm up
    assert medians.keys() == {"a", "b"} and all(seconds > 0 for seconds in medians.values())


def report() -> Report:
    rows = [{"name": "forward", "ratio": 70.0, "ours_ms": 2.5}, {"name": "profile", "FFT": 0.5}]
    goals = [Goal("forward", 70.0, 60), Goal("memory", 0.2, 0.1, at_most=True), Goal("bf16", None, 2, note="no bf16")]
    return Report("theirs ÷ ours", CPU, goals, rows)


def test_json_has_the_promised_form(tmp_path):
    report().finish(str(tmp_path / "figures.json"))
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["machine"].keys() >= {"cpu", "cores", "threads", "device", "torch"}
    assert found["goals"] == [
        {"name": "forward", "value": 70.0, "goal": 60, "ok": True},
        {"name": "memory", "value": 0.2, "goal": 0.1, "ok": False},
        {"name": "bf16", "value": None, "goal": 2, "ok": None, "note": "not measured: no bf16"},
    ]
    assert found["rows"] == report().rows


def test_prints_ratios_then_goals_then_figures(capsys):
    report().finish(None)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:8] == [
        "theirs ÷ ours",
        "forward 70×",
        "goals",
        "forward 70 ≥ 60 ok",
        "memory 0.2 ≤ 0.1 short",
        "bf16 – ≥ 2 not measured: no bf16",
        "figures",
        "forward ours_ms 2.5",
    ]


def test_json_to_stdout_is_all_of_it(capsys):
    report().finish("-")
    assert json.loads(capsys.readouterr().out)["rows"]


def peak_of_a_temporary() -> int:
    return peak_memory(lambda: bytearray(64 * MB), CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_peak_memory_counts_what_is_freed_again():
    assert 60 * MB < in_fresh_process(peak_of_a_temporary) < 80 * MB


def test_profile_sees_the_matrix_products():
    a = torch.randn(256, 256)
    shares = profile_shares(lambda: torch.fft.rfft(a @ a), CPU)
    assert shares["GEMM"] > 0 and shares["FFT"] > 0 and sum(shares.values()) == pytest.approx(1, abs=0.01)


def test_bad_arguments_are_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: make_parser("ssm", "Measures.").parse_args(["--quik"]))
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
