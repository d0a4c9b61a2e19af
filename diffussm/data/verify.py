"""Is a data set what its index says? All its objects are looked at, shards in threads."""

from __future__ import annotations

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from diffussm.autoencoders.codec import Codec
from diffussm.data.encode import BAD_IMAGES_NAME
from diffussm.data.index import INDEX_NAME, SAMPLES_NAME, Index
from diffussm.data.normalisation import Statistics
from diffussm.data.store import Stat, Store
from diffussm.data.verify_shard import Problem, verify_samples, verify_tar
from diffussm.errors import UserError

THREADS = 4  # each holds a shard in memory


@dataclass
class Findings:
    """What came out of a look at shards; ``statistics`` are those of the samples that are sound."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    statistics: Statistics | None = None

    def add(self, other: Findings) -> None:
        self.problems += other.problems
        self.notes += other.notes
        if other.statistics:
            self.statistics = self.statistics + other.statistics if self.statistics else other.statistics


def verify(store: Store, index: Index, at_most: int | None = None) -> Findings:
    """Compare all objects of ``store`` with the index.

    Args:
        index: by :meth:`Index.read`, which lets shards be missing or torn.
        at_most: so many shards are read, spread evenly over the data set. Sizes are compared for all of them.
    """
    there, findings = store.list(), Findings()
    known = {INDEX_NAME, SAMPLES_NAME, BAD_IMAGES_NAME, *(shard.name for shard in index.shards)}
    strays = sorted(there.keys() - known)
    findings.problems += [Problem(name, None, "is not of this data set: remove it") for name in strays]
    count = len(index.shards)
    chosen = set(range(count)) if at_most is None else set(np.linspace(0, count - 1, at_most).astype(int).tolist())
    refresh = 0.5 if sys.stderr.isatty() else 10
    with (
        tqdm(total=count, desc=f"verifying {store}", unit="shard", mininterval=refresh, miniters=1) as bar,
        ThreadPoolExecutor(THREADS, "verify") as pool,
    ):
        looks = [pool.submit(_verify_shard, store, index, i, there, i in chosen) for i in range(count)]
        for look in looks:
            findings.add(look.result())
            bar.update()
    return findings


def codec_problems(index: Index, codec: Codec) -> list[Problem]:
    """Where the index disagrees with the codec that it names."""
    return [
        Problem(INDEX_NAME, None, f"its {key} is {getattr(index, key)}, its codec's {getattr(codec, key)}")
        for key in ("latent_shape", "dtype", "posterior", "scale", "shift")
        if getattr(index, key) != getattr(codec, key)
    ]


def _verify_shard(store: Store, index: Index, position: int, there: dict[str, Stat], whole: bool) -> Findings:
    shard, findings = index.shards[position], Findings()

    def add(problem: str) -> None:
        findings.problems.append(Problem(shard.name, None, problem))

    if shard.name not in there:
        add("is missing")
        return findings
    stat = there[shard.name]
    if stat.size != shard.size:
        add(f"has {stat.size} bytes, the index says {shard.size}")
    if shard.etag and stat.etag and shard.etag != stat.etag:
        findings.notes.append(f"{shard.name} has another etag than when it was encoded: it has been copied or replaced")
    if whole:
        try:
            content = bytes(store.read(shard.name))
        except (OSError, UserError) as error:
            add(f"is unreadable: {error}")
            return findings
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            add("its bytes have changed: it has another sha256")
        first = int(index.shard_counts[:position].sum())
        rows = index.samples[first : first + shard.count]
        problems, findings.statistics = verify_samples(shard, index, rows, content)
        findings.problems += [*problems, *verify_tar(shard, index, rows, content)]
    return findings
