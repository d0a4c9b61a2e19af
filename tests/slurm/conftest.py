from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
from slurm.cluster import Cluster, missing

NODES = 8
LONG = {
    "train__total_images": 960,
    "train__micro_batch": 4,
    "train__decay_images": 0,
    "train__checkpoint_images": 160,
}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Eight hosts of eight GPUs, which are none: ranks compute on the CPU."""
    if why := missing():
        pytest.skip(why)
    with Cluster(tmp_path_factory.mktemp("slurm"), NODES) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def free_nodes(cluster: Cluster) -> Iterator[None]:
    """Each test begins with all nodes, and leaves no job."""
    yield
    cluster.mend_all()


@pytest.fixture(scope="session")
def plain_environment() -> dict[str, str]:
    """Of a user who calls sbatch: nothing is set of what the scripts read but the interpreter."""
    names = ("SLURM", "SBATCH", "SRUN", "DIFFUSSM", "RANK", "WORLD_SIZE", "MASTER")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    python = {"DIFFUSSM_PYTHON": sys.executable, "DIFFUSSM_ROOT": str(runs.ROOT), "OMP_NUM_THREADS": "1"}
    return kept | python


@pytest.fixture(scope="session")
def whole(shades: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that nothing happens to, without SLURM. Not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = runs.run(runs.command("torchrun", 2, runs.arguments(shades, run, **LONG)))
    assert done.returncode == 0, done.stderr
    return run
