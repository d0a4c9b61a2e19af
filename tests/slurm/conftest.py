from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import runs
import yaml
from slurm.cluster import Cluster, missing

from diffussm.config import CONFIGS

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


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Saves what runs.arguments() makes of the default as a YAML file."""

    def write(data: Path, **overrides: object) -> Path:
        table = yaml.safe_load((CONFIGS / "fashion32.yaml").read_text())
        for argument in runs.arguments(data, Path("set-by-the-script"), **overrides)[2:]:
            key, value = argument[2:].split("=", 1)
            section, _, name = key.rpartition(".")
            (table.setdefault(section, {}) if section else table)[name] = yaml.safe_load(value)
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(table))
        return path

    return write
