"""Sampling by many processes: killed at any moment and gone on with by any number, the images are the same bytes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import runs
from distributed.sampling_worker import PART
from torch.distributed import HashStore

from diffussm.errors import UserError
from diffussm.sample_parts import Parts
from diffussm.sample_request import find_checkpoint
from diffussm.training.checkpoint import complete
from diffussm.training.workers import Counting

pytestmark = pytest.mark.distributed

TOOL, WORKER = str(runs.ROOT / "tools/sample.py"), str(Path(__file__).parent / "sampling_worker.py")
COUNT, STEPS = 6 * PART + 3, 40


def command(ranks: int, *arguments: object, script: str = WORKER) -> list[str]:
    """As a user starts it: alone, or by torchrun."""
    torchrun = str(Path(sys.executable).parent / "torchrun")
    launch = [torchrun, f"--nproc_per_node={ranks}", f"--master_port={runs.free_port()}"]
    return [*(launch if ranks > 1 else [sys.executable]), script, *map(str, arguments)]


def sampling(run: Path, out: Path) -> list[object]:
    return [run, "--out", out, "--count", COUNT, "--steps", STEPS, "--batch", 6, "--untrained"]


def arrays(out: Path) -> list[bytes]:
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "samples.json", "samples.npz", "untrained.npz"]
    files = [np.load(out / name, allow_pickle=False) for name in ("samples.npz", "untrained.npz")]
    return [file[name].tobytes() for file in files for name in ("arr_0", "arr_1")]


def parts(out: Path) -> list[Path]:
    return list(out.glob("parts/*/part-*.npy"))


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """All images, by one process that nothing has broken off."""
    out = tmp_path_factory.mktemp("whole")
    done = runs.run(command(1, *sampling(trained, out)))
    assert done.returncode == 0, done.stderr
    return arrays(out)


def test_killed_and_gone_on_with_by_another_number(trained: Path, whole: list[bytes], tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with runs.started(command(2, *sampling(trained, out)), log, lambda: len(parts(out)) >= 1) as process:
        ranks = psutil.Process(process.pid).children(recursive=True)
        next(rank for rank in ranks if rank.environ().get("RANK") == "1").kill()
        assert process.wait(timeout=60) != 0  # the other one does not wait for it
    kept = {path: path.stat().st_ino for path in parts(out)}
    with runs.started(command(1, *sampling(trained, out)), log, lambda: len(parts(out)) > len(kept)):
        pass
    assert {path: path.stat().st_ino for path in kept} == kept and not (out / "samples.npz").exists()
    done = runs.run(command(2, *sampling(trained, out)))
    assert done.returncode == 0, done.stderr
    samples = [int(n) for n in re.findall(rf"samples:.* (\d+)/{COUNT} ", done.stderr)]
    assert samples[0] >= PART and samples[-1] == COUNT  # the bar of rank 0 counts for all, on from what was there
    assert arrays(out) == whole


def test_many_ranks_say_once_that_the_input_is_bad(trained: Path, tmp_path: Path) -> None:
    done = runs.run(command(2, trained, "--out", tmp_path / "out", "--classes", "plaid", script=TOOL))
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "--classes 'plaid' is not one of 0..2" in line


def test_all_ranks_draw_from_the_checkpoint_of_rank_0(trained: Path) -> None:
    newest, older, *_ = complete(find_checkpoint(str(trained), Counting(HashStore(), 0, 1, 0)).store)
    counters = HashStore()
    counters.add("images seen", older.meta["images"] + 1)  # as rank 0 does, before training published another
    assert find_checkpoint(str(trained), Counting(counters, 1, 2, 1)).name == older.name != newest.name


def test_a_rank_that_would_draw_something_else_says_so(tmp_path: Path) -> None:
    first, other = (Parts(tmp_path, "samples", 3, {"device": device}) for device in ("cuda", "cpu"))
    first.prepare()
    first.check()
    with pytest.raises(UserError, match="or only some have a GPU"):
        other.check()
