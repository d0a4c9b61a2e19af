"""The nodes of a run, checked before it starts: `tools/preflight.py`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from diffussm.commands.common import Parser, emit_json
from diffussm.config import parse
from diffussm.errors import UserError
from diffussm.training.cluster import identify, join_minutes
from diffussm.training.engine import read_ds_config, split_batch
from diffussm.training.preflight import Preflight, end
from diffussm.training.preflight_measures import hangs
from diffussm.training.preflight_verdict import Finding, Verdict

GIB = 1 << 30
TIMEOUT = 120


def main() -> None:
    """Rank 0 tells the verdict, and its exit code is the launcher's: other ranks end with 0."""
    arguments, overrides = parse_arguments()
    launch = parse(overrides)
    ds_config = read_ds_config(launch.deepspeed)
    identity = identify()
    split_batch(launch.config.train, identity.world_size)
    joining = arguments.timeout or 60 * join_minutes()
    verdict = Preflight(launch.config, ds_config, identity, arguments.timeout or TIMEOUT, joining).run()
    if verdict:
        if arguments.json != "-":
            print_verdict(verdict)
        emit_json(arguments.json, verdict.figures())
    if hangs():  # what hangs would keep this process
        end(verdict.error() if verdict else "")
    if verdict and verdict.problems:
        raise UserError(verdict.error())


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command's own arguments, and those of training, for :func:`diffussm.config.parse`."""
    parser = Parser(
        "Check the nodes of a run before it starts, one rank a GPU, under the launcher and with the arguments of "
        "training: devices, links and all-reduce, reading of the data, clocks, disks, memory. Exit code 2 where "
        "something would keep the run from training, with the nodes at fault in an --exclude list for sbatch.",
        "srun python tools/preflight.py --deepspeed zero2 --config xl256 --run_dir runs/a",
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="of each check, after which who gave no sign is named "
        f"(default: {TIMEOUT}, and DIFFUSSM_JOIN_MINUTES, 10, for the ranks to come)",
    )  # fmt: skip
    parser.add_json_option()
    arguments, overrides = parser.parse_known_args()
    if arguments.timeout is not None and not 1 <= arguments.timeout <= 3600:
        parser.error(f"--timeout {arguments.timeout:g} must be in 1..3600 seconds")
    return arguments, overrides


def print_verdict(verdict: Verdict) -> None:
    head = ("node", "ranks", "devices", "CPUs a rank", "TFLOP/s", "link GB/s", "data MB/s", "clock ms", "free GB")
    rows = [[*head, "verdict"], *map(cells, verdict.nodes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
    print()
    run = verdict.run
    if reduced := run.get("all_reduce"):
        rate = f", {number(reduced['bytes_per_second'], 1e9)} GB/s" if reduced["bytes_per_second"] else ""
        print(f"all-reduce  of {run['ranks']} ranks: {'exact' if reduced['correct'] else 'fails'}{rate}")
    print(f"network     {run['network']}")
    if memory := run.get("memory"):
        planned = f"{memory['peak'] / GIB:.1f} of {memory['limit'] / GIB:.1f} GiB"
        split = f"{memory['micro_batch']} images × {memory['accumulation']} accumulated"
        print(f"memory      {planned} a rank at ZeRO {memory['zero_stage']}, {split}")
    if needed := run.get("data_bytes_per_second_needed"):
        print(f"reading     the run needs {number(needed, 1e6)} MB/s a node")
    if "data" in run:
        print(f"data        {run['data']}")
    for name, found in (("warning", verdict.warnings), ("problem", verdict.problems)):
        for finding in alike(found):
            print(f"{name}     {finding}")
    sys.stdout.flush()


def cells(row: dict[str, Any]) -> list[str]:
    ranks = row["ranks"]
    numbers = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks)) or "none"
    free = [number(row[key], 1e9) for key in ("free_bytes", "cache_free_bytes") if row.get(key) is not None]
    measured = [
        number(row.get(key), unit)
        for key, unit in (
            ("flops", 1e12), ("link_bytes_per_second", 1e9), ("data_bytes_per_second", 1e6), ("clock_seconds", 1e-3),
        )
    ]  # fmt: skip
    told = row["problems"] or [f"warning: {what}" for what in row["warnings"]] or ["ok"]
    return [
        row["node"], numbers, row.get("device") or "–", number(row.get("cpus_per_rank"), 1), *measured,
        " + ".join(free) or "–", "; ".join(told),
    ]  # fmt: skip


def alike(found: list[Finding]) -> list[str]:
    """A line for each thing that is found, with all nodes that it is found on."""
    nodes: dict[str, list[str]] = {}
    for finding in found:
        nodes.setdefault(finding.what, []).extend([finding.node] if finding.node else [])
    return [f"{', '.join(where)}: {what}" if where else what for what, where in nodes.items()]


def number(value: float | None, unit: float) -> str:
    """Three digits, or all before the point; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value / unit:,.0f}" if abs(value / unit) >= 100 else f"{value / unit:.3g}"
