"""Encoding, sampling and scoring, and the check of nodes, as jobs of a cluster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import runs
from PIL import Image
from slurm.cluster import Cluster

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.encode import encode
from diffussm.data.sources import open_source
from diffussm.data.store import open_store

pytestmark = pytest.mark.slurm

LAUNCH = runs.ROOT / "launch"
ONE = ["--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=6", "--mem=1G", "--time=10"]
SIZE, PER_SHARD = 16, 8


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pictures of two classes, which make eight shards."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(64):
        path = folder / f"class{number % 2}" / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def encoded(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Its data set, made by one process."""
    folder = tmp_path_factory.mktemp("encoded")
    encode(
        open_source("folder", str(images), size=SIZE),
        PixelCodec(SIZE, SIZE, 3, size=SIZE),
        open_store(folder),
        PER_SHARD,
    )
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    store = open_store(folder)
    return {name: bytes(store.read(name)) for name in store.list()}


@pytest.mark.parametrize("way", ["an array of four jobs", "MPI on two nodes"])
def test_encoding(cluster: Cluster, plain_environment, images: Path, encoded, tmp_path: Path, way: str) -> None:
    settings = {"DIFFUSSM_INPUT": str(images), "DIFFUSSM_OUT": str(tmp_path / "out")}
    options = ["--array=4-10:2", *ONE]
    if way == "MPI on two nodes":
        settings["DIFFUSSM_SRUN"] = "--mpi=pmix"
        options = ["--nodes=2", *ONE]
    arguments = ["--codec", "pixel", "--size", str(SIZE), "--samples-per-shard", str(PER_SHARD)]
    environment = plain_environment | settings
    job = cluster.submit(LAUNCH / "slurm_encode.sh", *options, arguments=arguments, cwd=tmp_path, env=environment)
    states = [cluster.wait_ended(number, 120)["JobState"] for number in cluster.jobs_of(job)]
    logs = [path.read_text() for path in sorted(tmp_path.glob("*.out"))]
    assert states == ["COMPLETED"] * (4 if "array" in options[0] else 1), logs
    assert contents(tmp_path / "out") == encoded
    if "array" in options[0]:
        assert len(logs) == 4 and sum("whoever finishes the last one" in log for log in logs) <= 3
        assert not [log for log in logs if "already encoded" in log]


def test_samples_by_two_nodes_and_their_scores(
    cluster: Cluster, plain_environment, whole: Path, shades, tmp_path
) -> None:
    settings = {"DIFFUSSM_RUN": str(whole), "DIFFUSSM_OUT": str(tmp_path / "samples"), "DIFFUSSM_COUNT": "40"}
    settings["DIFFUSSM_REFERENCE"] = str(shades / "test")
    environment = plain_environment | settings
    job = cluster.submit(LAUNCH / "slurm_eval.sh", "--nodes=2", *ONE, cwd=tmp_path, env=environment)
    ended = cluster.wait_ended(job, 120)
    log = next(tmp_path.glob("*.out")).read_text()
    assert ended["JobState"] == "COMPLETED", log
    with np.load(tmp_path / "samples/samples.npz") as file:
        assert file["arr_0"].shape == (40, 16, 16, 3) and file["arr_1"].tolist() == [0, 1, 2] * 13 + [0]
    assert "features of efficientnet-lite0, against" in log and "40 images of " in log
    assert not (tmp_path / "samples/scoring").exists()


def test_what_cannot_be_scored_is_told_before_samples_are_drawn(
    cluster: Cluster, plain_environment, whole: Path, shades, tmp_path
) -> None:
    (tmp_path / "weights.pth").write_bytes(b"others")
    settings = {
        "DIFFUSSM_RUN": str(whole),
        "DIFFUSSM_OUT": str(tmp_path / "samples"),
        "DIFFUSSM_REFERENCE": str(shades / "test"),
        "DIFFUSSM_EXTRACTOR": "inception-2015",
        "DIFFUSSM_INCEPTION_WEIGHTS": str(tmp_path / "weights.pth"),
    }
    job = cluster.submit(LAUNCH / "slurm_eval.sh", "--nodes=2", *ONE, cwd=tmp_path, env=plain_environment | settings)
    ended = cluster.wait_ended(job, 120)
    log = next(tmp_path.glob("*.out")).read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), log
    assert "weights.pth does not hold the weights of inception-2015-12-05" in log
    assert not (tmp_path / "samples").exists()


def test_nodes_are_checked_before_they_train(cluster: Cluster, plain_environment, shades, tmp_path) -> None:
    """One has its checkpoints elsewhere: it is named, and the job ends before it trains."""
    settings = {"DIFFUSSM_DATA": str(shades / "train"), "DIFFUSSM_RUN": str(tmp_path / "run")}
    config = runs.write_config(tmp_path / "tiny.yaml", shades)
    environment = plain_environment | settings | {"DIFFUSSM_CONFIG": str(config)}
    (tmp_path / "run").mkdir()
    cluster.on("n2", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "run"))
    try:
        script = LAUNCH / "slurm_xl512.sh"
        job = cluster.submit(script, "--nodes=2", *ONE, cwd=tmp_path, env=environment)
        ended = cluster.wait_ended(job, 120)
    finally:
        cluster.on("n2", "umount", str(tmp_path / "run"))
    log = next(tmp_path.glob("*.out")).read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), log
    (line,) = [line for line in log.splitlines() if "error: preflight" in line]
    assert "n2: " in line and "another file system" in line and line.endswith("leave it out: sbatch --exclude=n2")
    assert not (tmp_path / "run/config.yaml").exists()
    job = cluster.submit(script, "--nodes=2", "--exclude=n2", *ONE, cwd=tmp_path, env=environment)
    assert cluster.wait_ended(job, 120)["JobState"] == "COMPLETED"
    log = (tmp_path / f"diffussm-xl512-{job}.out").read_text()
    assert "all-reduce  of 2 ranks: exact" in log and "96 of 96 images" in log
