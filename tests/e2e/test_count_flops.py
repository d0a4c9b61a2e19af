"""tools/count_flops.py: text, JSON and picture by a process of its own, and every kind of bad input."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from diffussm.commands.count_flops import main
from diffussm.errors import run_command
from diffussm.models.diffussm import DiffuSSM, ModelConfig

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


def test_counts_every_preset_beside_dit_and_the_papers(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools/count_flops.py", "--json", "out.json", "--plot", "plots/cost.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())

    sizes = {(row["model"], row["px"]): row for row in report["sizes"]}
    models = ["DiffuSSM-Ti", "DiffuSSM-S", "DiffuSSM-B", "DiffuSSM-L", "DiffuSSM-XL", "DiT-XL/2", "DiT-XL/1"]
    assert list(sizes) == [(model, px) for model in models for px in (256, 512, 1024)]
    assert all(row["flops"] == 2 * row["macs"] for row in sizes.values())
    for px, tokens in ((256, 1024), (512, 4096), (1024, 16384)):
        assert sizes["DiffuSSM-XL", px]["macs"] == pytest.approx(29 * 7.5 * tokens * 1152**2, rel=0.02)
        attention = 28 * (12 * tokens * 1152**2 + 2 * tokens**2 * 1152)
        assert sizes["DiT-XL/1", px]["macs"] == pytest.approx(attention, rel=0.001)
        assert sizes["DiT-XL/2", px]["macs"] < sizes["DiffuSSM-XL", px]["macs"] < sizes["DiT-XL/1", px]["macs"]

    published = [(row["model"], row["px"], round(row["published"] / 1e8)) for row in report["published"]]
    assert ("DiffuSSM-XL", 256, 2803) in published and ("DiffuSSM-XL", 512, 10662) in published
    for row in report["published"]:
        ours = sizes[row["model"], row["px"] or 256][row["figure"]]
        assert row["ours"] == ours
        assert row["difference_percent"] == pytest.approx(100 * (ours - row["published"]) / row["published"])

    parts, total = report["by_part"]["parts"], report["by_part"]["total"]
    assert total == {key: sum(part[key] for part in parts) for key in ("parameters", "macs", "flops")}
    assert total["macs"] == sizes["DiffuSSM-XL", 256]["macs"]

    words = [line.split() for line in done.stdout.splitlines()]
    assert ["DiT-XL/2", "256", "px", "DiT's", "paper", "GMACs", "118.6", "118.6", "+0.0", "%"] in words
    macs = sizes["DiffuSSM-XL", 256]["macs"] / 1e9
    assert words[9][:5] == ["DiffuSSM-XL", "674.1", "M", f"{macs:,.1f}", f"{2 * macs:,.1f}"]
    assert ["DiT-XL/2", "÷", "DiffuSSM-XL", "0.39×", "0.44×", "0.60×"] in words
    assert "it runs on a quarter of the tokens. From 1,712 px it does more than DiffuSSM-XL." in done.stdout
    for px, more in ((1696, False), (1712, True)):
        tokens = (px // 8) ** 2
        dit = 28 * (12 * tokens / 4 * 1152**2 + 2 * (tokens / 4) ** 2 * 1152)
        fft = tokens * (5 * math.log2(2 * tokens) + 4) * 1152
        assert (dit > 29 * (7.5 * tokens * 1152**2 + fft) + 2 * tokens * 1152**2) == more

    with Image.open(tmp_path / "plots/cost.png") as picture:
        assert picture.format == "PNG" and picture.width > 1200 and picture.height > 600
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["cost.png"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the command in this process, in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["count_flops.py", *arguments])
        run_command(main)

    return run


def test_counts_the_model_of_a_configuration(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("model: {preset: custom, width: 32, depth: 2, hourglass: 4, state: 8}\n")
    run("--config", "mine.yaml", "--latent", "3x8x16", "--classes", "7", "--batch", "5", "--json", "-")
    report = json.loads(capsys.readouterr().out)["by_part"]
    model = DiffuSSM(ModelConfig("custom", 32, 2, 4, 8), channels=3, num_classes=7)
    assert report["total"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["latent"] == [3, 8, 16]
    (w0,) = [part for part in report["parts"] if part["part"] == "W0"]
    assert w0["macs"] == 2 * 8 * 16 / 4 * 32**2
    kernel, mix = report["once_a_batch"]
    assert [kernel["part"], mix["part"]] == ["kernel generation", "SSM mix into W_down"]
    run_macs = report["total"]["macs"] - 2 * 8 * 16 * 32**2 + (kernel["macs"] + 2 * 2 * 32**3) / 5
    assert report["run_an_image"] == {"macs": run_macs, "flops": 2 * run_macs}

    Path("wide.yaml").write_text("model: {preset: custom, width: 64, depth: 2, state: 8}\n")
    run("--config", "wide.yaml", "--latent", "4x8x8", "--batch", "2", "--json", "-")  # 128 positions: not more than 2D
    report = json.loads(capsys.readouterr().out)["by_part"]
    assert report["run_an_image"]["macs"] == report["total"]["macs"] + report["once_a_batch"][0]["macs"] / 2
    assert len(report["once_a_batch"]) == 1

    run("--config", "fashion32", "--latent", "4x16x16", "--classes", "10")
    assert re.search(r"^fashion32 by part: width 128, .*\n.*MMACs.*\nW0 +99,072 +12.58", capsys.readouterr().out, re.M)
    run("--preset", "S", "--px", "512")
    assert "DiffuSSM-S by part: width 384, depth 12, hourglass 2, state 64; latent 4×64×64" in capsys.readouterr().out


BAD_ARGUMENTS = {
    "--preset XXL": "--preset: invalid choice: 'XXL'",
    "--px 100": "--px: '100' is not a multiple of 8",
    "--px 0": "--px: '0' is not a multiple of 8",
    "--latent 4x32": "--latent: '4x32' is not channels, height and width such as 4x32x32",
    "--latent 4x0x32": "--latent: '4x0x32' is not",
    "--latent 4x5x5": "5×5 positions are not a multiple of model.hourglass 2",
    "--px 256 --latent 4x32x32": "not allowed with",
    "--preset S --config fashion32": "not allowed with",
    "--classes -1": "--classes must be at least 0",
    "--batch 0": "--batch at least 1",
    "--config fashion32": "--config does not say the latent's shape: add --px or --latent",
    "--config absent --px 256": "'absent' is neither a file nor one of fashion32",
    "--config odd.yaml --px 256": "odd.yaml: unknown config key model.witdh: did you mean model.width",
    "--config file --px 256": "file is not a mapping|file: the file is not a mapping",
    "--plot cost.pdf": "--plot cost.pdf must end in .png",
    "--plot file/cost.png": "file: (File exists|Not a directory)",
    "--json file/out.json": "file: (File exists|Not a directory)",
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_refuses_bad_input(arguments: str, run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    Path("odd.yaml").write_text("model: {witdh: 32}\n")
    Path("file").write_text("text")
    with pytest.raises(SystemExit) as exit:
        run(*arguments.split())
    assert exit.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert re.search(BAD_ARGUMENTS[arguments], line), line


def test_says_what_a_plot_needs(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        run("--plot", "cost.png")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: --plot needs matplotlib: pip install 'diffussm[plot]'\n"
    assert not Path("cost.png").exists()
