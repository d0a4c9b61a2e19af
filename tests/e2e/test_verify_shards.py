"""tools/verify_shards.py: each kind of damage is found and named, and a sound data set passes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
from PIL import Image

from diffussm.autoencoders.kl import AutoencoderKLCodec
from diffussm.commands import verify_shards
from diffussm.data.encode import encode
from diffussm.data.index import SAMPLES_NAME, Index
from diffussm.data.normalisation import Statistics, scaling_warning, spread_ids
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import LocalStore, Stat, open_store
from diffussm.data.verify import verify
from diffussm.data.verify_shard import Problem
from diffussm.errors import run_command

pytestmark = pytest.mark.e2e

COUNT = 130


@pytest.fixture
def data(shades: Path, tmp_path: Path) -> Path:
    """130 images in shards of 40, 40, 40 and 10: the test's own, to damage."""
    return shutil.copytree(shades / "train", tmp_path / "data")


@pytest.fixture
def problems(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., list[str]]:
    """The lines that the command has for problems, called in this process."""

    def call(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["verify_shards.py", str(data), *arguments])
        with pytest.raises(SystemExit) as end:
            run_command(verify_shards.main)
        assert end.value.code == 2
        captured = capsys.readouterr()
        assert sum(line.startswith("error: ") for line in captured.err.splitlines()) == 1
        return [line for line in captured.out.splitlines() if line.startswith("PROBLEM: ")]

    return call


def member(shard: Path, name: str) -> tarfile.TarInfo:
    with tarfile.open(shard) as tar:
        return tar.getmember(name)


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_sound_data_set(data: Path, tmp_path: Path) -> None:
    sheet, figures = tmp_path / "sheet.png", tmp_path / "figures.json"
    tool = runs.ROOT / "tools/verify_shards.py"
    done = runs.run([sys.executable, str(tool), str(data), "--sheet", str(sheet), "--json", str(figures)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "sound" and "4/4" in done.stderr
    report = json.loads(figures.read_text())
    assert (report["samples"], report["shards"], report["problems"], report["warning"]) == (COUNT, 4, [], None)

    index = Index.load(open_store(data))
    stored = np.concatenate([np.load(file) for file in unpacked(data, tmp_path / "unpacked")]).reshape(COUNT, 4, 8, 8)
    np.testing.assert_allclose(report["stored"]["mean"], stored.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(report["normalised"]["std"], (stored * index.scale).std((0, 2, 3)), rtol=1e-6)
    picture = np.asarray(Image.open(sheet))
    assert picture.shape == (8 * 17 - 1, 8 * 17 - 1, 3)
    cells = np.pad(picture, ((0, 1), (0, 1), (0, 0))).reshape(8, 17, 8, 17, 3)[:, :16, :, :16]
    means = cells.mean((1, 3, 4)).ravel()
    labels = index.samples["label"][np.linspace(0, COUNT - 1, 64).astype(int)]
    expected = np.choose(labels, [30, 210, 90])  # dark, bright, striped
    assert np.abs(means - expected).max() < 12


def unpacked(data: Path, folder: Path) -> list[Path]:
    """All arrays, by tarfile and in the order of their keys."""
    for shard in sorted(data.glob("*.tar")):
        with tarfile.open(shard) as tar:
            tar.extractall(folder, filter="data")
    return sorted(folder.glob("*.npy"))


def test_a_byte_of_an_array(data: Path, problems: Callable[..., list[str]]) -> None:
    shard = data / "shard-00001.tar"
    flip_byte(shard, member(shard, "00001-000007.latent.npy").offset_data + 200)
    assert problems() == [
        "PROBLEM: shard-00001.tar: its bytes have changed: it has another sha256",
        "PROBLEM: shard-00001.tar: sample 00001-000007: its bytes have changed: it has another crc32",
    ]


@pytest.mark.parametrize(
    ("name", "place", "line"),
    [
        ("00002-000003.latent.npy", 60, "sample 00002-000003: its array is not of uint8 (4, 8, 8)"),
        ("00002-000003.cls", 0, "sample 00002-000003: its cls says b'"),
        ("00002-000003.cls", -500, "sample 00002-000003: the tar ends before its cls, or a header is damaged"),
        (
            "00002-000039.latent.npy",
            -400,
            "sample 00002-000039: the tar ends before its latent.npy, or a header is dam",
        ),
    ],
)
def test_a_byte_beside_the_numbers(
    name: str, place: int, line: str, data: Path, problems: Callable[..., list[str]]
) -> None:
    """Training does not read these bytes; other readers do."""
    shard = data / "shard-00002.tar"
    flip_byte(shard, member(shard, name).offset_data + place)
    changed, found = problems()
    assert changed.endswith("another sha256")
    assert found.startswith(f"PROBLEM: shard-00002.tar: {line}")


def test_all_kinds_at_once_are_all_found(data: Path, problems: Callable[..., list[str]], tmp_path: Path) -> None:
    one, two, torn = (data / f"shard-0000{number}.tar" for number in (0, 1, 2))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    kept = member(torn, "00002-000038.latent.npy").offset_data + 200
    torn.write_bytes(torn.read_bytes()[:kept])
    (data / "shard-00003.tar").unlink()
    (data / "notes.txt").write_text("mine")
    found = problems("--json", str(tmp_path / "figures.json"))
    assert "PROBLEM: notes.txt: is not of this data set: remove it" in found
    assert "PROBLEM: shard-00003.tar: is missing" in found
    size = len(content)
    assert f"PROBLEM: shard-00002.tar: has {kept} bytes, the index says {size}" in found
    assert "PROBLEM: shard-00002.tar: sample 00002-000038: the shard ends before it" in found
    assert not any("00002-000037" in line for line in found)
    for mine, other in ((0, 1), (1, 0)):
        for place in range(40):
            key, its = f"0000{mine}-{place:06d}", f"0000{other}-{place:06d}"
            line = f"PROBLEM: shard-0000{mine}.tar: sample {key}: where its cls belongs, the tar has '{its}.cls'"
            assert line in found
    report = json.loads((tmp_path / "figures.json").read_text())
    assert [f"PROBLEM: {Problem(**problem)}" for problem in report["problems"]] == found


def test_quick_compares_all_sizes_and_reads_some(data: Path, problems: Callable[..., list[str]], monkeypatch) -> None:
    monkeypatch.setattr(verify_shards, "QUICK_SHARDS", 2)
    for number in (0, 1):
        shard = data / f"shard-0000{number}.tar"
        flip_byte(shard, member(shard, f"0000{number}-000007.latent.npy").offset_data + 200)
    (data / "shard-00002.tar").write_bytes(b"")
    found = problems("--quick")
    assert {line.split(": ")[1] for line in found} == {"shard-00000.tar", "shard-00002.tar"}  # 0 and 3 were read


def change_index(data: Path, **latent: object) -> None:
    path = data / "index.json"
    table = json.loads(path.read_text())
    table["latent"] |= latent
    path.write_text(json.dumps(table))


def test_a_forgotten_scale(data: Path, problems: Callable[..., list[str]]) -> None:
    change_index(data, scale=1.0)
    (found,) = problems()
    assert found.startswith("PROBLEM: index.json: its scale is 1.0, its codec's 0.0078")


def test_a_codec_that_there_is_not(data: Path, problems: Callable[..., list[str]], tmp_path: Path) -> None:
    path = data / "index.json"
    table = json.loads(path.read_text())
    for codec, line in (
        ({"name": "nonsense"}, "unknown codec 'nonsense'"),
        ({"name": "pixel", "x": 1}, "does not take"),
    ):
        path.write_text(json.dumps(table | {"codec": codec}))
        (found,) = problems("--sheet", str(tmp_path / "sheet.png"))
        assert found.startswith("PROBLEM: index.json: ") and line in found
    assert not (tmp_path / "sheet.png").exists()


@pytest.fixture
def of_autoencoder(make_autoencoder: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A data set of an autoencoder's latents, and where the autoencoder was and is not any more."""
    folder, data = make_autoencoder(), tmp_path / "of autoencoder"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    images = ArrayImages("noise", [], pixels, np.zeros(9, np.int64))
    encode(images, AutoencoderKLCodec.open(str(folder), 16), open_store(data), 5)
    return data, folder.rename(folder.with_name(f"{folder.name} moved"))


def test_weights_are_needed_only_for_what_was_asked_for_and_then_must_be_the_same(
    of_autoencoder: tuple[Path, Path], make_autoencoder: Callable[..., Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    data, moved = of_autoencoder
    sheet, other = tmp_path / "sheet.png", make_autoencoder(seed=1)

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["verify_shards.py", str(data), *map(str, arguments)])
        try:
            run_command(verify_shards.main)
        except SystemExit as end:
            captured = capsys.readouterr()
            assert captured.out.endswith("sound\n")  # the data are
            return end.code, captured.err.splitlines()[-1]
        return 0, ""

    assert call() == (0, "")
    assert call("--autoencoder", moved, "--sheet", sheet) == (0, "") and sheet.exists()
    sheet.unlink()
    for arguments, line in (
        (("--sheet", sheet), "is neither a folder nor to be had from the hub"),
        (("--sheet", sheet, "--autoencoder", other), "has other weights"),
        (("--autoencoder", other), "has other weights"),
        (("--autoencoder", tmp_path / "nowhere"), "is neither a folder nor"),
    ):
        code, error = call(*arguments)
        assert code == 2 and error.startswith("error: ") and line in error
        assert not sheet.exists()


def test_latents_far_from_what_the_model_expects(data: Path) -> None:
    """The channels of the usual autoencoder's latents, as published for ImageNet, are fine with its scale only."""
    index = replace(Index.read(open_store(data)), dtype=np.dtype("float16"), shift=0.0)
    random = np.random.default_rng(0)
    mean, std = np.array([5.81, 3.25, 0.12, -2.15]), np.array([4.17, 4.62, 3.71, 3.28])
    latents = (random.normal(size=(200, 4, 8, 8)) * std[:, None, None] + mean[:, None, None]).astype(np.float16)
    statistics = Statistics.of(latents[:90], 4) + Statistics.of(latents[90:], 4)
    np.testing.assert_allclose(statistics.mean, latents.astype(np.float64).mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(statistics.std, latents.astype(np.float64).std((0, 2, 3)), rtol=1e-6)
    assert scaling_warning(replace(index, scale=0.18215), statistics) is None
    for scale in (1.0, 0.18215**2):
        assert "is the autoencoder's scaling_factor right?" in scaling_warning(replace(index, scale=scale), statistics)
    assert scaling_warning(replace(index, dtype=np.dtype("uint8"), scale=1.0), statistics) is None


def test_samples_for_statistics_are_runs_spread_over_all() -> None:
    assert spread_ids(9_999).tolist() == list(range(9_999))
    ids = spread_ids(1_281_167)
    assert len(ids) == 10_000 and ids[0] == 0 and ids[-1] == 1_281_166
    assert (np.diff(ids) == 1).sum() == 10_000 - 40
    assert len(spread_ids(10_001)) <= 10_000


def test_another_etag_is_noted(data: Path) -> None:
    """A copy of a data set is a sound one."""

    class Tagged(LocalStore):
        def list(self, prefix: str = "") -> dict[str, Stat]:
            return {name: replace(stat, etag="copied") for name, stat in super().list(prefix).items()}

    index = Index.read(open_store(data))
    index = replace(index, shards=[replace(shard, etag="first") for shard in index.shards])
    findings = verify(Tagged(data), index)
    assert len(findings.notes) == 4 and "shard-00000.tar has another etag than when" in findings.notes[0]
    assert not findings.problems


def test_what_is_no_data_set(data: Path, tmp_path: Path) -> None:
    tool = str(runs.ROOT / "tools/verify_shards.py")
    for path, line in ((tmp_path / "nowhere", "no index.json in"), (data, "index.json is damaged")):
        (data / SAMPLES_NAME).unlink(missing_ok=True)
        done = subprocess.run([sys.executable, tool, path], capture_output=True, text=True)
        assert done.returncode == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1
