"""tools/eval_fid.py: a whole run scored by a process of its own, and every kind of bad input."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffussm.autoencoders.kl import AutoencoderKLCodec
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.commands.eval_fid import main, newest_samples
from diffussm.data.encode import encode
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.errors import run_command

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
METRICS = ("FID", "sFID", "IS", "precision", "recall")


def draw_images(count: int, seed: int) -> np.ndarray:
    """Uint8 [count, 16, 16, 3]: a bright grey bar of its own place and slope on a dark ground."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:16, :16]
    slope, place = generator.uniform(-1, 1, (2, count, 1, 1))
    distance = np.abs(columns - 8 - 4 * place - slope * (rows - 8))
    grey = 230 * np.exp(-((distance / 2) ** 2)) + generator.uniform(0, 20, (count, 16, 16))
    return grey.astype(np.uint8)[..., None].repeat(3, axis=3)


def encode_images(images: np.ndarray, path: Path) -> None:
    source = ArrayImages(path.name, ["bar"], images, np.zeros(len(images), np.int64))
    encode(source, PixelCodec(16, 16, 3, 16), open_store(path))


def test_scores_the_newest_run_beside_its_floor_and_untrained_samples(tmp_path: Path) -> None:
    encode_images(draw_images(60, 1), tmp_path / "data/train")
    encode_images(draw_images(64, 2), tmp_path / "data/test")
    older, newer = tmp_path / "runs/older/samples/samples.npz", tmp_path / "runs/newer/samples/samples.npz"
    for path in (older, newer):
        path.parent.mkdir(parents=True)
    np.savez(older, draw_images(4, 3))
    os.utime(older, (1, 1))
    np.savez(newer, draw_images(32, 4) // 4 * 3 + 20)
    noise = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(newer.with_name("untrained.npz"), noise)
    record = {
        "samples": "samples.npz",
        "untrained": "untrained.npz",
        "data": {"path": "data/train", "reference": "data/test"},
        "guidance": 2.0,
        "images_seen": 640,
    }
    newer.with_suffix(".json").write_text(json.dumps(record))

    command = [sys.executable, ROOT / "tools/eval_fid.py", "--max-reference", "48", "--json", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert json.loads((tmp_path / "runs/newer/scores.json").read_text()) == report
    assert not (tmp_path / "runs/older/scores.json").exists()

    assert report["extractor"] == "efficientnet-lite0"
    assert report["reference"] == {"path": "data/test", "images": 48}
    assert report["samples"] == {"path": "runs/newer/samples/samples.npz", **record}
    floor, trained, untrained = report["rows"]
    assert [row["name"] for row in report["rows"]] == ["real train (floor)", "trained", "untrained"]
    assert [row["images"] for row in report["rows"]] == [32, 32, 32]
    names = [f"{metric} (efficientnet-lite0)" for metric in METRICS]
    assert all(list(row) == ["name", *names, "images"] for row in report["rows"])
    fid = names[0]
    assert floor[fid] < trained[fid] < untrained[fid]
    assert floor["precision (efficientnet-lite0)"] > 0.5

    lines = done.stdout.splitlines()
    assert lines[0] == "features of efficientnet-lite0, against data/test (48 images)"
    assert lines[1].split() == [*METRICS, "images"]
    assert lines[3].split() == ["trained", *(f"{trained[name]:.3f}" for name in names), "32"]
    assert "fewer than 10,000 images" in lines[5] and report["notes"] == lines[5:]
    assert "image/s" in done.stderr


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command in this process, in ``tmp_path``; its one line of error, once it has exited with code 2."""
    monkeypatch.chdir(tmp_path)
    np.savez("good.npz", draw_images(8, 0))

    def refuse(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["eval_fid.py", *arguments])
        with pytest.raises(SystemExit) as exit:
            run_command(main)
        assert exit.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = [line for line in captured.err.replace("\r", "\n").splitlines() if "image/s" not in line and line]
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    return refuse


def assert_matches(line: str, pattern: str) -> None:
    assert re.search(pattern, line), line


BAD_SAMPLES = {
    "two axes": (np.zeros((8, 16), np.uint8), r"the images are of shape \(8, 16\)"),
    "grey": (np.zeros((8, 16, 16), np.uint8), r"the images are grey, \(8, 16, 16\).*repeat them to 3 channels"),
    "one channel": (np.zeros((8, 16, 16, 1), np.uint8), r"the images are grey, \(8, 16, 16, 1\)"),
    "alpha": (np.zeros((8, 16, 16, 4), np.uint8), r"the images have 4 channels.*drop the transparency"),
    "channels first": (np.zeros((8, 3, 16, 16), np.uint8), r"the images are of shape \(8, 3, 16, 16\)"),
    "empty": (np.zeros((0, 16, 16, 3), np.uint8), r"the images are of shape \(0, 16, 16, 3\)"),
    "not numbers": (np.full((8, 16, 16, 3), np.nan, np.float32), "the images are float32, not uint8"),
    "wide integers": (np.full((8, 16, 16, 3), 300, np.int64), "the images are int64, not uint8"),
    "scaled to 1": (np.ones((8, 16, 16, 3), np.uint8), "the images hold nothing but 0 and 1"),
    "pickled objects": (np.array([{}, []], dtype=object), "arr_0 is damaged, pickled"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_refuses_bad_samples(case: str, run: Callable[..., str]) -> None:
    array, message = BAD_SAMPLES[case]
    np.savez("bad.npz", array)
    assert_matches(run("bad.npz", "--reference", "good.npz"), f"bad.npz: {message}")
    assert_matches(run("good.npz", "--reference", "good.npz", "--against", "x=bad.npz"), f"bad.npz: {message}")
    assert_matches(run("good.npz", "--reference", "bad.npz"), f"bad.npz: {message}")


def test_refuses_files_that_are_no_npz(run: Callable[..., str]) -> None:
    whole = Path("good.npz").read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 255
    np.save("array.npy", draw_images(8, 0))
    np.savez("other.npz", images=draw_images(8, 0))
    for name, content in {
        "torn.npz": whole[: len(whole) // 2],
        "flipped.npz": bytes(changed),
        "text.npz": b"hello",
        "empty.npz": b"",
        "pickle.npz": pickle.dumps([1, 2]),
    }.items():
        Path(name).write_bytes(content)
        assert_matches(run(name, "--reference", "good.npz"), f"{name}.*damaged")
    assert_matches(run("array.npy", "--reference", "good.npz"), "array.npy is not an .npz file")
    assert_matches(run("other.npz", "--reference", "good.npz"), "other.npz has no arr_0, only images")
    assert_matches(run("absent.npz", "--reference", "good.npz"), "there is no file absent.npz")


def test_refuses_bad_references(run: Callable[..., str]) -> None:
    inception = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    small = {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(4), "sigma_s": np.eye(4)}
    references = {
        "inception": (inception, "statistics of 2048 and 2023 features.*the 2015 Inception graph"),
        "partial": ({"mu": np.zeros(4), "sigma": np.eye(4)}, "has no mu_s"),
        "crooked": ({**small, "sigma": np.eye(5)}, r"a mean of \(4,\) does not go with a covariance of \(5, 5\)"),
        "broken": ({**small, "mu": np.full(4, np.nan)}, "mu is not an array of finite"),
    }
    for name, (arrays, message) in references.items():
        np.savez(f"{name}.npz", **arrays)
        assert_matches(run("good.npz", "--reference", f"{name}.npz"), f"{name}.npz.*{message}")
    assert_matches(run("good.npz", "--reference", "nowhere"), "no index.json in nowhere")
    np.savez("few.npz", draw_images(3, 0))
    assert_matches(run("good.npz", "--reference", "few.npz"), "at least 4 images in each set, got 3")


def test_refuses_when_there_is_nothing_to_do(run: Callable[..., str]) -> None:
    assert_matches(run(), "nothing to score.*python tools/sample.py")
    assert_matches(run("good.npz"), "nothing to compare good.npz with: give --reference")
    assert_matches(
        run("good.npz", "--reference", "good.npz", "--extractor", "vgg"), "--extractor: invalid choice: 'vgg'"
    )
    assert_matches(run("good.npz", "--against", "untrained.npz"), "'untrained.npz' is not NAME=FILE")
    assert_matches(run("good.npz", "--max-reference", "1"), "--max-reference must be at least 2")
    assert_matches(run("good.npz", "--bootstrap", "5"), "--bootstrap must be at least 20")
    assert_matches(run("--write-reference", "new.npz"), "--write-reference needs --reference REAL")
    Path("good.json").write_text("{")
    assert_matches(run("good.npz"), "good.json is damaged.*python tools/sample.py")


def test_a_newer_run_without_samples_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for time, name in enumerate(
        ("runs/a/samples/samples.npz", "runs/a/checkpoints/latest", "runs/b/checkpoints/latest")
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (time, time))
    assert newest_samples() == Path("runs/a/samples/samples.npz")
    assert capsys.readouterr().err == "note: runs/b is newer, and has no samples: python tools/sample.py runs/b\n"


def test_a_run_on_latents_is_scored_without_a_floor(
    tmp_path: Path, make_autoencoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, call
) -> None:
    """The decoded latents are not the real images; those of a reference file are."""
    monkeypatch.chdir(tmp_path)
    codec = AutoencoderKLCodec.open(str(make_autoencoder()), 16, "float32", "cpu")
    source = ArrayImages("bars", ["bar"], draw_images(8, 1), np.zeros(8, np.int64))
    encode(source, codec, open_store(tmp_path / "latents"))
    np.savez("real.npz", draw_images(8, 2))
    np.savez("samples.npz", draw_images(8, 3))
    record = {"samples": "samples.npz", "data": {"path": "latents", "reference": None}}
    Path("samples.json").write_text(json.dumps(record))
    code, out, error = call(main, "samples.npz", "--reference", "real.npz")
    assert code == 0, error
    assert "trained" in out and "floor" not in out
    assert "note: no floor of real images: latents holds latents of a lossy autoencoder" in error
    code, _, error = call(main, "samples.npz", "--reference", "real.npz", "--floor", "latents")
    assert code == 2 and "error: latents holds latents of a lossy autoencoder" in error
    Path("samples.json").write_text(json.dumps({"samples": "else.npz", "data": 5}))  # another program's
    code, out, error = call(main, "samples.npz", "--reference", "real.npz", "--json", "-")
    assert code == 0 and [row["name"] for row in json.loads(out)["rows"]] == ["samples"]
    assert "FID of fewer than 10,000 images comes out too high" in error


def test_what_cannot_be_compared_is_told_before_samples_are_drawn(tmp_path: Path, monkeypatch, call) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("real.npz", draw_images(8, 2))
    wanted = "out/samples.npz", "--check", "--reference"
    assert call(main, *wanted, "real.npz") == (0, "", "")
    code, _, error = call(main, *wanted, "rael.npz")
    assert code == 2 and error == "error: there is no file rael.npz\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.npz"]


def test_samples_of_a_file_against_a_folder_of_any_sizes(tmp_path: Path, monkeypatch, call) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("samples.npz", draw_images(8, 3))
    Path("photos").mkdir()
    for number, image in enumerate(draw_images(8, 2)):
        Image.fromarray(image).resize((20 + number, 40)).save(f"photos/{number}.png")
    code, _, error = call(main, "samples.npz", "--reference", "photos")
    assert code == 2 and "--size N makes them alike" in error
    code, out, error = call(main, "samples.npz", "--reference", "photos", "--size", 16)
    assert code == 0 and "against photos (8 images)" in out, error
    code, _, error = call(main, "samples.npz", "--reference", "samples.npz", "--size", 16)
    assert code == 2 and "--size 16 is for folders of image files" in error


def test_a_reference_is_not_written_over_its_images(tmp_path: Path, monkeypatch, call) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("real.npz", draw_images(8, 2))
    before = Path("real.npz").read_bytes()
    code, _, error = call(main, "--reference", "real.npz", "--write-reference", "real.npz")
    assert code == 2 and "real.npz holds the images themselves" in error
    code, _, error = call(main, "real.npz", "--reference", "real.npz", "--write-reference", "new.npz")
    assert code == 2 and "--write-reference scores nothing: leave samples out" in error
    assert [path.name for path in tmp_path.iterdir()] == ["real.npz"] and Path("real.npz").read_bytes() == before


def test_samples_from_a_pipe_and_from_a_folder_score_as_from_a_file(tmp_path: Path) -> None:
    samples = draw_images(40, 3)
    np.savez(tmp_path / "real.npz", draw_images(40, 2))
    np.savez(tmp_path / "samples.npz", samples)
    (tmp_path / "samples").mkdir()
    for number, image in enumerate(samples):
        Image.fromarray(image).save(tmp_path / f"samples/{number:02}.png")
    pipe = io.BytesIO()
    for part in np.array_split(samples, 3):
        np.save(pipe, part)
    rows = []
    for name in ("samples.npz", "samples", "-"):
        command = [sys.executable, ROOT / "tools/eval_fid.py", name, "--reference", "real.npz", "--json", "-"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, input=pipe.getvalue(), timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        (row,) = json.loads(done.stdout)["rows"]
        rows.append({key: value for key, value in row.items() if key != "name"})
    assert rows[1] == pytest.approx(rows[0], rel=1e-6)
    assert rows[2] == pytest.approx(rows[0], rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.npz", "samples", "samples.npz"]
