"""FID while training: the figure is that of the tools, and `best` is the checkpoint with the least."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffussm.data.store import open_store
from diffussm.training.checkpoint import complete
from diffussm.training.monitor import log_of

pytestmark = pytest.mark.distributed

FID = "fid/efficientnet-lite0"
COUNT = 37


def tool(name: str, *arguments: object) -> None:
    done = runs.run([sys.executable, str(runs.ROOT / "tools" / name), *map(str, arguments)])
    assert done.returncode == 0, done.stderr


def test_two_ranks_score_as_the_tools_do(shades: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {
        "score.every_images": 32,
        "score.images": COUNT,
        "score.steps": 3,
        "score.batch": 7,
        "score.guidance": 1.5,
        "train.keep_best": FID,
        "train.keep_checkpoints": 3,
    }
    done = runs.run(runs.command("deepspeed", 2, runs.arguments(shades, run, **settings)))
    assert done.returncode == 0, done.stderr
    found = {r["images"]: r[FID] for r in log_of(run) if FID in r}
    assert list(found) == [32, 64, 96] and all(map(math.isfinite, found.values()))
    events = EventAccumulator(str(run / "tensorboard")).Reload().Scalars(FID)
    assert {e.step: pytest.approx(e.value, rel=1e-6) for e in events} == found
    assert f"96 images: {FID} {found[96]:.2f}, of {COUNT} samples" in done.stderr

    checkpoints = complete(open_store(run / "checkpoints"))
    assert {c.meta["images"]: c.meta["metrics"][FID] for c in checkpoints} == found
    best = min(checkpoints, key=lambda c: found[c.meta["images"]])
    assert (run / "checkpoints/best").read_text().strip() == best.name

    out = tmp_path / "samples"
    drawing = ["--sampler", "dpm++", "--steps", 3, "--guidance", 1.5, "--count", COUNT]
    tool("sample.py", run, "--out", out, *drawing)
    tool("eval_fid.py", out / "samples.npz", "--reference", shades / "test", "--json", tmp_path / "scores.json")
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    (row,) = [row for row in rows if row["name"] == "trained"]
    assert row["FID (efficientnet-lite0)"] == pytest.approx(found[96], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"score.every_images": 32, "data.reference": "null"}, "score.every_images needs data.reference"),
        ({"train.keep_best": FID}, f"train.keep_best {FID} is not computed: set score.every_images"),
        ({"score.every_images": 32, "score.extractor": "inception-2015", "train.keep_best": FID}, "say fid/inception"),
        ({"score.every_images": 32, "data.reference": "nowhere.npz"}, "there is no file nowhere.npz"),
    ],
)
def test_what_cannot_be_scored_is_told_at_the_start(settings: dict, line: str, shades: Path, tmp_path: Path) -> None:
    done = runs.run(runs.command("python", 1, runs.arguments(shades, tmp_path / "run", **settings)))
    assert done.returncode == 2
    (told,) = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    assert line in told and not (tmp_path / "run/log.jsonl").exists()
