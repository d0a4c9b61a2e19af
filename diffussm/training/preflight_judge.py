"""What the reports of a preflight say. Nothing is measured here.

A problem belongs to a node where leaving that node out would solve it; what every node has is the run's own.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from statistics import median
from typing import Any

from diffussm.config import Config
from diffussm.data.stream import READERS
from diffussm.errors import UserError
from diffussm.training.plan import Plan
from diffussm.training.plan_changes import describe_change, smallest_change
from diffussm.training.preflight_measures import Report
from diffussm.training.preflight_verdict import Finding, Verdict

GIB = 1 << 30
SLOW = 0.5  # of the median: below it a device or a link is at fault
MFU = 0.4  # that a run is expected to reach, of what its slowest device multiplies
THREADS = READERS + 2  # of a rank, which training keeps busy: the reads, the making of batches, the steps
FREE = 0.9  # of a GPU's memory, before the run; and what a plan may take of it, beside CUDA's and NCCL's own
SKEW_WARNED, SKEW_REFUSED = 2.0, 300.0  # seconds; S3 refuses what was signed 15 minutes off
LOCAL = {"come", "compute", "data", "disk", "clocks"}  # phases in which a rank fails by itself
SHARED = {"data", "disk"}  # of them those in which what fails on every node is no node's fault


def ring(nodes: list[str]) -> list[list[tuple[str, str]]]:
    """Rounds of pairs, in each of which a node is in one pair at most, and in all of them with both its neighbours."""
    n = len(nodes)
    edges = [(nodes[i], nodes[(i + 1) % n]) for i in range(n if n > 2 else n - 1)]
    even, odd = edges[0 : n - 1 : 2], edges[1::2]
    rounds = [even, odd] if n % 2 == 0 else [even, odd, edges[n - 1 :]]
    return [pairs for pairs in rounds if pairs]


def judge(
    config: Config,
    ds_config: dict[str, Any],
    reports: dict[str, list[Report | None]],
    hosts: list[str],
    timeout: float,
    joining: float,
) -> Verdict:
    """The verdict on what has been reported so far.

    Args:
        config: checked.
        ds_config: DeepSpeed's.
        reports: by phase, of each rank; None: it gave no sign.
        hosts: where the launcher has started ranks, if it says so.
        timeout: seconds of a phase, for messages.
        joining: of the first.
    """
    judge = _Judge(config, ds_config, reports)
    judge.absent(hosts, f"within {joining:g} s")
    judge.signs(timeout)
    judge.devices()
    judge.cpus()
    judge.compute()
    judge.plan()
    judge.data()
    judge.disk()
    judge.clocks()
    judge.links()
    judge.all_reduce()
    return judge.end()


class _Judge:
    """Adds to ``verdict`` what each check finds."""

    def __init__(self, config: Config, ds_config: dict[str, Any], reports: dict[str, list[Report | None]]) -> None:
        self.config, self.ds_config, self.reports = config, ds_config, reports
        self.come = reports["come"]
        self.nodes: dict[str, list[int]] = {}
        for rank, report in enumerate(self.come):
            if report:
                self.nodes.setdefault(report["node"], []).append(rank)
        self.gpu = any(report.get("gpus") for report in self.come if report)
        self.verdict = Verdict(self.nodes, run={"ranks": len(self.come), "device": "cuda" if self.gpu else "cpu"})
        self.rows = {node: {"node": node, "ranks": ranks} for node, ranks in self.nodes.items()}
        self._plan: Plan | None = None

    def end(self) -> Verdict:
        for name in ("problems", "warnings"):
            for row in self.rows.values():
                row[name] = [found.what for found in getattr(self.verdict, name) if found.node == row["node"]]
        self.verdict.nodes = list(self.rows.values())
        return self.verdict

    def fail(self, check: str, node: str | None, what: str) -> None:
        self.verdict.problems.append(Finding(check, node, what))

    def warn(self, check: str, node: str | None, what: str) -> None:
        self.verdict.warnings.append(Finding(check, node, what))

    def fail_nodes(self, check: str, what: dict[str, str]) -> None:
        """Fail the nodes of ``what``, or the run."""
        if check in SHARED and what and what.keys() == self.nodes.keys():
            what = {None: next(iter(what.values()))}
        for node, text in what.items():
            self.fail(check, node, text)

    def values(self, phase: str, key: str) -> dict[int, Any]:
        """{rank: what it has reported as ``key``}."""
        return {rank: r[key] for rank, r in enumerate(self.reports.get(phase, [])) if r and key in r}

    def by_node(self, values: dict[int, Any]) -> dict[str, dict[int, Any]]:
        grouped = {node: {r: values[r] for r in ranks if r in values} for node, ranks in self.nodes.items()}
        return {node: group for node, group in grouped.items() if group}

    # Who is here

    def absent(self, hosts: list[str], within: str) -> None:
        """A rank that has not come is of the node whose others surround it, or of a host that nobody came from."""
        nodes, size = self.nodes, len(self.come)
        told = [count for count in self.values("come", "node_ranks").values() if count]
        node_size = max(math.ceil(size / len(hosts)) if hosts else 0, *told, *map(len, nodes.values()), 0)
        first = {node: ranks[0] - (self.come[ranks[0]].get("local_rank") or 0) for node, ranks in nodes.items()}
        gone: dict[str | None, list[int]] = {}
        for rank in (rank for rank, report in enumerate(self.come) if report is None):
            homes = [node for node, number in first.items() if number <= rank < number + node_size]
            gone.setdefault(homes[0] if homes else None, []).append(rank)
        lost = gone.pop(None, [])
        for node, ranks in gone.items():
            came = len(nodes[node])
            self.fail("come", node, f"{came} of {came + len(ranks)} ranks came {within}, not {_ranks(ranks)}")
        unseen = [host for host in hosts if host not in nodes] if lost else []
        for host in unseen:
            self.rows[host] = {"node": host, "ranks": []}
            self.fail("come", host, f"none of its ranks came {within}")
        if lost and not unseen:
            self.fail("come", None, f"{_ranks(lost)} of {size} did not come {within}, from a host that is not known")

    def signs(self, timeout: float) -> None:
        """Ranks that gave no sign in a later phase, hang in what they do by themselves, or have failed in it."""
        for phase, reports in self.reports.items():
            silent = {rank: phase for rank, report in enumerate(reports) if report is None}
            for node, ranks in self.by_node(silent).items():
                self.fail(phase, node, f"{_ranks(list(ranks))} gave no sign for {timeout:g} s in the check of {phase}")
            if phase in LOCAL:
                errors = self.values(phase, "error")
                ends = {rank: f"{phase} hangs in {where}" for rank, where in self.values(phase, "stuck").items()}
                ends |= {rank: text if phase == "come" else f"{phase}: {text}" for rank, text in errors.items()}
                first = {node: next(iter(texts.items())) for node, texts in self.by_node(ends).items()}
                self.fail_nodes(
                    phase, {n: text if phase in SHARED else f"rank {rank}: {text}" for n, (rank, text) in first.items()}
                )

    def devices(self) -> None:
        """One GPU a rank, each another, free, all of one model; one Python, one torch."""
        for node, ranks in self.by_node(dict(enumerate(self.come))).items():
            reports = {rank: report for rank, report in ranks.items() if report and "device" in report}
            for rank, report in reports.items():
                total, free = report["memory"], report.get("free", math.inf)
                if free < FREE * total:
                    held = f"only {free / GIB:.0f} of {total / GIB:.0f} GiB of its GPU are free"
                    self.fail("come", node, f"rank {rank}: {held}: another process holds the others")
            for gpu, count in Counter(report.get("uuid") for report in reports.values()).items():
                if gpu and count > 1:
                    users = [rank for rank, report in reports.items() if report["uuid"] == gpu]
                    self.fail("come", node, f"{_ranks(users)} share the GPU {gpu}: one rank a GPU")
            idle = max((report["gpus"] for report in reports.values()), default=0) - len(ranks)
            if idle > 0:
                self.warn("come", node, f"{idle} of its GPUs have no rank")
            names = Counter(report["device"] for report in reports.values())
            self.rows[node]["device"] = ", ".join(f"{count}× {name}" for name, count in names.items())
        self.verdict.run["network"] = "; ".join(sorted(set(self.values("come", "network").values())))
        for fact, name in (("device", "devices"), ("torch", "torch"), ("python", "Python")):
            values = self.values("come", fact)
            usual = Counter(values.values()).most_common(1)
            for node, own in self.by_node(values).items():
                for odd in sorted(set(own.values()) - {usual[0][0]}):
                    self.fail("come", node, f"has {name} {odd}, most ranks have {usual[0][0]}")

    def cpus(self) -> None:
        """Against the threads of a rank; ranks that may use the same CPUs share them."""
        for node, masks in self.by_node(self.values("come", "cpus")).items():
            sharing = Counter(map(tuple, masks.values()))
            cpus = min(len(mask) / count for mask, count in sharing.items())
            reports = [self.come[rank] for rank in masks]
            cpus = min([cpus, *(r["cpus_per_task"] for r in reports if r["cpus_per_task"])])
            self.rows[node]["cpus_per_rank"] = cpus
            if cpus < THREADS and (self.gpu or any(report["slurm"] for report in reports)):
                busy = f"training keeps {THREADS} threads a rank busy, {READERS} of them with reading"
                self.warn("come", node, f"{cpus:.3g} CPUs a rank, but {busy}: --cpus-per-task={THREADS}")

    # What they can do

    def compute(self) -> None:
        rates = self.values("compute", "flops")
        for node, own in self.by_node(rates).items():
            self.rows[node]["flops"] = min(own.values())
        for node, ranks in self.by_node(
            {r: r for r, ok in self.values("compute", "correct").items() if not ok}
        ).items():
            self.fail("compute", node, f"{_ranks(list(ranks))} multiply integers wrongly: the device is at fault")
        found = self.fail if self.gpu else self.warn  # CPUs may be busy with something else
        for node, own in self.by_node(slow(rates)).items():
            usual = f"{min(own.values()) / 1e12:.3g} TFLOP/s, the median is {median(rates.values()) / 1e12:.3g}"
            found("compute", node, f"{_ranks(list(own))} {'multiplies' if len(own) == 1 else 'multiply'} at {usual}")

    def plan(self) -> None:
        """Memory of the run, once the latents' shape is known."""
        known = [report for report in self.reports.get("data", []) if report and "latent" in report]
        if not known:
            return
        zero, data = self.ds_config.get("zero_optimization", {}), known[0]
        train, stage = self.config.train, zero.get("stage", 0)
        if train.precision == "auto":
            bf16 = all(self.values("come", "bf16").values())
            train = replace(train, precision="bf16" if bf16 else "fp32")
        config, device = replace(self.config, train=train), self.verdict.run["device"]
        try:
            plan = Plan(config, tuple(data["latent"]), data["classes"], len(self.come), stage, device)
        except UserError as error:
            return self.fail("memory", None, str(error))
        self._plan = plan
        sizes = self.by_node(self.values("come", "memory"))
        limit = int(min(min(own.values()) / (1 if self.gpu else len(own)) for own in sizes.values()))
        peak = plan.peak()
        self.verdict.run["memory"] = {
            "peak": peak,
            "limit": limit,
            "zero_stage": stage,
            "micro_batch": plan.micro_batch,
            "accumulation": plan.accumulation,
            "checkpoint_bytes": plan.checkpoint_bytes(),
        }
        each = "GPU" if self.gpu else "rank"
        needs = f"the run needs {peak / GIB:.1f} GiB of {limit / GIB:.1f} on each {each}"
        if any(zero.get(f"offload_{what}", {}).get("device") == "cpu" for what in ("optimizer", "param")):
            if peak > limit:
                self.warn("memory", None, f"{needs}, were it not for what it offloads, which is not planned here")
        elif peak > limit:
            change = smallest_change(plan, limit)
            advice = (
                f"set {describe_change(plan, change)}" if change else "nothing makes it fit: choose a smaller model"
            )
            self.fail("memory", None, f"{needs}: {advice} (tools/plan_run.py)")
        elif self.gpu and peak > FREE * limit:
            self.warn("memory", None, f"{needs}, which leaves less than a tenth for CUDA and NCCL")

    def data(self) -> None:
        prepare = self.values("data", "prepare")
        if prepare:
            self.verdict.run["data"] = f"not encoded yet: training does it ({next(iter(prepare.values()))})"
        rates, flops = self.values("data", "bytes_per_second"), self.values("compute", "flops")
        need = 0.0
        if self._plan and flops:
            images = self._plan.images_per_second(min(flops.values()), MFU)
            need = images * max(self.values("data", "sample_bytes").values()) / len(self.nodes)
            self.verdict.run["data_bytes_per_second_needed"] = need  # a node
        for node, own in self.by_node(rates).items():
            self.rows[node]["data_bytes_per_second"] = rate = max(own.values())
            if rate < need:
                self.warn("data", node, f"reads {rate / 1e6:.3g} MB/s, the run needs {need / 1e6:.3g} a node")

    def disk(self) -> None:
        lacking: dict[str, str] = {}
        places = self.values("disk", "places")
        main = self.node_of(0)
        others = [node for node in self.nodes if node != main]
        apart = [node for node, own in self.by_node(self.values("disk", "shared")).items() if not all(own.values())]
        if len(apart) == len(others) > 1:  # it is rank 0's node that differs
            apart = [main]
        for rank, seen in places.items():
            node = self.node_of(rank)
            for key, place in seen.items():
                if key == "checkpoints" and node in apart:
                    folder = places[0][key]["folder"]
                    self.fail("disk", node, f"sees another file system at {folder} than other nodes")
                    continue
                problem = self._shortage(key, place)
                if place["error"]:
                    problem = f"{key}: cannot write into {place['folder']}: {place['error']}"
                else:
                    self.rows[node]["cache_free_bytes" if key == "data.cache" else "free_bytes"] = place["free"]
                if problem and (key == "run_dir" or (place["whole"] and key == "checkpoints" and not place["error"])):
                    self.fail("disk", None, problem)  # which rank 0 alone has looked at
                elif problem:
                    lacking[node] = problem
        self.fail_nodes("disk", lacking)

    def _shortage(self, key: str, place: Report) -> str:
        """What a place has too little room for, or ""."""
        room, train, needed, advice = place["free"] + place["held"], self.config.train, 0.0, ""
        if key == "checkpoints" and self._plan and place["whole"]:
            count = train.keep_checkpoints + 1
            needed = count * self._plan.checkpoint_bytes()
            advice = f"{count} checkpoints, of which one is being written"
        elif key == "data.cache":
            total = max(self.values("data", "total_bytes").values(), default=0)
            needed = min(self.config.data.cache_gib * GIB, total)
            advice = "the shards that it may keep: lower data.cache_gib"
        if room >= needed:
            return ""
        return f"{key}: {place['folder']} has room for {room / 1e9:.3g} GB, not for {needed / 1e9:.3g}: {advice}"

    def clocks(self) -> None:
        for rank, ahead in self.values("clocks", "ahead").items():
            node = self.node_of(rank)
            self.rows[node]["clock_seconds"] = ahead
            if abs(ahead) > SKEW_WARNED:
                says = (
                    f"its clock is {abs(ahead):.3g} s {'ahead of' if ahead > 0 else 'behind'} rank 0's: start chronyd"
                )
                (self.fail if abs(ahead) > SKEW_REFUSED else self.warn)("clocks", node, says)

    # Between them

    def links(self) -> None:
        """A node is at fault if none of its links works, or a rank's better one is slow; else a link may be."""
        rates: dict[int, float] = {}
        works, fails = set(), []
        for number, pairs in enumerate(ring(list(self.nodes))):
            reports = self.reports.get(f"link {number}", [])
            for pair in pairs if reports else ():
                ranks = [rank for both in zip(*(self.nodes[node] for node in pair), strict=False) for rank in both]
                if any(reports[rank] is None for rank in ranks):
                    continue  # it has been told
                if problem := next((text for rank in ranks if (text := _failure(reports[rank]))), ""):
                    fails.append((pair, problem))
                    continue
                works.update(pair)
                for rank in ranks:
                    rates[rank] = max(rates.get(rank, 0.0), reports[rank]["bytes_per_second"])
        if fails and not works:
            look = f"look at NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME: {self.verdict.run['network']}"
            self.fail("link", None, f"no link between {', '.join(self.nodes)} works: {fails[0][1]}: {look}")
        named: set[str] = set()
        for pair, problem in fails if works else ():
            suspects = [node for node in pair if node not in works]
            if len(suspects) == 1 and suspects[0] not in named:
                self.fail("link", suspects[0], f"no link to another node works: {problem}")
            elif len(suspects) != 1:
                which = "either may be at fault" if suspects else "though each has another that works"
                self.fail("link", None, f"the link between {pair[0]} and {pair[1]} fails, {which}: {problem}")
            named.update(suspects)
        for node, own in self.by_node(rates).items():
            self.rows[node]["link_bytes_per_second"] = sum(own.values())
        for node, own in self.by_node(slow(rates)).items():
            usual = (
                f"{min(own.values()) / 1e9:.3g} GB/s to other nodes, the median is {median(rates.values()) / 1e9:.3g}"
            )
            self.fail("link", node, f"{_ranks(list(own))} {'reaches' if len(own) == 1 else 'reach'} {usual}")

    def all_reduce(self) -> None:
        reports = self.reports.get("all-reduce", [])
        if not reports or None in reports:
            return
        failed = {rank: text for rank, report in enumerate(reports) if (text := _failure(report))}
        wrong = self.by_node({rank: text for rank, text in failed.items() if "bytes_per_second" in reports[rank]})
        rates = self.values("all-reduce", "bytes_per_second")
        self.verdict.run["all_reduce"] = {
            "correct": not failed,
            "bytes_per_second": min(rates.values()) if len(rates) == len(reports) else None,
        }
        if wrong and wrong.keys() < self.nodes.keys() and len(rates) == len(reports):
            self.fail_nodes("all-reduce", {node: f"{_ranks(list(own))} has wrong sums" for node, own in wrong.items()})
        elif failed:
            rank, text = next(iter(failed.items()))
            told = f"rank {rank} on {self.node_of(rank)}: {text}"
            self.fail("all-reduce", None, f"the all-reduce of all ranks fails on {len(failed)} of them, {told}")

    def node_of(self, rank: int) -> str:
        return self.come[rank]["node"]


def slow(rates: dict[int, float]) -> dict[int, float]:
    """Those below half of the median."""
    return {rank: rate for rank, rate in rates.items() if rate < SLOW * median(rates.values())}


def _failure(report: Report) -> str:
    """Of a collective, on one rank that gave a sign."""
    if "stuck" in report:
        return f"hangs in {report['stuck']}"
    return report.get("error") or ("" if report.get("correct", True) else "wrong sums")


def _ranks(numbers: list[int]) -> str:
    """Of ascending numbers: "rank 3", "ranks 3, 8-15"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = ", ".join(f"{a}" if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(numbers) > 1 else ''} {told}"
