"""Scoring by many processes: killed at any moment and gone on with by any number, the figures are the same."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import runs

pytestmark = pytest.mark.distributed

WORKER = str(Path(__file__).parent / "scoring_worker.py")
COUNT = 1730


def command(ranks: int, *arguments: object) -> list[str]:
    """As a user starts it: alone, or by torchrun."""
    torchrun = str(Path(sys.executable).parent / "torchrun")
    launch = [torchrun, f"--nproc_per_node={ranks}", f"--master_port={runs.free_port()}"]
    return [*(launch if ranks > 1 else [sys.executable]), WORKER, *map(str, arguments)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """samples.npz and real.npz. Not to be changed."""
    path = tmp_path_factory.mktemp("scoring")
    generator = np.random.default_rng(0)
    for name, count in ("samples", COUNT), ("real", 310):
        coarse = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        np.savez(path / f"{name}.npz", coarse.repeat(4, axis=1).repeat(4, axis=2) // (1 + (name == "samples")))
    return path


def arguments(folder: Path, out: Path) -> list[object]:
    return [folder / "samples.npz", "--reference", folder / "real.npz", "--json", out]


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The report of one process that nothing has broken off."""
    out = tmp_path_factory.mktemp("whole") / "report.json"
    done = runs.run(command(1, *arguments(folder, out)))
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def states(folder: Path) -> list[Path]:
    return list(folder.glob("scoring/samples.npz/*/state-*.safetensors"))


def some_rank_has_saved(folder: Path) -> bool:
    """Of a launch that goes on with another's."""
    earlier = [path for path in states(folder) if path.stem.endswith("earlier")]
    return 0 < len(earlier) < len(states(folder))


def test_killed_and_gone_on_with_by_another_number(folder: Path, whole: dict, tmp_path: Path) -> None:
    out, log = tmp_path / "report.json", tmp_path / "log"
    pattern = rf"features of samples:.* (\d+)/{COUNT} "

    def half_done() -> bool:  # the reference, and some of the samples
        return len({path.parent for path in states(folder)}) == 2

    with runs.started(command(1, *arguments(folder, out)), log, half_done):
        pass
    assert not out.exists()
    with runs.started(command(3, *arguments(folder, out)), log, lambda: some_rank_has_saved(folder)) as process:
        ranks = psutil.Process(process.pid).children(recursive=True)
        next(rank for rank in ranks if rank.environ().get("RANK") == "2").kill()
        assert process.wait(timeout=60) != 0  # the others do not wait for it
    done = runs.run(command(2, *arguments(folder, out)))
    assert done.returncode == 0, done.stderr
    shown = [int(n) for n in re.findall(pattern, done.stderr)]
    assert 0 < shown[0] < COUNT and shown[-1] == COUNT  # the bar of rank 0 counts for all, on from what was there
    report = json.loads(out.read_text())
    (found,), (expected,) = report.pop("rows"), whole["rows"]
    assert report == {key: value for key, value in whole.items() if key != "rows"}
    assert found.pop("name") == expected["name"]
    # sums have another order
    assert found == pytest.approx({key: value for key, value in expected.items() if key != "name"}, rel=1e-9)
    assert expected["images"] == COUNT and expected["FID (block-means)"] > 1
    assert not (folder / "scoring").exists()


def test_fewer_images_than_processes(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", np.load(folder / "real.npz")["arr_0"][:4])
    few = [tmp_path / "few.npz", "--reference", folder / "real.npz", "--json"]
    for ranks in (1, 3):
        done = runs.run(command(ranks, *few, tmp_path / f"{ranks}.json"))
        assert done.returncode == 0, done.stderr
    one, three = (json.loads((tmp_path / f"{ranks}.json").read_text())["rows"][0] for ranks in (1, 3))
    assert one.pop("name") == three.pop("name") == "few" and three == pytest.approx(one, rel=1e-9)
