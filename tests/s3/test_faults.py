"""An epoch through a proxy that spoils what the server answers: exactly the right samples, or one line that names a
shard; never fewer, never others, and in time."""

from __future__ import annotations

import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from s3.conftest import BUCKET
from s3.fault_proxy import Fault, FaultProxy, cut_head, drip, early_close, flip, refuse, reset, shorten, stall

from benchmarks.seaweed import Seaweed
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data import s3_requests
from diffussm.data.cache import ShardCache
from diffussm.data.encode import encode
from diffussm.data.index import Index
from diffussm.data.order import SampleOrder
from diffussm.data.reader import SampleReader
from diffussm.data.s3 import S3Store
from diffussm.data.s3_requests import Patience
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import LocalStore
from diffussm.data.stream import LatentStream
from diffussm.errors import UserError

pytestmark = pytest.mark.s3

BATCH = 20
SAMPLE_BYTES = 2048  # of the tar: a cut at a multiple is at the end of a member
FAULTS: dict[str, Fault] = {
    "reset": reset(9000),
    "early close": early_close(9000),
    "cut in the head": cut_head(200),
    "shortened": shorten(9000),
    "cut at the end of a member": shorten(20_000, multiple=SAMPLE_BYTES),
    "cut with all that tells of it": shorten(20_000, total=True, multiple=SAMPLE_BYTES),
    "flipped bit": flip(5),
    "503": refuse(503, "SlowDown"),
    "expired credentials": refuse(403, "ExpiredToken"),
    "stall": stall(9000),
}
FOR_EVER: dict[str, tuple[Fault, str]] = {
    "reset": (reset(0), "no connection to|closed the connection"),
    "early close": (early_close(0), "the connection ended after"),
    "cut in the head": (cut_head(200), "closed the connection: given up at try"),
    "cut at the end of a member": (shorten(20_000, multiple=SAMPLE_BYTES), "not the range from"),
    "cut with all that tells of it": (
        shorten(20_000, total=True, multiple=SAMPLE_BYTES),
        "sample 0000.-0000.. is unreadable: the file ends",
    ),
    "flipped bit": (flip(5), "sample 0000.-0000.. is unreadable: its bytes have changed"),
    "503": (refuse(503, "SlowDown"), "the server answered 503 SlowDown: given up at try"),
    "404": (refuse(404, "NoSuchKey"), "sample 0000.-0000.. is unreadable: No such object"),
    "expired credentials": (refuse(403, "ExpiredToken"), "the credentials have expired"),
    "access denied": (refuse(403, "AccessDenied"), "access is denied"),
    "stall": (stall(0), "fell silent: given up at try"),
    "slow link": (drip(20_000), "less than 100 kB a second arrive"),
}
CACHED_LINES = {  # the cache looks at whole shards
    "cut with all that tells of it": r"\.tar is damaged: its sha256 is not",
    "flipped bit": r"\.tar is damaged: its sha256 is not",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 200 images in four shards."""
    pixels = np.random.default_rng(1).integers(0, 256, (200, 16, 16, 1), dtype=np.uint8)
    images = ArrayImages("noise/train", ["even", "odd"], pixels, np.arange(200) % 2)
    folder = tmp_path_factory.mktemp("encoded") / "train"
    encode(images, PixelCodec(16, 16, 1, size=16), LocalStore(folder), samples_per_shard=50)
    return folder


@pytest.fixture(scope="session")
def uploaded(folder: Path, server: Seaweed) -> str:
    """The prefix of the same data set in the bucket."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        store = S3Store(BUCKET, "faults")
        for path in folder.iterdir():
            store.put(path.name, path)
    return "faults"


@pytest.fixture
def store(uploaded: str, proxy: FaultProxy) -> S3Store:
    """The data set, behind the proxy."""
    return S3Store(BUCKET, uploaded)


@pytest.fixture(params=["ranges", "cache"])
def reader(store: S3Store, request: pytest.FixtureRequest, tmp_path: Path) -> SampleReader:
    cache = ShardCache(store, tmp_path / "cache", 1 << 30) if request.param == "cache" else None
    return SampleReader(store, Index.load(store), cache)


def read_epoch(reader: SampleReader, folder: Path, window: int = 256) -> Iterator[None]:
    """Yields at each step whose samples have come and are right. ``window`` steps are fetched at once, some ahead."""
    truth = SampleReader(LocalStore(folder), Index.load(LocalStore(folder)))
    order = SampleOrder(reader.index.shard_counts, BATCH, seed=0, window=window)
    assert order.steps_per_epoch == 10
    with LatentStream(reader, order, 0, slice(0, BATCH), lambda *arguments: arguments) as stream:
        for step in range(order.steps_per_epoch):
            got_step, _, moments, labels = next(stream)
            assert got_step == step
            expected_moments, expected_labels = truth.read(order.step_ids(step))
            np.testing.assert_array_equal(moments, expected_moments)
            np.testing.assert_array_equal(labels, expected_labels)
            yield


def test_where_samples_end(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert [member.offset for member in tar if member.name.endswith(".cls")] == [
                SAMPLE_BYTES * place for place in range(50)
            ]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes(reader: SampleReader, folder: Path, proxy: FaultProxy, name: str) -> None:
    proxy.inject(FAULTS[name], times=1, part=".tar")
    assert len(list(read_epoch(reader, folder))) == 10
    assert proxy.rules[-1].times == 0


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", FOR_EVER)
def test_a_fault_that_stays(reader: SampleReader, store: S3Store, folder: Path, proxy: FaultProxy, name: str) -> None:
    fault, line = FOR_EVER[name]
    if reader._cache:
        line = CACHED_LINES.get(name, line)
    proxy.inject(fault, part=".tar")
    begin = time.monotonic()
    with pytest.raises(UserError, match=line) as failure:
        list(read_epoch(reader, folder))
    assert time.monotonic() - begin < 8
    assert str(failure.value).startswith(f"{store}/shard-0000") and "\n" not in str(failure.value)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What requests have been tried again for."""
    problems: list[str] = []
    wait = Patience.wait
    monkeypatch.setattr(Patience, "wait", lambda self, problem: problems.append(problem) or wait(self, problem))
    return problems


def test_a_server_that_is_killed_in_the_middle_of_an_epoch(
    uploaded: str, server: Seaweed, folder: Path, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9; it is up again two seconds later."""
    monkeypatch.setattr(s3_requests, "LONGEST_PAUSE", 0.5)
    store = S3Store(BUCKET, uploaded)
    steps = read_epoch(SampleReader(store, Index.load(store)), folder, window=1)
    next(steps)
    server.kill()
    again = threading.Timer(2, server.start)
    again.start()
    try:
        assert len(list(steps)) == 9 and waits
    finally:
        again.join()


@pytest.mark.parametrize("cached", [False, True])
def test_a_server_that_stays_down_in_the_middle_of_an_epoch(
    cached: bool, uploaded: str, server: Seaweed, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline = 1.0
    monkeypatch.setenv(s3_requests.DEADLINE_NAME, str(deadline))
    store = S3Store(BUCKET, uploaded)
    index = Index.load(store)
    steps = read_epoch(SampleReader(store, index, ShardCache(store, tmp_path, 1 << 30) if cached else None), folder, 1)
    if not cached:  # else all shards would be there by now
        next(steps)
    server.kill()
    try:
        begin = time.monotonic()
        with pytest.raises(UserError, match="no connection to") as failure:
            list(steps)
        assert time.monotonic() - begin < deadline + 2
        assert str(failure.value).startswith(f"{store}/shard-0000") and "\n" not in str(failure.value)
    finally:
        server.start()


def test_a_shard_that_is_replaced_in_the_middle_of_an_epoch(folder: Path, prefix: str) -> None:
    """By one of the same size, whose samples read well."""
    store = S3Store(BUCKET, prefix)
    for path in folder.iterdir():
        store.put(path.name, path.read_bytes())
    steps = read_epoch(SampleReader(store, Index.load(store)), folder, window=1)
    next(steps)
    for path in folder.glob("*.tar"):
        store.put(path.name, path.read_bytes()[:-1] + b"x")  # behind the last sample
    with pytest.raises(UserError, match="has changed since") as failure:
        list(steps)
    assert str(failure.value).startswith(f"{store}/shard-0000") and "\n" not in str(failure.value)
