from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import runs
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that is built from it, as `make wheel` makes them."""
    tree = tmp_path_factory.mktemp("tree") / "source"
    shutil.copytree(runs.ROOT, tree, ignore=not_source)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"], cwd=tree, check=True)
    return tree / "dist"


def not_source(folder: str, names: list[str]) -> set[str]:
    """What lies in a checkout and is made there."""
    made = {"build", "data", "dist", "runs"} if Path(folder) == runs.ROOT else set()
    return {name for name in names if name in made or re.match(r"\.|__pycache__$|.*\.egg-info$", name)}


@pytest.fixture(scope="session")
def install(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """install("hub", "eval"): the bin folder of a clean environment that has the wheel with those extras, and nothing
    that it does not ask for: what it requires, and what that requires, is linked from the environment of the tests.
    """

    @functools.cache
    def install(*extras: str) -> Path:
        folder = tmp_path_factory.mktemp("-".join(("installed", *extras)))
        venv.create(folder, symlinks=True)
        (wheel,) = dist.glob("*.whl")
        pip = [sys.executable, "-m", "pip", f"--python={folder / 'bin/python'}", "install", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--quiet", str(wheel)], check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (metadata,) = packages.glob("diffussm-*.dist-info")
        for required in requirements(Distribution.at(metadata), extras):
            link(required, packages)
        return folder / "bin"

    return install


def requirements(root: Distribution, extras: tuple[str, ...]) -> Iterator[Distribution]:
    """All that ``root`` requires with those extras, directly or not; what does not suit it fails."""
    waiting, seen = [(root, ("", *extras))], set()
    while waiting:
        asking, extras = waiting.pop()
        for requirement in map(Requirement, asking.requires or ()):
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                continue
            itself = canonicalize_name(requirement.name) == canonicalize_name(root.name)
            found = root if itself else distribution(requirement.name)
            assert requirement.specifier.contains(found.version, prereleases=True), f"{requirement}: {found.version}"
            node = found.name, *sorted(requirement.extras)
            if node not in seen:
                seen.add(node)
                waiting.append((found, ("", *requirement.extras)))
                yield from () if itself else [found]


def link(distribution: Distribution, packages: Path) -> None:
    """Have a distribution's modules in another folder of packages."""
    for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        if not name.endswith(".pth") and not (packages / name).exists():
            (packages / name).symlink_to(Path(distribution.locate_file(name)))


@pytest.fixture
def run_in(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program of an environment's bin folder, in an empty folder and with none of our own variables."""

    def run(bin: Path, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        command = [str(bin / program), *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run
