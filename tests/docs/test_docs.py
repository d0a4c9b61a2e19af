"""The site builds without a warning, nothing in it leads nowhere or abroad, and what it says of the code is so."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import runs
import yaml

from diffussm.config import known_keys

pytestmark = pytest.mark.unit

DOCS = runs.ROOT / "docs"
PAGES = [runs.ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
LITERAL = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)


def copied(project: Path) -> Path:
    shutil.copy(runs.ROOT / "mkdocs.yml", project)
    shutil.copytree(DOCS, project / "docs")
    return project


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("docs") / "site"
    done = build(runs.ROOT, site)
    assert done.returncode == 0, done.stderr
    return site


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    nav = yaml.safe_load((runs.ROOT / "mkdocs.yml").read_text())["nav"]
    named = [page for section in nav for pages in section.values() for page in pages]
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))
    assert all((site / page).with_suffix(".html").stat().st_size > 1000 for page in named)
    assert not list(site.rglob("*.py"))


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="([^"]+)"', page.read_text())
        assert loaded and not [url for url in loaded if urlsplit(url).netloc], page


def test_nothing_is_left_as_markdown(site: Path) -> None:
    """A list that is indented otherwise than Python-Markdown has it, or a table without a line before it, is text."""
    for path in [site / page.with_suffix(".html").name for page in DOCS.glob("*.md")]:
        article = re.search(r"<article.*</article>", path.read_text(), re.DOTALL).group()
        text = re.sub(r"<[^>]+>", "", re.sub(r"<(code|pre)\b.*?</\1>", "", article, flags=re.DOTALL))
        assert not re.findall(r"^\s*(?:[-*] .*|\d+\. .*|\|.*|```.*)|\*\*.*", text, re.MULTILINE), path.name


def test_diagrams_are_shown(site: Path) -> None:
    page = (site / "architecture.html").read_text()
    for name in ("data.svg", "block.svg"):
        assert f'src="images/{name}"' in page and (site / "images" / name).is_file()


def test_what_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    project = copied(tmp_path)
    with (project / "docs/index.md").open("a") as page:
        page.write("\n[a page](nowhere.md) [an anchor](data.md#nowhere) [outside](../launch/common.sh)\n")
    (project / "docs/unlisted.md").write_text("# Not in the navigation\n")
    done = build(project, tmp_path / "site")
    assert done.returncode == 1
    for fault in ("'nowhere.md'", "'data.md#nowhere'", "'../launch/common.sh'", "unlisted.md"):
        assert fault in done.stderr, fault


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_of_that_very_name(page: Path) -> None:
    """Also where the machine's file system would not mind the case."""
    for target in LINK.findall(LITERAL.sub("", page.read_text())):
        url = urlsplit(target)
        if url.scheme or url.netloc:
            assert url.scheme == "https" and re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", url.netloc), target
            continue
        place = page.parent
        for part in Path(url.path).parts:
            assert part == ".." or part in {path.name for path in place.iterdir()}, f"{page.name}: {target}"
            place = place / part


@pytest.mark.parametrize("script", ["configuration.py", "pictures.py"])
def test_what_is_made_from_code_is_current(script: str, tmp_path: Path) -> None:
    target = tmp_path / "configuration.md" if script == "configuration.py" else tmp_path
    subprocess.run([sys.executable, DOCS / script, target], check=True, cwd=runs.ROOT)
    made = [path for path in tmp_path.iterdir() if path.suffix in (".md", ".svg")]
    assert made
    for path in made:
        kept = DOCS / (path.name if path.suffix == ".md" else f"images/{path.name}")
        assert kept.read_text() == path.read_text(), f"python docs/{script}"


def test_the_configuration_page_explains_every_key() -> None:
    table = re.findall(
        r"^\| `([\w.]+)` \| [^|]+ \| `[^`]*` \| ([^|]+) \|$", (DOCS / "configuration.md").read_text(), re.M
    )
    assert [key for key, _ in table] == known_keys()
    assert all(len(meaning) > 8 for _, meaning in table)


# Messages and options


def texts(path: Path) -> str:
    """All that a file can print: of Python the strings, put together, with ``...`` for what is filled in."""
    if path.suffix != ".py":
        return path.read_text()
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    """A cell that is nothing but code is a message of ours, with ``...`` for what differs; other programs are named."""
    sources = [texts(path) for path in (*runs.ROOT.glob("diffussm/**/*.py"), *runs.ROOT.glob("launch/*.sh"))]
    messages = re.findall(r"^\| `([^|]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 40
    unknown = []
    for message in messages:
        pieces = [piece for piece in message.removeprefix("error: ").split("...") if len(piece.strip()) > 2]
        if not any(all(piece in text for piece in pieces) for text in sources):
            unknown.append(message)
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_options_and_keys_that_pages_name_are_there(call: Callable[..., tuple[int, str, str]], page: Path) -> None:
    """What a page gives to one of tools/ is in its help, or is training's."""
    training = {*known_keys(), "config", "deepspeed"}
    for tool, arguments in re.findall(r"(?:tools|diffussm)/(\w+)\.py([^`\n]*)", page.read_text()):
        options = set(re.findall(r"(?<=\s)--([a-z][\w.-]*)", re.sub(r"\s#.*", "", arguments))) - training
        if options and tool != "train":
            code, help, _ = call(import_module(f"diffussm.commands.{tool}").parse_arguments, "--help")
            assert code == 0
            options -= set(re.findall(r"--([a-z][\w-]*)", help))
        assert not options, f"{page.name}: {tool}.py has no {options}"
