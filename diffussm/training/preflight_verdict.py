"""What a preflight has found: which nodes are fit, and what is wrong with the others."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

TOLD = 6  # problems, in one line


@dataclass(frozen=True)
class Finding:
    """A problem or a warning: of which check, of which node (None: of the run), and what it is."""

    check: str
    node: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.node}: {self.what}" if self.node else self.what


@dataclass
class Verdict:
    """What rank 0 makes of the reports.

    Attributes:
        ranks: of each node that has come, in the order of their first.
        nodes: a row each, also of those that have not come, in JSON types: bytes, seconds, FLOP/s.
        run: what concerns all of them: ranks, all-reduce, memory.
    """

    ranks: dict[str, list[int]]
    nodes: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    @property
    def exclude(self) -> list[str]:
        """Nodes to leave out."""
        return sorted({problem.node for problem in self.problems if problem.node})

    def error(self) -> str:
        """The problems and the way out, in one line; "" where there are none."""
        if not self.problems:
            return ""
        told = "; ".join(map(str, self.problems[:TOLD]))
        more = f"; and {len(self.problems) - TOLD} more" if len(self.problems) > TOLD else ""
        them = "it" if len(self.exclude) == 1 else "them"
        way_out = f"; leave {them} out: sbatch --exclude={','.join(self.exclude)}" if self.exclude else ""
        return f"preflight: {told}{more}{way_out}"

    def figures(self) -> dict[str, Any]:
        """All of it as JSON types."""
        found = {name: [asdict(f) for f in getattr(self, name)] for name in ("problems", "warnings")}
        return {"ok": not self.problems, **self.run, "nodes": self.nodes, **found, "exclude": self.exclude}
