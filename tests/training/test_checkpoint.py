"""Checkpoints are complete or invisible, and nothing torn or foreign is loaded."""

import json
import shutil

import pytest
import torch

from diffussm.config import Config, to_dict
from diffussm.errors import UserError
from diffussm.files import sha256_of
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.training import checkpoint

pytestmark = pytest.mark.unit

SIZE = ModelConfig("custom", 16, 1, 2, 4)


class Killed(Exception):
    pass


def save(folder, images, keep=2, fail_at=None):
    """A checkpoint by one rank, whose engine writes two shards; ``fail_at`` dies at the first, second, ... barrier."""
    model = DiffuSSM(SIZE, channels=4, num_classes=3)
    config = to_dict(Config(model=SIZE))
    meta = {"format": checkpoint.FORMAT, "images": images, "config": config, "channels": 4, "num_classes": 3}
    barriers = iter(range(10))

    def barrier():
        if next(barriers) == fail_at:
            raise Killed

    def save_engine(partial):
        (partial / checkpoint.ENGINE).mkdir()
        for rank in range(2):
            torch.save({"rank": rank}, partial / checkpoint.ENGINE / f"rank{rank}.pt")

    checkpoint.save(folder, meta, model.state_dict(), save_engine, is_main=True, barrier=barrier, keep=keep)
    return model


def test_round_trip(tmp_path):
    model = save(tmp_path, 640)
    found = checkpoint.find(tmp_path)
    loaded, meta = checkpoint.load_model(found)
    assert meta["images"] == 640
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert not loaded.training


def test_nothing_saved_is_nothing_found(tmp_path):
    assert checkpoint.find(tmp_path / "checkpoints") is None


def test_the_newest_are_kept(tmp_path):
    for images in (1, 2, 3, 4):
        save(tmp_path, images)
    assert sorted(p.name for p in tmp_path.glob("images-*")) == [f"images-{n:012d}" for n in (3, 4)]
    assert checkpoint.find(tmp_path).name == "images-000000000004"


@pytest.mark.parametrize("moment", [0, 1])
def test_a_death_while_saving_leaves_the_old_one_and_no_litter_after_the_next(tmp_path, moment):
    save(tmp_path, 1)
    with pytest.raises(Killed):
        save(tmp_path, 2, fail_at=moment)
    assert checkpoint.find(tmp_path).name == "images-000000000001"
    save(tmp_path, 2)
    assert checkpoint.find(tmp_path).name == "images-000000000002"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images-000000000001", "images-000000000002", "latest"]


def test_a_death_between_the_rename_and_the_pointer_loses_nothing(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "latest").write_text("images-000000000001\n")
    assert checkpoint.find(tmp_path).name == "images-000000000002"


@pytest.mark.parametrize("name", ["ema.safetensors", "meta.json", "manifest.json", "deepspeed/rank1.pt"])
@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_a_torn_one_is_passed_over_and_named(tmp_path, capsys, name, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    victim = tmp_path / "images-000000000002" / name
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(content[:-10])
    else:
        victim.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    assert checkpoint.find(tmp_path).name == "images-000000000001"
    assert "images-000000000002" in capsys.readouterr().err
    with pytest.raises(UserError, match="images-000000000002"):
        checkpoint.load_model(tmp_path / "images-000000000002")


def test_the_weights_of_another_model_are_refused(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "images-000000000001"
    meta = json.loads((folder / "meta.json").read_text())
    meta["config"]["model"]["depth"] = 2
    (folder / "meta.json").write_text(json.dumps(meta))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["meta.json"] = {"size": (folder / "meta.json").stat().st_size, "sha256": sha256_of(folder / "meta.json")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not fit the model"):
        checkpoint.load_model(folder)


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "images-000000000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    outside = {"size": (tmp_path / "latest").stat().st_size, "sha256": sha256_of(tmp_path / "latest")}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"../latest": outside}))
    with pytest.raises(UserError, match="does not list the files"):
        checkpoint.verify(folder)


def test_saving_below_newer_ones_keeps_what_it_saves(tmp_path):
    for images in (5, 9, 7):
        save(tmp_path, images, keep=1)
    assert sorted(p.name for p in tmp_path.glob("images-*")) == [f"images-{n:012d}" for n in (7, 9)]


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="does not list the files"):
        checkpoint.load_model(tmp_path)
    (tmp_path / "meta.json").write_text('{"format": "other/9"}')
    with pytest.raises(UserError, match="other/9"):
        checkpoint.load_meta(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.load_model(tmp_path)
