"""The rules of the house: who may import whom, and that no file hides a module of the standard library."""

import ast
import sys
from pathlib import Path

import pytest

import diffussm

pytestmark = pytest.mark.unit

PACKAGE = Path(diffussm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LEVELS = {  # each may import those below it
    **dict.fromkeys(("commands", "train"), 5),
    **dict.fromkeys(("training", "hub"), 4),
    "evaluation": 3,
    **dict.fromkeys(("data", "autoencoders", "diffusion", "models"), 2),
    "ops": 1,
}
FORBIDDEN = {
    "diffusion": {"diffussm.models", "diffussm.data", "diffussm.autoencoders"},
    "models": {"diffussm.data", "diffussm.diffusion", "diffussm.autoencoders"},
    "data": {"torch.distributed", "diffussm.models", "diffussm.diffusion"},
    "ops": {"diffussm.models"},
}
ONLY_IN = {"deepspeed": {"training"}, "diffusers": {"autoencoders", "hub", "diffusion"}}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    mine = part(path)
    for name in imports(path):
        assert not any(name == bad or name.startswith(bad + ".") for bad in FORBIDDEN.get(mine, ())), name
        root = name.split(".")[0]
        assert mine in ONLY_IN.get(root, {mine}), name
        if root == "diffussm" and mine in LEVELS and "." in name:
            other = name.split(".")[1]
            assert (
                LEVELS.get(other, 0) < LEVELS[mine] or other == mine or (LEVELS.get(other) == 2 and mine == "data")
            ), name


def test_no_file_bears_the_name_of_a_standard_module():
    assert not {path.stem for path in FILES} & (set(sys.stdlib_module_names) - {"__main__"}) - {"__init__"}


def test_the_entry_point_is_short():
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 120
