from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import runs
from slurm.cluster import Cluster, missing

NODES = 8


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
