"""Every shell line of PAGES does what it says: each is run, in their order, in a folder that looks like a checkout.

A line is run as it stands, but for what its rule in RULES shows: something that names a machine of the reader's is
replaced, and options are added that make it small. A line that no rule covers fails. `make demo` is made of the
commands of launch/demo.sh, which are run like lines of a page.
"""

from __future__ import annotations

import contextlib
import functools
import html
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import markdown
import numpy as np
import pytest
import runs
from PIL import Image
from slurm.cluster import Cluster, missing

from benchmarks.seaweed import Seaweed
from diffussm.config import CONFIGS

PAGES = ("README.md", "docs/quickstart.md")
DEMO = "launch/demo.sh"
TREE = re.compile(r"(\S+/ *$)|(\S+/\S+ \.\.\.)")  # what the first line of a block that lists files looks like
SECONDS = 120  # of a line
SETTINGS = ("AWS_", "DIFFUSSM", "SLURM", "SBATCH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
FAILURES = (Exception, pytest.fail.Exception, pytest.skip.Exception)

Check = Callable[["Checkout", "Line"], None]


@dataclass(frozen=True)
class Line:
    """A command as its page has it, and the exports and the like that its page has had before."""

    page: str
    text: str
    before: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """Without the comment at its end."""
        return re.sub(r"\s+#.*", "", self.text)


# How lines are judged


def succeeds(checkout: Checkout, line: Line) -> None:
    done = checkout.run(line)
    assert done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr}"


def says(code: int, message: str) -> Check:
    """It ends with one line of its own, and this code."""

    def check(checkout: Checkout, line: Line) -> None:
        done = checkout.run(line)
        errors = [text for text in done.stderr.splitlines() if text.startswith("error:")]
        assert done.returncode == code and len(errors) == 1 and message in errors[0], done.stderr

    return check


def knows_its_options(checkout: Checkout, line: Line) -> None:
    """For what takes minutes: `--help` has every option of the line."""
    done = checkout.run(line)
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"--[a-z][a-z-]*", line.command)) <= set(re.findall(r"--[a-z][a-z-]*", done.stdout))


def changes_the_shell(checkout: Checkout, line: Line) -> None:
    """It is in force for the lines after it; and what it exports is read by somebody."""
    done = checkout.run(line)
    assert done.returncode == 0, done.stderr
    readers = [*(runs.ROOT / "launch").glob("*.sh"), *(runs.ROOT / "diffussm").rglob("*.py")]
    for name in re.findall(r"\b([A-Z]\w+)=", line.command):
        known = name.startswith(("AWS_", "SBATCH_"))
        assert known or any(name in path.read_text() for path in readers), f"nobody reads {name}"


def makes(checkout: Checkout, line: Line) -> None:
    """`make -n` knows the target, and every file that its commands name is there; the demo's are run besides."""
    shown = subprocess.run(
        ["bash", "-c", re.sub(r"\bmake\b", "make -n", line.command)], cwd=runs.ROOT, env=runs.environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    files = re.findall(r"[\w./-]+\.(?:sh|py|toml)\b", shown.stdout)
    assert all((runs.ROOT / file).is_file() for file in files), files
    for command in demo_lines() if f"bash {DEMO}" in shown.stdout else ():
        checkout.follow(command)


def shows_a_run(checkout: Checkout, line: Line) -> None:
    """TensorBoard is asked over HTTP until it has found a run."""
    script = checkout.script(line)
    (port,) = re.findall(r"--port (\d+)", script)
    deadline, shown = time.monotonic() + SECONDS, []
    with checkout.started(script) as process:
        while not shown:
            assert process.poll() is None and time.monotonic() < deadline, f"{script} shows no run"
            with contextlib.suppress(OSError):
                shown = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=10))
            time.sleep(0.1)


def sbatch_would_take_it(checkout: Checkout, line: Line) -> None:
    """Its options, its script, and the resources that this asks for; nothing is submitted."""
    if why := missing():
        pytest.skip(why)
    script = re.sub(r"\bsbatch\b", "sbatch --test-only", checkout.script(line))
    tested = checkout.cluster.try_on("ctl", "bash", "-c", script, cwd=checkout.folder, env=checkout.environment())
    assert tested.returncode == 0 and " to start at " in tested.stderr, tested.stderr


# Which line is judged how. The first rule counts whose pattern is the whole command.


@dataclass(frozen=True)
class Rule:
    pattern: str
    check: Check = succeeds
    add: str = ""  # at the end of the command
    replace: dict[str, str] = field(default_factory=dict)  # in it, by regular expressions


NEEDS_NO_HUB = "--autoencoder {vae} --size 16"
TINY_SAMPLES = "--count 12 --steps 2"
TINY_RUN = (
    "--model.preset custom --model.width 16 --model.depth 1 --model.state 4 --train.global_batch 8 --train.lr 1e-3 "
    "--train.total_images 32 --train.warmup_images 0 --train.decay_images 0 --train.ssm_backend fft "
    "--train.log_images 16 --train.checkpoint_images 32 --train.sample_images 0"
)
TWO_RANKS = {
    r"--(nproc.per.node)[ =]\d+": r"--\1 2 --master-port {port}",
    r"mpirun -np \d+": "mpirun -np 2 --allow-run-as-root --oversubscribe",
    r"^((\w+=\S+ )*)deepspeed ": r"\1deepspeed --master_port {port} ",
}
HERE = {r" /local/": " {folder}/local/"}
NO_DOWNLOAD = {"^": "XDG_CACHE_HOME={folder}/empty https_proxy=http://127.0.0.1:9 "}  # now or earlier
LAUNCHER = r"(\w+=\S+ )*(deepspeed|torchrun|mpirun|python)( -\S+( \d+)?)*( python)?"

RULES = [
    Rule(r"(\w+=\S+ )*make \w+", makes),
    Rule(r"(export( \w+=\S*)+)|(\w+=\S+)", changes_the_shell),
    Rule(r"\. \.venv/bin/activate", changes_the_shell),
    Rule(r"(\w+=\S+ )*sbatch .*", sbatch_would_take_it, replace={r"--partition=\w+": "--partition=main"}),
    Rule(r"tensorboard .*", shows_a_run, add="--port {port}"),
    Rule(rf"{LAUNCHER} diffussm/train\.py.*", add=TINY_RUN, replace=TWO_RANKS | HERE),
    Rule(rf"{LAUNCHER} tools/sample\.py.*", add=TINY_SAMPLES, replace=TWO_RANKS),
    Rule(rf"{LAUNCHER} tools/encode_latents\.py .*--codec pixel.*", replace=TWO_RANKS),
    Rule(rf"{LAUNCHER} tools/encode_latents\.py .*", add=NEEDS_NO_HUB, replace=TWO_RANKS),
    Rule(
        r"python tools/eval_fid\.py .*--extractor inception-2015.*",
        says(2, "give the file with --inception-weights FILE"),
        replace=NO_DOWNLOAD,
    ),
    Rule(r"python tools/eval_fid\.py.*", add="--max-reference 64"),
    Rule(r"python tools/(verify_shards|preflight|count_flops|plan_run|convert_checkpoint)\.py.*"),
    Rule(r"python examples/grid\.py .*"),
    Rule(r"python -m benchmarks\.\w+.*", knows_its_options, add="--help"),
]


def rule_of(line: Line) -> Rule:
    if re.search(r"[;|&<>]", line.command):
        pytest.fail(f"{line.page} has more than one command in a line, which no rule judges: {line.text}")
    for rule in RULES:
        if re.fullmatch(rule.pattern, line.command):
            return rule
    pytest.fail(f"{line.page} has a line that no rule of RULES covers: {line.text}")


# Where they run


class Checkout:
    """A folder that looks like a fresh checkout, and beside it what the pages take for granted: images and a bucket."""

    def __init__(self, folder: Path, server: Seaweed, vae: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder / "checkout"
        self._slurm, self._server, self._vae, self._stack = folder / "slurm", server, vae, stack
        self._ended: dict[Line, BaseException | None] = {}
        self.folder.mkdir()
        for path in runs.ROOT.iterdir():
            if path.name not in ("data", "runs", "site", ".venv", ".git"):
                (self.folder / path.name).symlink_to(path)
        (self.folder / ".venv").symlink_to(sys.prefix)
        (self.folder / "run.yaml").write_text((CONFIGS / "fashion32.yaml").read_text().replace("runs/", "runs/my-"))
        for images in ("imagenet/train", "photos/train", "photos/test"):
            make_images(self.folder / images)
        for name, text in (file for page in PAGES for file in files_of(page)):
            (self.folder / name).write_text(text)

    @functools.cached_property
    def cluster(self) -> Cluster:
        self._slurm.mkdir()
        return self._stack.enter_context(Cluster(self._slurm, 8))

    def follow(self, line: Line) -> None:
        """Judge a line once; the answer of the first time counts for good."""
        if line not in self._ended:
            self._ended[line] = None
            try:
                rule_of(line).check(self, line)
            except FAILURES as error:
                self._ended[line] = error
        if (error := self._ended[line]) is not None:
            raise error

    def script(self, line: Line) -> str:
        """The lines before, and the line with what its rule replaces and adds."""
        rule, command = rule_of(line), line.command
        values = {"folder": self.folder, "vae": self._vae, "port": runs.free_port()}
        for pattern, text in rule.replace.items():
            command = re.sub(pattern, text.format(**values), command)
        return "\n".join([*line.before, f"{command} {rule.add.format(**values)}".strip()])

    @contextlib.contextmanager
    def started(self, script: str) -> Iterator[subprocess.Popen[str]]:
        """A script's process, which leaves none behind."""
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=self.folder, env=self.environment(), start_new_session=True, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            yield process
        finally:
            runs.kill(process)

    def run(self, line: Line) -> subprocess.CompletedProcess[str]:
        script = self.script(line)
        with self.started(script) as process:
            out, error = process.communicate(timeout=SECONDS)
        return subprocess.CompletedProcess(script, process.returncode, out, error)

    def environment(self) -> dict[str, str]:
        """Of a user: nothing is set of what launchers, stores and our scripts read, but where the bucket is."""
        own = {name: value for name, value in runs.environment().items() if not name.startswith(SETTINGS)}
        return own | self._server.environment | {"DIFFUSSM_PYTHON": sys.executable}


def make_images(folder: Path) -> None:
    """A folder a class, each with as many images as the smallest batch and the scores take."""
    random = np.random.default_rng(len(folder.name))
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, make_autoencoder: Callable[..., Path]) -> Iterator[Checkout]:
    with Seaweed(tmp_path_factory.mktemp("seaweed")) as server, contextlib.ExitStack() as stack:
        keys = {name: server.environment[name.upper()] for name in ("aws_access_key_id", "aws_secret_access_key")}
        client = boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="bucket")
        yield Checkout(tmp_path_factory.mktemp("pages"), server, make_autoencoder(), stack)


# What the pages have


def blocks(markdown_text: str) -> list[tuple[str, str]]:
    """(language, text) of each block of code; an indented one has none."""
    shown = markdown.markdown(markdown_text, extensions=["fenced_code", "tables"])
    block = re.compile(r'<pre><code(?: class="language-(\w+)")?>(.*?)</code></pre>', re.DOTALL)
    found, rest = block.findall(shown), block.sub("", shown)
    assert "<pre" not in rest and "```" not in rest, "a block of code that would go unread"
    return [(language, html.unescape(text)) for language, text in found]


def lines_in(page: str, markdown_text: str) -> list[Line]:
    """The commands of a page, each with the lines before it that a shell keeps in mind."""
    found, before = [], ()
    for language, text in blocks(markdown_text):
        if language in ("", "sh", "bash", "shell", "console") and not TREE.match(text.partition("\n")[0]):
            for command in text.replace("\\\n", " ").splitlines():
                if command.strip() and not command.lstrip().startswith("#"):
                    found.append(Line(page, command.strip(), before))
                    if re.match(r"export |\. ", command):
                        before = (*before, found[-1].command)
    return found


def lines_of(page: str) -> list[Line]:
    return lines_in(page, (runs.ROOT / page).read_text())


def files_of(page: str) -> list[tuple[str, str]]:
    """(path, text) of the configurations that a page shows: they name themselves in their first line."""
    found = blocks((runs.ROOT / page).read_text())
    named = [(re.match(r"# (\S+\.yaml)\n", text), text) for language, text in found if language == "yaml"]
    return [(name.group(1), text) for name, text in named if name]


def demo_lines() -> list[Line]:
    """The commands of the demo's script."""
    text = (runs.ROOT / DEMO).read_text().replace("\\\n", " ")
    (run,) = re.findall(r"^run=(\S+)$", text, re.MULTILINE)
    commands = re.findall(r"^ *((?:\w+=\S+ +)*(?:deepspeed|python tools/).*)$", text, re.MULTILINE)
    return [Line(DEMO, re.sub(" +", " ", c).replace('"$run"', run).replace('"$run/', f'"{run}/')) for c in commands]


LINES = [line for page in PAGES for line in lines_of(page)]


# The tests


@pytest.mark.e2e
@pytest.mark.parametrize("number", range(len(LINES)), ids=[f"{Path(n.page).stem}: {n.command}"[:70] for n in LINES])
def test_a_line_does_what_it_says(checkout: Checkout, number: int) -> None:
    for line in LINES[:number]:  # which this one may build on
        with contextlib.suppress(*FAILURES):
            checkout.follow(line)
    checkout.follow(LINES[number])


@pytest.mark.e2e
@pytest.mark.parametrize(
    "command",
    [
        "curl https://example.org",
        "python tools/count_flops.py && python tools/count_flops.py",
        "make nothing",
        "export DIFFUSSM_NOTHING=1",
        "python tools/plan_run.py xl512 --gpu 3",
        "python tools/sample.py runs/nothing",
        "python -m benchmarks.ssm --slow",
        "sbatch --nodes=9 launch/slurm_xl512.sh",
    ],
)
def test_a_line_that_is_wrong_fails(checkout: Checkout, command: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        checkout.follow(Line("a page", command))


@pytest.mark.unit
def test_lines_are_found_wherever_they_stand() -> None:
    assert [line.command for line in lines_of("docs/quickstart.md")[:2]] == ["make demo", ". .venv/bin/activate"]
    page = "1. a list:\n\n        first  # said\n\n```sh\nsecond \\\n  --more\n```\n\n"
    page += "    folder/\n      file\n\n```yaml\nkey: 1\n```\n"
    assert [line.command for line in lines_in("a page", page)] == ["first", "second    --more"]


@pytest.mark.nightly
def test_the_whole_demo_learns(checkout: Checkout, tmp_path: Path) -> None:
    """As `make demo` runs it: some 17 minutes on 2 cores."""
    for path in checkout.folder.iterdir():
        if path.name not in ("data", "runs"):
            (tmp_path / path.name).symlink_to(path.resolve())
    environment = {name: value for name, value in runs.environment().items() if name != "OMP_NUM_THREADS"}
    with open(tmp_path / "demo.log", "w") as log:
        done = subprocess.run(["bash", DEMO], cwd=tmp_path, env=environment, stdout=log, stderr=log, timeout=3600)
    assert done.returncode == 0, (tmp_path / "demo.log").read_text()
    rows = {row["name"]: row for row in json.loads((tmp_path / "runs/fashion32/scores.json").read_text())["rows"]}
    fid = "FID (efficientnet-lite0)"
    assert rows["real train (floor)"][fid] < rows["trained"][fid] < 0.5 * rows["untrained"][fid]
