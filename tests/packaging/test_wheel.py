"""The built package: what is in it, and that a clean environment with nothing but it and its requirements works."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import runs

import diffussm

pytestmark = pytest.mark.e2e

OPTIONAL = (
    "boto3", "botocore", "braceexpand", "deepspeed", "diffusers", "efficientnet_lite_pytorch", "isal", "lmdb",
    "matplotlib", "mpi4py", "psutil", "pytest", "scipy", "tensorboard", "urllib3", "webdataset",
)  # fmt: skip
NEED_THEM = {f"diffussm.data.{name}" for name in ("compat", "s3", "s3_errors", "s3_requests", "s3_transfer")}
NEED_THEM.add("diffussm.hub")
DRAW_BY_PIPELINE = """
import numpy as np, torch
from diffussm.diffusion.noise import sample_noise
from diffussm.hub import DiffuSSMPipeline
from diffussm.hub.schedulers import scheduler_for
pipeline = DiffuSSMPipeline.from_pretrained("pipeline")
pipeline.scheduler = scheduler_for("ddim", 1000)
noise = sample_noise(0, range(4), (4, 8, 8), 0)
labels = ["dark", "bright", "striped", "dark"]
images = pipeline(labels, guidance_scale=2.0, num_inference_steps=3, latents=noise, output_type="np").images
np.save("images.npy", np.round(255 * images).astype(np.uint8))
"""
IMPORT_ALL = """
import diffussm, importlib, pkgutil
for module in pkgutil.walk_packages(diffussm.__path__, "diffussm."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        print(module.name, error.name)
print(diffussm.__file__)
"""
CALL_FOR_HELP = """
import importlib.metadata, sys
for command in importlib.metadata.distribution("diffussm").entry_points:
    sys.argv = [command.name, "--help"]
    print(f"\\n= {command.name}", flush=True)
    try:
        command.load()()
    except SystemExit as exit:
        assert exit.code == 0
    except ModuleNotFoundError as error:
        print("missing", error.name)
"""
LOOK = f"import importlib.util; print([name for name in {OPTIONAL} if importlib.util.find_spec(name)])"


def sources(*folders: str) -> set[str]:
    found = (path for folder in folders for path in (runs.ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(runs.ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_has_the_package_and_nothing_else(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (license,) = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
        assert wheel.read(license) == (runs.ROOT / "LICENSE").read_bytes()
        assert wheel.read("diffussm/ds_configs/zero2.json") == (runs.ROOT / "ds_configs/zero2.json").read_bytes()
    assert names == sources("diffussm") | {f"diffussm/{name}" for name in sources("ds_configs")}
    assert "diffussm/py.typed" in names and "diffussm/configs/fashion32.yaml" in names


def test_the_sdist_has_what_builds_and_tests_it(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in sdist.getnames()}
    known = subprocess.run(["git", "ls-files"], cwd=runs.ROOT, capture_output=True, text=True, check=False).stdout
    folders = "diffussm", "tests", "tools", "launch", "ds_configs", "benchmarks", "docs", "examples"
    assert names >= ({name for name in known.split() if not name.startswith(".")} or sources(*folders))
    assert names >= {"setup.py", "pyproject.toml", "requirements.txt", "Makefile", "mkdocs.yml", "README.md", "LICENSE"}
    assert not [name for name in names if name.endswith(".pyc")]


def test_samples_of_the_base_install_are_those_of_a_checkout(install, run_in, trained, tmp_path):
    bin = install()
    assert run_in(bin, "python", "-c", LOOK).stdout == "[]\n"
    arguments = [trained, "--count", 6, "--untrained", "--json", "-", "--out"]
    done = run_in(bin, "diffussm-sample", *arguments, tmp_path / "installed")
    assert done.returncode == 0, done.stderr
    door = [sys.executable, str(runs.ROOT / "tools/sample.py"), *map(str, arguments), str(tmp_path / "checkout")]
    subprocess.run(door, env=runs.environment(), check=True, capture_output=True)
    for name in ("samples.npz", "untrained.npz", "grid.png"):
        assert (tmp_path / "installed" / name).read_bytes() == (tmp_path / "checkout" / name).read_bytes(), name
    assert json.loads(done.stdout)["images_seen"] == 96


def test_the_extra_hub_converts_a_run_and_draws_by_the_pipeline(install, run_in, trained, tmp_path):
    bin = install("hub")
    assert "diffusers" in run_in(bin, "python", "-c", LOOK).stdout
    assert "deepspeed" not in run_in(bin, "python", "-c", LOOK).stdout
    for program, *arguments in (
        ("diffussm-convert", trained, "--out", "pipeline"),
        ("python", "-c", DRAW_BY_PIPELINE),
        ("diffussm-sample", trained, "--count", 4, "--steps", 3, "--sampler", "ddim", "--guidance", 2, "--out", "out"),
    ):
        done = run_in(bin, program, *arguments)
        assert done.returncode == 0, done.stderr
    drawn = np.load(tmp_path / "out/samples.npz", allow_pickle=False)["arr_0"]
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy").repeat(3, axis=3), drawn)


def test_every_module_but_those_of_s3_webdataset_and_diffusers_is_imported_by_the_base_install(install, run_in):
    *failed, file = run_in(install(), "python", "-c", IMPORT_ALL).stdout.splitlines()
    assert file.startswith(str(install().parent))
    assert {line.split()[0] for line in failed} == NEED_THEM
    assert {line.split()[1].split(".")[0] for line in failed} <= set(OPTIONAL)


def test_the_extras_together_suit_the_versions_that_are_tested_and_import_every_module(install, run_in):
    bin = install("demo", "mpi", "s3", "lsun", "hub", "plot", "dev")
    done = run_in(bin, "python", "-c", IMPORT_ALL)
    assert len(done.stdout.splitlines()) == 1, done.stdout
    assert run_in(bin, "python", "-c", LOOK).stdout == f"{list(OPTIONAL)}\n"


def test_every_command_tells_its_name_and_an_example_without_any_extra(install, run_in):
    bin = install()
    done = run_in(bin, "python", "-c", CALL_FOR_HELP)
    assert done.returncode == 0, done.stderr
    helps = dict(text.split("\n", 1) for text in done.stdout.split("\n= ")[1:])
    assert len(helps) == 9
    for name, text in helps.items():
        assert (bin / name).exists()
        assert text.startswith(f"usage: {name}"), text
        assert "example" in text and "tools/" not in text, text


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("diffussm-train", "--data.prepare", "null"), "train"),
        (("diffussm-encode", "--source", "webdataset", "--classes", "2", "--input", "x.tar", "--out", "y"), "data"),
        (("diffussm-verify-shards", "s3://bucket/data"), "s3"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(install, run_in, tmp_path, command, extra):
    done = run_in(install(), *command)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith(f": pip install 'diffussm[{extra}]'")
    assert not list(tmp_path.glob("y"))


def test_the_base_install_reads_data_sets(install, run_in, shades):
    done = run_in(install(), "diffussm-verify-shards", shades / "test")
    assert done.returncode == 0 and done.stdout.endswith("sound\n"), done.stderr
    table = run_in(install(), "diffussm-eval-fid", shades / "test", "--reference", shades / "train")
    assert table.stderr.splitlines()[-1].endswith("pip install 'diffussm[eval]'")


def test_the_extra_train_trains_by_the_name_of_a_deepspeed_config(install, run_in, shades, tmp_path):
    arguments = runs.arguments(shades, tmp_path / "run", train__total_images=16, train__decay_images=0)[2:]
    done = run_in(install("train"), "diffussm-train", "--deepspeed", "zero1", *arguments)
    assert done.returncode == 0, done.stderr
    filled = json.loads((tmp_path / "run/ds_config.json").read_text())
    assert filled["zero_optimization"]["stage"] == 1
    assert (tmp_path / "run/checkpoints/latest").exists()


def test_types_arrive_from_the_wheel(install, tmp_path):
    example = Path(__file__).parent / "typed_example.py"
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nwarn_unused_ignores = True\n[mypy-torch.*]\nfollow_imports = skip\n"
    )  # 20 s
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--python-version", "3.10"]
    target = [f"--python-executable={install() / 'python'}", str(example)]
    environment = {key: value for key, value in runs.environment().items() if key != "PYTHONPATH"}
    done = subprocess.run([*command, *target], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_the_packages(install):
    (metadata,) = install().parent.glob("lib/python*/site-packages/diffussm-*.dist-info")
    assert Distribution.at(metadata).version == diffussm.__version__
