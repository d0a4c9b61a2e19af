"""What a preflight makes of reports: of 64 ranks on eight nodes, each time with one thing wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffussm.commands.preflight import print_verdict
from diffussm.config import Config, DataConfig, TrainConfig
from diffussm.models.diffussm import ModelConfig
from diffussm.training.preflight_judge import THREADS, judge, ring
from diffussm.training.preflight_measures import look, measure_matmul, within
from diffussm.training.preflight_verdict import Verdict

pytestmark = pytest.mark.unit

GIB = 1 << 30
NODES, EACH = 8, 8
HOSTS = [f"n{node}" for node in range(NODES)]
CONFIG = Config(model=ModelConfig("XL"), train=TrainConfig(global_batch=256, precision="bf16"))
ZERO2 = {"zero_optimization": {"stage": 2}}
Reports = dict[str, list[Any]]


def reports(nodes: int = NODES) -> Reports:
    """Of ranks on H100s where all is well."""
    ranks, hosts = range(nodes * EACH), [f"n{node}" for node in range(nodes)]
    leads = [rank % EACH == 0 for rank in ranks]
    where = [{"node": f"n{rank // EACH}", "seconds": 0.1} for rank in ranks]
    come = {
        "node_ranks": None,
        "cpus": list(range(96)),
        "cpus_per_task": None,
        "slurm": True,
        "gpus": EACH,
        "network": "NCCL",
    }
    come |= {"python": "3.12.1", "torch": "2.10.0", "device": "NVIDIA H100", "memory": 80 * GIB, "free": 79 * GIB}
    data = {"bytes_per_second": 2e9, "latent": [4, 32, 32], "classes": 1000, "sample_bytes": 16384, "total_bytes": 2e10}
    place = {"folder": "/shared/runs", "free": 10**12, "held": 0, "whole": True, "error": ""}
    link = {"correct": True, "bytes_per_second": 2e10}
    facts = {
        "come": [come | {"local_rank": rank % EACH, "uuid": f"GPU-{rank}", "bf16": True} for rank in ranks],
        "compute": [{"correct": True, "flops": 6e14} for _ in ranks],
        "data": [data if lead else {} for lead in leads],
        "disk": [{"places": {"checkpoints": dict(place)}, "shared": True} if lead else {} for lead in leads],
        "clocks": [{"ahead": 0.001 * rank} if lead else {} for rank, lead in enumerate(leads)],
        **{f"link {number}": [dict(link) for _ in ranks] for number in range(len(ring(hosts)))},
        "all-reduce": [{"correct": True, "bytes_per_second": 1e11} for _ in ranks],
    }
    return {phase: [own | fact for own, fact in zip(where, of, strict=True)] for phase, of in facts.items()}


def verdict(found: Reports, config: Config = CONFIG, ds_config: dict[str, Any] = ZERO2) -> Verdict:
    return judge(config, ds_config, found, HOSTS, 60, 60)


def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    told = verdict(reports())
    assert told.error() == "" and not told.warnings and told.exclude == []
    print_verdict(told)
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith(tuple(HOSTS))]
    assert len(rows) == NODES and all(row.endswith("  ok") for row in rows)
    assert "8× NVIDIA H100" in rows[0] and "0-7" in rows[0] and " 12 " in rows[0]  # 96 CPUs, 8 ranks
    assert "all-reduce  of 64 ranks: exact, 100 GB/s" in out
    figures = json.loads(json.dumps(told.figures()))
    assert figures["ok"] and figures["nodes"][3]["link_bytes_per_second"] == 8 * 2e10
    assert 0 < figures["memory"]["peak"] < figures["memory"]["limit"] == 80 * GIB


def set_each(phase: str, ranks: range | list[int], **facts: Any) -> Callable[[Reports], None]:
    def change(found: Reports) -> None:
        for rank in ranks:
            found[phase][rank] |= facts

    return change


def lose(ranks: range | list[int], phase: str) -> Callable[[Reports], None]:
    """No later phase is begun."""

    def change(found: Reports) -> None:
        for name in list(found)[list(found).index(phase) + 1 :]:
            del found[name]
        for rank in ranks:
            found[phase][rank] = None

    return change


def links_fail(node: int) -> Callable[[Reports], None]:
    def change(found: Reports) -> None:
        for number, pairs in enumerate(ring(HOSTS)):
            for pair in pairs:
                if f"n{node}" in pair:
                    for name in pair:
                        first = EACH * int(name[1:])
                        set_each(f"link {number}", range(first, first + EACH), error="no answer within 42 s")(found)

    return change


def place(**facts: Any) -> dict[str, Any]:
    return {"folder": "/shared/runs", "free": 10**12, "held": 0, "whole": True, "error": ""} | facts


def both_links(ranks: list[int], rate: float) -> Callable[[Reports], None]:
    return lambda found: [set_each(f"link {n}", ranks, bytes_per_second=rate)(found) for n in (0, 1)]


NODE_PROBLEMS = {
    "a rank did not come": (lose([19], "come"), "n2: 7 of 8 ranks came within 60 s, not rank 19"),
    "a node did not come": (lose(range(16, 24), "come"), "n2: none of its ranks came within 60 s"),
    "a node is lost": (lose(range(16, 24), "disk"), "n2: ranks 16-23 gave no sign for 60 s in the check of disk"),
    "no GPU": (
        lambda found: found["come"].__setitem__(17, {"node": "n2", "error": "local rank 1 on n2 has no GPU"}),
        "n2: rank 17: local rank 1 on n2 has no GPU",
    ),
    "one GPU twice": (set_each("come", [17], uuid="GPU-16"), "n2: ranks 16, 17 share the GPU GPU-16"),
    "another GPU": (
        set_each("come", range(16, 24), device="NVIDIA A100"),
        "n2: has devices NVIDIA A100, most ranks have NVIDIA H100",
    ),
    "another torch": (set_each("come", range(16, 24), torch="2.9.1"), "n2: has torch 2.9.1, most ranks have 2.10.0"),
    "a GPU in use": (set_each("come", [18], free=30 * GIB), "n2: rank 18: only 30 of 80 GiB of its GPU are free"),
    "CUDA fails": (set_each("compute", [18], error="AcceleratorError: ECC"), "n2: rank 18: compute: AcceleratorError"),
    "wrong products": (set_each("compute", [18, 19], correct=False), "n2: ranks 18, 19 multiply integers wrongly"),
    "a slow GPU": (set_each("compute", [18], flops=2e14), "n2: rank 18 multiplies at 200 TFLOP/s, the median is 600"),
    "no data": (set_each("data", [16], error="cannot reach s3://b"), "n2: data: cannot reach s3://b"),
    "a read that hangs": (set_each("disk", [16], stuck="look (x.py:1)"), "n2: disk hangs in look (x.py:1)"),
    "another disk": (set_each("disk", [16], shared=False), "n2: sees another file system at /shared/runs than other"),
    "read-only": (
        set_each("disk", [16], places={"checkpoints": place(error="Read-only file system")}),
        "n2: checkpoints: cannot write into /shared/runs: Read-only file system",
    ),
    "its clock": (set_each("clocks", [16], ahead=-400.0), "n2: its clock is 400 s behind rank 0's"),
    "its network": (links_fail(2), "n2: no link to another node works: no answer within 42 s"),
    "a slow network": (
        both_links([16, 17], 1e9),
        "n2: ranks 16, 17 reach 1 GB/s to other nodes, the median is 20",
    ),
    "wrong sums": (set_each("all-reduce", [20], correct=False), "n2: rank 20 has wrong sums"),
}


@pytest.mark.parametrize("name", NODE_PROBLEMS)
def test_a_node_is_named(name: str) -> None:
    change, line = NODE_PROBLEMS[name]
    change(found := reports())
    told = verdict(found)
    assert told.exclude == ["n2"], told.error()
    assert told.error().startswith(f"preflight: {line}")
    assert told.error().endswith("; leave it out: sbatch --exclude=n2")
    (row,) = [row for row in told.figures()["nodes"] if row["problems"]]
    assert row["node"] == "n2"


def test_two_nodes_make_one_list() -> None:
    set_each("compute", [18], correct=False)(found := reports())
    set_each("clocks", [40], ahead=1000.0)(found)
    assert verdict(found).error().endswith("; leave them out: sbatch --exclude=n2,n5")


RUN_PROBLEMS = {
    "no data": (set_each("data", range(0, 64, 8), error="no index.json in s3://b"), "data: no index.json in s3://b"),
    "read-only": (
        set_each("disk", range(0, 64, 8), places={"checkpoints": place(error="Read-only file system")}),
        "checkpoints: cannot write into /shared/runs: Read-only file system",
    ),
    "GPUs too small": (set_each("come", range(64), memory=8 * GIB, free=8 * GIB), "the run needs "),
    "all-reduce fails": (
        set_each("all-reduce", range(64), error="DistBackendError: NCCL"),
        "the all-reduce of all ranks fails on 64 of them, rank 0 on n0: DistBackendError: NCCL",
    ),
    "no network": (lambda found: [links_fail(node)(found) for node in range(NODES)], "no link between n0, n1,"),
}


@pytest.mark.parametrize("name", RUN_PROBLEMS)
def test_what_leaving_out_does_not_solve_names_no_node(name: str) -> None:
    change, line = RUN_PROBLEMS[name]
    change(found := reports())
    told = verdict(found)
    assert told.exclude == [] and "--exclude" not in told.error()
    assert told.error().startswith(f"preflight: {line}"), told.error()


def test_a_run_that_does_not_fit_is_told_what_to_change() -> None:
    set_each("come", range(64), memory=12 * GIB, free=12 * GIB)(found := reports())
    error = verdict(found).error()
    assert "of 12.0 on each GPU: set --zero 3" in error
    offload = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    set_each("come", range(64), memory=2 * GIB, free=2 * GIB)(found)
    assert not verdict(found, ds_config=offload).problems


def test_room_for_checkpoints_counts_those_that_are_there() -> None:
    need = 3 * verdict(reports()).run["memory"]["checkpoint_bytes"]
    set_each("disk", [0], places={"checkpoints": place(free=need // 2)})(found := reports())
    assert verdict(found).error().startswith("preflight: checkpoints: /shared/runs has room for")
    assert verdict(found).exclude == []
    set_each("disk", [0], places={"checkpoints": place(free=need // 2, held=need)})(found)
    assert not verdict(found).problems


def test_room_for_the_cache() -> None:
    config = replace(CONFIG, data=DataConfig(cache="/local", cache_gib=10))
    set_each("disk", [16], places={"data.cache": place(folder="/local", free=2**30)})(found := reports())
    told = verdict(found, config)
    assert told.exclude == ["n2"] and "lower data.cache_gib" in told.error()


def test_rank_0_is_the_one_on_another_disk() -> None:
    set_each("disk", range(8, 64, 8), shared=False)(found := reports())
    assert verdict(found).exclude == ["n0"]


def test_a_broken_link_between_sound_nodes() -> None:
    set_each("link 0", range(16), error="no answer within 42 s")(found := reports())
    told = verdict(found)
    assert "the link between n0 and n1 fails, though each has another that works" in told.error()
    assert told.exclude == []


def test_warnings_leave_the_run_alone() -> None:
    found = reports()
    set_each("come", range(16, 24), cpus_per_task=2)(found)
    set_each("clocks", [24], ahead=3.0)(found)
    set_each("data", [32], bytes_per_second=1e3)(found)
    told = verdict(found)
    assert not told.problems
    assert [(warning.node, warning.check) for warning in told.warnings] == [
        ("n2", "come"),
        ("n4", "data"),
        ("n3", "clocks"),
    ]
    assert f"--cpus-per-task={THREADS}" in told.warnings[0].what


def test_data_that_training_encodes() -> None:
    found = reports()
    found["data"] = [{"node": f"n{rank // EACH}", "prepare": "fashion-mnist"} for rank in range(64)]
    told = verdict(found)
    assert not told.problems and told.run["data"] == "not encoded yet: training does it (fashion-mnist)"
    assert "memory" not in told.run


@pytest.mark.parametrize("count", range(1, 10))
def test_the_ring_is_whole_and_no_node_is_asked_twice_at_once(count: int) -> None:
    nodes = [f"n{number}" for number in range(count)]
    rounds = ring(nodes)
    for pairs in rounds:
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)
    links = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(set(links)) == len(links) == (count if count > 2 else count - 1)
    assert len(rounds) <= 2 + count % 2


def test_a_folder_is_looked_at_and_left_alone(tmp_path: Path) -> None:
    seen = look(tmp_path / "a" / "b")
    assert seen["folder"] == str(tmp_path) and not seen["error"] and seen["free"] > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("12345")
    assert look(tmp_path)["held"] == 5
    assert look(tmp_path / "file" / "run")["error"] == "Not a directory"


def test_work_that_hangs_or_fails_is_a_report() -> None:
    import threading

    cpu, release = torch.device("cpu"), threading.Event()
    assert "wait (threading.py:" in within(lambda: release.wait() and {}, 0.2, cpu)["stuck"]
    release.set()
    assert within(lambda: {"a": 1}, 5, cpu)["a"] == 1
    assert within(lambda: {}["a"], 5, cpu)["error"] == "KeyError: 'a'"


def test_a_cpu_multiplies_integers_exactly() -> None:
    told = measure_matmul(torch.device("cpu"), seed=1)
    assert told["correct"] and told["flops"] > 1e8
