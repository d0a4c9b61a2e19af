"""Every fault, at every request: what is right in the end, or one line that names the object; in time."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import numpy as np
import pytest
from s3.conftest import BUCKET
from s3.fault_proxy import (
    Answer,
    Fault,
    FaultProxy,
    cut_head,
    drip,
    early_close,
    flip,
    lose,
    refuse,
    reset,
    shorten,
    stall,
)

from benchmarks.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed
from diffussm.data import s3_requests, s3_transfer
from diffussm.data.s3 import S3Store
from diffussm.errors import UserError

pytestmark = pytest.mark.s3

CONTENT = np.random.default_rng(0).bytes(300_000)
RANGES = [(0, None), (1000, 250_000), (299_000, 5000)]
PASSING: dict[str, tuple[Fault, str]] = {  # and what is said of it if it stays
    "reset": (reset(700), r"no connection to \S+: Connection reset by peer|\S+ closed the connection"),
    "reset at once": (reset(0), r"no connection to \S+: Connection reset by peer|\S+ closed the connection"),
    "early close": (early_close(600), r"the connection ended after \d+ of \d+ bytes"),
    "shortened": (shorten(512), r"512 bytes came as 'bytes \d+-\d+/300000', not the range from \d+ that was asked"),
    "503": (refuse(503, "SlowDown"), "the server answered 503 SlowDown"),
    "500": (refuse(500, "InternalError"), "the server answered 500 InternalError"),
    "429": (refuse(429, "TooManyRequests"), "the server answered 429 TooManyRequests"),
    "RequestTimeout": (refuse(400, "RequestTimeout"), "the server answered 400 RequestTimeout"),
    "stall": (stall(500), r"127\.0\.0\.1:\d+ fell silent"),
    "expired": (refuse(403, "ExpiredToken"), r"the credentials have expired \(ExpiredToken\): renew them"),
    "cut in the head": (cut_head(150), r"127\.0\.0\.1:\d+ closed the connection"),
    "no answer": (lose, r"127\.0\.0\.1:\d+ closed the connection|Connection reset by peer"),
}
STAYING = {"reset": reset(0), "early close": early_close(0), "stall": stall(0)}  # not a byte of progress


@pytest.fixture
def store(proxy: FaultProxy, prefix: str) -> S3Store:
    """Behind the proxy."""
    return S3Store(BUCKET, prefix)


def one_line(failure: pytest.ExceptionInfo[UserError], url: str) -> str:
    line = str(failure.value)
    assert line.startswith(url) and "\n" not in line and SECRET_KEY not in line and ACCESS_KEY not in line
    return line


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes(store: S3Store, proxy: FaultProxy, name: str) -> None:
    etag = store.put("a", CONTENT).etag
    for start, length in RANGES:
        proxy.inject(PASSING[name][0], times=1)
        end = None if length is None else start + length
        assert store.read("a", start, length, etag) == CONTENT[start:end]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_stays(store: S3Store, proxy: FaultProxy, impatient: float, name: str) -> None:
    store.put("a", CONTENT)
    _, line = PASSING[name]
    proxy.inject(STAYING.get(name) or PASSING[name][0])
    begin = time.monotonic()
    with pytest.raises(UserError, match=line) as failure:
        store.read("a", 1000, 200_000)
    assert time.monotonic() - begin < impatient + 1
    assert re.search(r"given up at try \d+, after \d s: look at the server", one_line(failure, f"{store}/a"))


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
def test_a_head_that_is_cut_anywhere_is_no_answer(store: S3Store, proxy: FaultProxy, method: str) -> None:
    """What is left of a size or an etag would be another one."""
    calls: dict[str, Callable[[], object]] = {
        "GET": lambda: store.read("a"),
        "HEAD": lambda: store.stat("a"),
        "PUT": lambda: store.put("a", CONTENT),
    }
    store.put("a", CONTENT)
    heads: list[bytes] = []
    proxy.inject(lambda answer: (heads.append(answer.head()), answer.send()), times=1, method=method)
    expected = calls[method]()
    for at in range(0, len(heads[0]), 5):
        proxy.inject(cut_head(at), times=1, method=method)
        assert calls[method]() == expected
        assert proxy.rules[-1].times == 0


def test_an_object_that_arrives_bit_by_bit(store: S3Store, proxy: FaultProxy) -> None:
    store.put("a", CONTENT)
    before = proxy.bytes_sent
    proxy.inject(early_close(40_000))  # of each answer: it goes on where it stopped
    assert store.read("a") == CONTENT
    assert proxy.bytes_sent - before == len(CONTENT)
    assert proxy.requests[-8:] == [f"GET /{BUCKET}/{str(store).split('/')[-1]}/a"] * 8


def test_a_slow_link(store: S3Store, proxy: FaultProxy) -> None:
    store.put("a", CONTENT)
    proxy.inject(drip(400_000), times=1)
    assert store.read("a") == CONTENT


@pytest.mark.usefixtures("impatient")
def test_a_link_that_is_too_slow(store: S3Store, proxy: FaultProxy, impatient: float) -> None:
    store.put("a", CONTENT)
    proxy.inject(drip(20_000))
    begin = time.monotonic()
    with pytest.raises(UserError, match="less than 100 kB a second arrive") as failure:
        store.read("a", 0, 30_000)
    assert time.monotonic() - begin < impatient + 0.3 + 1
    one_line(failure, f"{store}/a")


def test_versions_do_not_mix(store: S3Store, proxy: FaultProxy) -> None:
    store.put("a", CONTENT)

    def replace_and_close(answer: Answer) -> None:
        store.put("a", CONTENT[::-1])
        early_close(1000)(answer)

    proxy.inject(replace_and_close, times=1)
    with pytest.raises(UserError, match="/a has changed since it was first looked at") as failure:
        store.read("a")
    one_line(failure, f"{store}/a")


def test_a_server_that_knows_no_conditions(store: S3Store, proxy: FaultProxy) -> None:
    old = store.put("a", CONTENT).etag

    def replaced(answer: Answer) -> None:
        answer.headers = {key: value for key, value in answer.headers.items() if key.lower() != "etag"}
        answer.headers["ETag"] = '"another"'
        answer.send()

    proxy.inject(replaced, times=1)
    with pytest.raises(UserError, match="/a has changed"):
        store.read("a", 5, 10, old)


def test_flipped_bytes_are_the_readers_to_find(store: S3Store, proxy: FaultProxy) -> None:
    store.put("a", CONTENT)
    proxy.inject(flip(77), times=1)
    assert sum(a != b for a, b in zip(store.read("a"), CONTENT, strict=True)) == 1
    assert store.read("a") == CONTENT


def test_missing_and_refused(store: S3Store, proxy: FaultProxy) -> None:
    store.put("a", CONTENT)
    proxy.inject(refuse(404, "NoSuchKey"), times=1)
    with pytest.raises(FileNotFoundError):
        store.read("a")
    for status, code, line in ((403, "AccessDenied", "access is denied"), (400, "Odd", "the server refuses: 400 Odd")):
        proxy.inject(refuse(status, code), times=1)
        with pytest.raises(UserError, match=line) as failure:
            store.read("a")
        one_line(failure, f"{store}/a")


@pytest.mark.parametrize("name", ["503", "no answer", "expired"])
def test_every_request_is_tried_again(store: S3Store, proxy: FaultProxy, name: str) -> None:
    fault = PASSING[name][0]
    calls: list[tuple[str, Callable[[], object]]] = [
        ("PUT", lambda: store.put("a", b"0").size == 1),
        ("HEAD", lambda: store.swap("a", b"0", b"1") is None),
        ("HEAD", lambda: store.stat("a").size == 1),
        ("HEAD", lambda: store.exists("a") and not store.exists("b")),
        ("GET", lambda: list(store.list()) == ["a"]),
        ("DELETE", lambda: store.delete("a") is None),
        ("GET", lambda: store.delete_all("a/") is None),
        ("GET", lambda: store.sweep() is None),
    ]
    for method, call in calls:
        proxy.inject(fault, times=2, method=method)
        assert call()
        assert proxy.rules[-1].times == 0
    assert store.list() == {}


@pytest.mark.parametrize("parts", [False, True])
def test_a_put_whose_answer_is_lost_is_no_failure(
    store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, parts: bool
) -> None:
    if parts:
        monkeypatch.setattr(s3_transfer, "PARTS_FROM", 1)
    proxy.inject(lose, times=1, method="POST" if parts else "PUT", part="uploadId" if parts else "")
    stat = store.put("a", CONTENT, if_absent=True)
    assert proxy.rules[-1].times == 0 and stat == store.stat("a") and store.read("a") == CONTENT
    with pytest.raises(FileExistsError):  # the same bytes, and yet another's
        store.put("a", CONTENT, if_absent=True)


LOST = {
    "no answer": lose,
    "503": refuse(503, "SlowDown"),
    "409": refuse(409, "ConditionalRequestConflict"),
}  # of what has been done


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_swap_whose_answer_is_lost_is_no_failure(
    store: S3Store, proxy: FaultProxy, old: bytes | None, name: str
) -> None:
    if old is not None:
        store.put("a", old)

    def lose_more(answer: Answer) -> None:
        proxy.inject(refuse(503, "SlowDown"), times=1, method="HEAD")  # when it looks whose the object is
        LOST[name](answer)

    proxy.inject(lose_more, times=1, method="PUT")
    store.swap("a", old, b"new")
    assert proxy.rules[-1].times == proxy.rules[-2].times == 0 and store.read("a") == b"new"
    with pytest.raises(FileExistsError):  # the same bytes, and yet another's
        store.swap("a", old, b"new")


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("what", ["replaced", "replaced by the same", "deleted"])
def test_what_happens_between_the_requests_of_a_swap(
    store: S3Store, proxy: FaultProxy, server: Seaweed, prefix: str, method: str, what: str
) -> None:
    other = boto3.client("s3", endpoint_url=server.endpoint)
    place = {"Bucket": BUCKET, "Key": f"{prefix}/a"}
    store.put("a", b"old")

    def meanwhile(answer: Answer) -> None:
        if what == "deleted":
            other.delete_object(**place)
        else:
            other.put_object(**place, Body=b"other" if what == "replaced" else b"new")
        answer.send()

    proxy.inject(meanwhile, times=1, method=method)
    with pytest.raises(FileExistsError, match=re.escape(f"{store}/a")):
        store.swap("a", b"old", b"new")
    assert proxy.rules[-1].times == 0
    if what == "deleted":
        assert not store.exists("a")
    else:
        assert store.read("a") == (b"other" if what == "replaced" else b"new")


def test_a_swap_of_what_is_not_there_any_more(store: S3Store, proxy: FaultProxy) -> None:
    store.put("a", b"old")
    proxy.inject(refuse(404, "NoSuchKey"), times=1, method="PUT")  # as AWS answers to If-Match
    with pytest.raises(FileExistsError):
        store.swap("a", b"old", b"new")


def test_sweep_needs_no_permission(store: S3Store, proxy: FaultProxy, prefix: str) -> None:
    for method, part in (("GET", "uploads"), ("DELETE", "uploadId")):
        boto3.client("s3").create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/a")
        proxy.inject(refuse(403, "AccessDenied"), times=1, method=method, part=part)
        store.sweep()
        assert proxy.rules[-1].times == 0
    store.sweep()


@pytest.mark.usefixtures("impatient")
def test_no_parts_stay_of_an_upload_that_fails(
    store: S3Store, proxy: FaultProxy, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_transfer, "PARTS_FROM", 1)
    monkeypatch.setattr(s3_transfer, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(s3_requests, "READ_TIMEOUT", 10)  # so much takes a busy machine a while
    proxy.inject(refuse(503, "SlowDown"), method="PUT", part="partNumber=2")
    with pytest.raises(UserError, match="the server answered 503 SlowDown"):
        store.put("a", bytes(11 << 20))
    assert not store.exists("a")
    uploads = boto3.client("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert not [upload for upload in uploads if upload["Key"].startswith(prefix)]


def test_credentials_that_are_renewed_in_their_file(
    store: S3Store, proxy: FaultProxy, server: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "short")
    file = Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"])

    def write(access_key: str) -> None:
        file.write_text(f"[short]\naws_access_key_id = {access_key}\naws_secret_access_key = {SECRET_KEY}\n")

    write(ACCESS_KEY)
    store.put("a", CONTENT)
    write("ANOTHER")
    proxy.inject(refuse(403, "ExpiredToken", ACCESS_KEY), times=1)  # what follows is signed as ANOTHER: unknown
    proxy.inject(lambda answer: (write(ACCESS_KEY), answer.send()), times=1)
    assert store.read("a") == CONTENT
    assert len([request for request in proxy.requests if request.startswith("GET")]) == 3


@pytest.mark.usefixtures("impatient")
def test_credentials_that_are_not_renewed(store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("a", CONTENT)
    monkeypatch.setenv("AWS_PROFILE", "gone")
    proxy.inject(refuse(403, "ExpiredToken"), times=1)
    with pytest.raises(UserError, match=r"there is no profile 'gone' in ~/\.aws: .* given up at try") as failure:
        store.read("a")
    one_line(failure, f"{store}/a")


@pytest.mark.usefixtures("impatient")
def test_trouble_is_told_now_and_then(
    store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store.put("a", CONTENT)
    monkeypatch.setattr(s3_requests, "SAY_AFTER", 0.05)
    monkeypatch.setattr(s3_requests, "SAY_EVERY", 0.2)
    monkeypatch.setattr(s3_requests, "_said", 0.0)
    proxy.inject(refuse(503, "SlowDown"))
    with pytest.raises(UserError):
        store.read("a")
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5
    for line in lines:
        told = f"{re.escape(str(store))}/a: the server answered 503 SlowDown: try \\d+ failed, trying on for [01] s"
        assert re.fullmatch(told, line)
