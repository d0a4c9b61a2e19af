"""tools/sample.py on a real run: what it writes, that it is reproducible, and what it refuses."""

import json
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import runs
from PIL import Image

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.commands import sample
from diffussm.data.encode import encode
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.errors import UserError, run_command
from diffussm.sample_parts import PART, Parts

pytestmark = pytest.mark.e2e


def call(monkeypatch, *arguments: object) -> None:
    """The command in this process, as the door calls it."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    run_command(sample.main)


def images(folder) -> np.ndarray:
    return np.load(folder / "samples.npz", allow_pickle=False)["arr_0"]


def test_the_command_writes_an_npz_a_picture_and_a_record(trained, tmp_path):
    command = [sys.executable, str(runs.ROOT / "tools/sample.py"), str(trained), "--out", str(tmp_path)]
    done = subprocess.run([*command, "--count", "9", "--untrained", "--json", "-"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record == json.loads(done.stdout)
    assert record["images_seen"] == 96 and record["untrained"] == "untrained.npz"
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (9, 16, 16, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [0, 1, 2] * 3
    untrained = np.load(tmp_path / "untrained.npz", allow_pickle=False)["arr_0"]
    assert untrained.shape == (9, 16, 16, 3) and (untrained != images(tmp_path)).any()
    assert Image.open(tmp_path / "grid.png").size == (3 * 65 - 1, 3 * 65 - 1)
    assert "9/9" in done.stderr and len(list(tmp_path.iterdir())) == 4  # the parts are gone


def test_an_image_is_a_function_of_seed_and_number(trained, tmp_path, monkeypatch):
    for name, *arguments in (
        ("whole", "--count", 6),
        ("batches of four", "--count", 6, "--batch", 4),
        ("one by one", "--count", 6, "--batch", 1),
        ("fewer", "--count", 3),
        ("fewer, guided", "--count", 3, "--guidance", 4),
        ("other seed", "--count", 6, "--seed", 1),
        ("guided", "--count", 6, "--guidance", 4),
        ("other sampler", "--count", 6, "--sampler", "ddim"),
        ("dpm++", "--count", 6, "--sampler", "dpm++"),
        ("bf16", "--count", 6, "--precision", "bf16"),
        ("rounded down", "--count", 6, "--rounding", "down"),
    ):
        call(monkeypatch, trained, "--out", tmp_path / name, *arguments)
    whole = images(tmp_path / "whole")
    for name in ("batches of four", "one by one", "fewer"):
        assert (images(tmp_path / name) == whole[: 3 if name == "fewer" else 6]).all(), name
    assert (images(tmp_path / "fewer, guided") == images(tmp_path / "guided")[:3]).all()
    lost = whole.astype(int) - images(tmp_path / "rounded down")
    assert set(np.unique(lost)) == {0, 1} and 0.3 < lost[(whole > 0) & (whole < 255)].mean() < 0.7
    assert np.abs(images(tmp_path / "bf16").astype(int) - whole).mean() < 2
    for name in ("other seed", "guided", "other sampler", "dpm++", "bf16"):
        assert (images(tmp_path / name) != whole).any(), name


def test_classes_by_name_and_number(trained, tmp_path, monkeypatch):
    call(monkeypatch, trained, "--out", tmp_path, "--count", 4, "--classes", "striped,0")
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert file["arr_1"].tolist() == [2, 0, 2, 0]


def test_classes_at_random_by_the_seed(trained, tmp_path, monkeypatch):
    labels = {}
    for name, *arguments in (("40", "--count", 40), ("9", "--count", 9), ("seed", "--count", 40, "--seed", 1)):
        call(monkeypatch, trained, "--out", tmp_path / name, "--classes", "random", "--steps", 1, *arguments)
        with np.load(tmp_path / name / "samples.npz", allow_pickle=False) as file:
            labels[name] = file["arr_1"].tolist()
    assert set(labels["40"]) == {0, 1, 2} and labels["40"] != sorted(labels["40"]) != labels["seed"]
    assert labels["9"] == labels["40"][:9] != [0, 1, 2] * 3
    assert json.loads((tmp_path / "9/samples.json").read_text())["random_classes"]


def test_an_unconditional_model_trains_and_samples(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 9, 9, 3), dtype=np.uint8)
    images = ArrayImages("noise/train", [], pixels, np.zeros(40, np.int64))
    encode(images, PixelCodec(9, 9, 3, size=10), open_store(tmp_path / "data/train"))  # latents of 12×5×5
    keys = {"model__hourglass": 1, "train__total_images": 16, "train__decay_images": 0}
    done = runs.run(runs.command("python", 1, runs.arguments(tmp_path / "data", tmp_path / "run", **keys)))
    assert done.returncode == 0, done.stderr
    call(monkeypatch, tmp_path / "run", "--count", 5)
    with np.load(tmp_path / "run/samples/samples.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"] and file["arr_0"].shape == (5, 9, 9, 3)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--classes", "3"], "--classes '3' is not one of 0..2"),
        (["--classes", "²"], "is not one of 0..2"),
        (["--classes", "plaid"], "--classes 'plaid' is not one of 0..2 or a name (dark, bright, striped)"),
        (["--steps", "1001"], "1..1000"),
        (["--steps", "0"], "at least 1"),
        (["--ema-images", "0"], "has no weights ema-0"),
        (["--guidance-channels", "5"], "1..4"),
        (["--count", "many"], "--count"),
        (["--sampler", "magic"], "--sampler"),
    ],
)
def test_bad_input_is_one_line_and_code_2_and_writes_nothing(trained, tmp_path, monkeypatch, capsys, arguments, line):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, trained, "--out", tmp_path / "out", *arguments)
    assert end.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("error: ") and line in message
    assert not (tmp_path / "out").exists()


def test_no_checkpoint_and_a_torn_one(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, line in (([], "train first"), ([tmp_path], "holds no complete checkpoint")):
        with pytest.raises(SystemExit) as end:
            call(monkeypatch, *arguments)
        assert end.value.code == 2 and line in capsys.readouterr().err
    torn = tmp_path / "images-000000000096"
    shutil.copytree(trained / "checkpoints" / torn.name, torn)
    (piece,) = torn.glob("rank-00000*.safetensors")
    piece.write_bytes(b"\x00")
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, torn)
    assert end.value.code == 2 and f"{piece.name} is not the file that was saved" in capsys.readouterr().err


def filled(folder, count, side, **description) -> tuple[Parts, np.ndarray]:
    """Parts of random images, and the images."""
    parts = Parts(folder, "samples", count, description)
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    parts.prepare()
    for number in range(len(parts)):
        parts.save(number, images[number * PART : (number + 1) * PART])
    return parts, images


def test_parts_become_one_file_without_being_in_memory_together(tmp_path):
    parts, images = filled(tmp_path / "parts", 40 * PART + 5, 32)
    tracemalloc.start()
    parts.merge(tmp_path / "samples.npz", list(range(len(images))))
    shown = parts.read([0, PART, 40 * PART + 4])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * images[:PART].nbytes < images.nbytes / 8
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert (file["arr_0"] == images).all() and (file["arr_1"] == np.arange(len(images))).all()
    assert (shown == images[[0, PART, -1]]).all()


def test_no_batch_has_images_of_two_parts(tmp_path):
    parts = Parts(tmp_path, "samples", 2 * PART + 3, {})
    batches = [batch for number in range(len(parts)) for batch in parts.batches(number, 48)]
    assert [i for batch in batches for i in batch] == list(range(2 * PART + 3))
    assert all(batch[0] // PART == batch[-1] // PART and len(batch) <= 48 for batch in batches)


def test_parts_of_the_same_images_are_kept_and_others_removed(tmp_path):
    parts, _ = filled(tmp_path, PART + 5, 4, seed=0)
    (tmp_path / "untrained-0123").mkdir()
    assert Parts(tmp_path, "samples", PART + 5, {"seed": 0}).prepare() == PART + 5
    assert Parts(tmp_path, "samples", PART + 5, {"seed": 1}).prepare() == 0
    assert 0 not in parts and (tmp_path / "untrained-0123").exists()


def test_a_part_that_is_lost_or_damaged_is_named(tmp_path):
    parts, _ = filled(tmp_path / "parts", PART + 5, 4)
    (damaged,) = tmp_path.glob("parts/*/part-00001.npy")
    damaged.write_bytes(damaged.read_bytes()[:200])
    for damage in (lambda: None, damaged.unlink):
        damage()
        with pytest.raises(UserError, match=r"part-00001.npy cannot be read .* run the same command again"):
            parts.merge(tmp_path / "samples.npz", None)
    assert not (tmp_path / "samples.npz").exists()


def test_what_is_drawn_already_is_not_drawn_again(trained, tmp_path, monkeypatch, capsys):
    arguments = trained, "--out", tmp_path, "--count", 3, "--sampler", "ddim"

    def draw(*more: object) -> tuple[int, str]:
        call(monkeypatch, *arguments, *more)
        return (tmp_path / "samples.npz").stat().st_ino, capsys.readouterr().out

    first, said = draw()
    assert draw() == (first, said)
    assert draw("--seed", 1)[0] != first
    again, _ = draw()
    (tmp_path / "samples.npz").unlink()
    assert draw()[0] != again and images(tmp_path).shape == (3, 16, 16, 3)
