"""That the code asks for no Python newer than setup.py says: its syntax, and what it uses of the standard library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import runs

pytestmark = pytest.mark.unit

OLDEST = (3, 10)
FOLDERS = ("diffussm", "tools", "benchmarks")
# Gone by 3.13: PEP 594, and distutils, asynchat, asyncore, imp, smtpd of 3.12.
GONE = (
    "aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap msilib nis nntplib "
    "ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib"
)


def vermin(*paths: object) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "vermin"
    command = [str(program), "-t=3.10-", "--no-tips", "--violations", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True)


def test_vermin_finds_what_is_newer_and_finds_none_of_it_here(tmp_path):
    newer = tmp_path / "newer.py"
    newer.write_text("import tomllib\nfrom datetime import UTC\nfrom enum import StrEnum\n")
    found = vermin(newer)
    assert found.returncode == 1
    assert all(name in found.stdout for name in ("tomllib", "datetime.UTC", "enum.StrEnum")), found.stdout
    ours = vermin(*(runs.ROOT / folder for folder in FOLDERS), runs.ROOT / "setup.py")
    assert ours.returncode == 0, ours.stdout


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_oldest_python_parses_it_and_the_newest_has_what_it_imports(folder):
    for path in (runs.ROOT / folder).rglob("*.py"):
        tree = ast.parse(path.read_text(), feature_version=OLDEST)
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & set(GONE.split()), path
