from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
import pytest
from botocore.stub import Stubber
from s3.conftest import BUCKET

from benchmarks.seaweed import SECRET_KEY, Seaweed
from diffussm.data import s3_requests, s3_transfer
from diffussm.data.s3 import S3Store
from diffussm.data.store import Stat, open_store
from diffussm.errors import UserError

pytestmark = pytest.mark.s3


def test_put_and_read(store: S3Store) -> None:
    assert store.list() == {} and not store.exists("a")
    put = store.put("a", b"0123456789")
    store.put("b/c", b"")
    assert put.size == 10 and put.etag
    assert store.exists("a") and store.stat("a") == put
    assert store.read("a") == b"0123456789"
    assert store.read("a", 3, 4) == b"3456" and store.read("a", 3, 0) == b""
    assert store.read("a", 7) == store.read("a", 7, 100) == b"789"
    assert store.read("a", 20) == store.read("a", 20, 5) == store.read("b/c") == b""
    assert store.list() == {"a": put, "b/c": store.stat("b/c")} and list(store.list("b")) == ["b/c"]
    store.delete("a")
    store.delete("a")
    assert not store.exists("a") and list(store.list()) == ["b/c"]


def test_put_replaces_and_versions_do_not_mix(store: S3Store, tmp_path: Path) -> None:
    old = store.put("a", b"old")
    assert store.read("a", etag=old.etag) == b"old"
    (tmp_path / "source").write_bytes(b"newer")
    new = store.put("a", tmp_path / "source")
    assert store.read("a") == store.read("a", etag=new.etag) == b"newer" and new.size == 5
    for part in ({}, {"start": 1, "length": 1}):
        with pytest.raises(UserError, match="/a has changed since it was first looked at"):
            store.read("a", etag=old.etag, **part)


def test_missing_objects(store: S3Store) -> None:
    for call in (store.read, store.stat, lambda name: store.read(name, 5, 0)):
        with pytest.raises(FileNotFoundError) as failure:
            call("a")
        assert failure.value.filename == f"{store}/a"
    store.put("a", b"now")
    assert store.read("a") == b"now"


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "..", "", "."])
def test_names_stay_inside(store: S3Store, name: str) -> None:
    for call in (store.read, store.stat, store.exists, store.delete, lambda name: store.put(name, b"")):
        with pytest.raises(UserError, match="not a name inside"):
            call(name)


@pytest.mark.parametrize("name", ["a b", "ü/é+%20&=?#", "x.tar"])
def test_names_of_all_letters(store: S3Store, name: str) -> None:
    put = store.put(name, b"1")
    assert store.read(name) == b"1" and store.list() == {name: put}


def test_urls(prefix: str) -> None:
    for url in (f"s3://{BUCKET}/{prefix}", f"s3://{BUCKET}/{prefix}/"):
        assert str(open_store(url)) == f"s3://{BUCKET}/{prefix}"
    assert str(open_store(f"s3://{BUCKET}")) == str(open_store(f"s3://{BUCKET}/")) == f"s3://{BUCKET}"
    root = open_store(f"s3://{BUCKET}")
    root.put(f"{prefix}-root", b"1")
    assert list(root.list(f"{prefix}-root")) == [f"{prefix}-root"]
    with pytest.raises(UserError, match="needs a bucket"):
        open_store("s3:///prefix")


def test_a_prefix_is_a_folder(prefix: str) -> None:
    S3Store(BUCKET, f"{prefix}/a/bc").put("x", b"")
    store = S3Store(BUCKET, f"{prefix}/a/b")
    assert store.list() == {}
    store.put("y", b"")
    assert list(store.list()) == ["y"]


def test_lists_more_than_a_page(store: S3Store) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: store.put(f"{i:04d}", b""), range(1010)))
    assert list(store.list()) == [f"{i:04d}" for i in range(1010)]
    assert len(store.list("01")) == 100


def test_one_of_many_writers_wins(store: S3Store) -> None:
    begin = threading.Barrier(8)

    def put(number: int) -> bool:
        begin.wait()
        try:
            store.put("a", b"%d" % number, if_absent=True)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(put, range(8)))
    assert won.count(True) == 1 and store.read("a") == b"%d" % won.index(True)


def test_swap(store: S3Store) -> None:
    with pytest.raises(FileExistsError, match="a/latest"):
        store.swap("a/latest", b"", b"1")
    store.swap("a/latest", None, b"1")
    for old in (None, b"", b"0"):
        with pytest.raises(FileExistsError, match="Somebody else has written it"):
            store.swap("a/latest", old, b"2")
    assert store.read("a/latest") == b"1"
    store.swap("a/latest", b"1", b"")
    store.swap("a/latest", b"", b"2")
    assert store.read("a/latest") == b"2" and list(store.list()) == ["a/latest"]


@pytest.mark.parametrize("old", [None, b"old"])
def test_one_of_many_that_swap_wins(prefix: str, old: bytes | None) -> None:
    if old is not None:
        S3Store(BUCKET, prefix).put("latest", old)
    begin = threading.Barrier(16)

    def swap(number: int) -> bool:
        store = S3Store(BUCKET, prefix)  # a client of its own, as another machine has
        begin.wait()
        try:
            store.swap("latest", old, b"%d" % number)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(16) as threads:
        won = list(threads.map(swap, range(16)))
    assert won.count(True) == 1 and S3Store(BUCKET, prefix).read("latest") == b"%d" % won.index(True)


def test_no_swap_is_lost(store: S3Store) -> None:
    store.put("count", b"0")

    def count(_: int) -> None:
        done = 0
        while done < 5:
            old = bytes(store.read("count"))
            try:
                store.swap("count", old, b"%d" % (int(old) + 1))
            except FileExistsError:
                continue
            done += 1

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(count, range(4)))
    assert store.read("count") == b"20"


def test_delete_all(store: S3Store) -> None:
    for name in ("c/1/manifest.json", "c/1/a", "c/1/b/c", "c/10/a", "c/2"):
        store.put(name, b"")
    store.delete_all("c/1/", first="c/1/manifest.json")
    store.delete_all("c/1/", first="c/1/manifest.json")
    assert list(store.list()) == ["c/10/a", "c/2"]
    for prefix, first in (("", None), ("/", None), ("c", None), ("c/1/../../", None), ("c/1/", "c/2")):
        with pytest.raises(UserError):
            store.delete_all(prefix, first)
    assert list(store.list()) == ["c/10/a", "c/2"]
    store.delete_all("c/")
    assert store.list() == {}


def unfinished(prefix: str) -> list[str]:
    """The keys of the uploads below it that nobody has completed."""
    uploads = boto3.client("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    return sorted(upload["Key"] for upload in uploads if upload["Key"].startswith(prefix))


def test_sweep_ends_unfinished_uploads(prefix: str) -> None:
    client = boto3.client("s3")
    for key in (f"{prefix}/a/b", f"{prefix}/a/b", f"{prefix}/a/c/d", f"{prefix}/ab"):
        client.create_multipart_upload(Bucket=BUCKET, Key=key)
    store = S3Store(BUCKET, f"{prefix}/a")
    store.put("x", b"1")
    store.sweep()
    store.sweep()
    assert unfinished(prefix) == [f"{prefix}/ab"] and list(store.list()) == ["x"]


def test_sweep_turns_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    client = s3_requests.make_client()
    monkeypatch.setattr(s3_requests, "make_client", lambda: client)
    query, markers = {"Bucket": BUCKET, "Prefix": "p/"}, {"KeyMarker": "p/a", "UploadIdMarker": "1"}
    with Stubber(client) as answers:
        page = {"IsTruncated": True, "NextKeyMarker": "p/a", "NextUploadIdMarker": "1"}
        answers.add_response("list_multipart_uploads", page | {"Uploads": [{"Key": "p/a", "UploadId": "1"}]}, query)
        answers.add_response("abort_multipart_upload", {}, {"Bucket": BUCKET, "Key": "p/a", "UploadId": "1"})
        answers.add_response("list_multipart_uploads", {"IsTruncated": False}, query | markers)
        S3Store(BUCKET, "p").sweep()
        answers.assert_no_pending_responses()


@pytest.mark.parametrize("if_absent", [False, True])
def test_large_objects_go_in_parts(
    store: S3Store, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, if_absent: bool
) -> None:
    monkeypatch.setattr(s3_transfer, "PARTS_FROM", 5 << 20)
    monkeypatch.setattr(s3_transfer, "PART_BYTES", 5 << 20)
    content = np.random.default_rng(0).bytes((11 << 20) + 7)
    (tmp_path / "source").write_bytes(content)
    for source in (content, bytearray(content), tmp_path / "source"):
        stat = store.put("a", source, if_absent)
        assert stat == store.stat("a") == store.list()["a"] and stat.size == len(content) and stat.etag.endswith("-3")
        assert store.read("a", etag=stat.etag) == content
        assert store.read("a", (5 << 20) - 3, 6) == content[(5 << 20) - 3 :][:6]
        if if_absent:
            with pytest.raises(FileExistsError):
                store.put("a", source, if_absent=True)
            store.delete("a")
    assert not unfinished(prefix)


def test_forked_processes_share_one_store(store: S3Store) -> None:
    content = np.arange(4096, dtype="<u4").tobytes()
    store.put("a", content)
    with ThreadPoolExecutor(2) as threads:  # connections are open when the process forks
        list(threads.map(lambda _: store.read("a", 0, 1), range(2)))
    children = []
    for seed in range(3):
        child = os.fork()
        if child == 0:
            starts = np.random.default_rng(seed).integers(0, 4000, 40).tolist()
            right = all(store.read("a", 4 * i, 8) == content[4 * i : 4 * i + 8] for i in starts)
            os._exit(0 if right else 1)
        children.append(child)
    assert all(store.read("a", i, 5) == content[i : i + 5] for i in range(40))
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]


def test_a_killed_server_is_waited_for(store: S3Store, server: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_requests, "LONGEST_PAUSE", 0.5)
    content = np.random.default_rng(0).bytes(3 << 20)
    store.put("a", content)
    stop, counts = threading.Event(), []

    def read_on() -> int:
        count = 0
        while not stop.is_set():
            assert store.read("a", 1000, 2 << 20) == content[1000 : 1000 + (2 << 20)]
            count += 1
        return count

    with ThreadPoolExecutor(4) as threads:
        counts = [threads.submit(read_on) for _ in range(4)]
        time.sleep(0.3)
        server.kill()
        server.start()
        time.sleep(1)
        stop.set()
        assert all(count.result() > 1 for count in counts)
    assert store.list() == {"a": Stat(3 << 20, store.stat("a").etag)}


def all_calls(store: S3Store) -> list[Callable[[], object]]:
    return [
        lambda: store.read("a"),
        lambda: store.stat("a"),
        lambda: store.exists("a"),
        lambda: store.put("a", b""),
        lambda: store.swap("a", b"", b""),
        lambda: store.delete("a"),
        lambda: store.delete_all("a/"),
        lambda: store.list(),
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "the secret key does not belong to the access key: look at AWS_SECRET"),
        ({"AWS_ACCESS_KEY_ID": "UNKNOWN"}, "the server does not know the access key: look at AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": None}, "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PRO"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "the credentials are incomplete: set AWS_SECRET_ACCESS_KEY"),
        ({"AWS_PROFILE": "nobody"}, "there is no profile 'nobody' in ~/.aws: look at AWS_PROFILE"),
        ({"AWS_ENDPOINT_URL": "localhost"}, "the S3 endpoint is not a URL"),
        ({"AWS_ENDPOINT_URL": "http://nowhere.invalid:9"}, "there is no host nowhere.invalid:9: look at AWS_ENDPOINT"),
    ],
)
def test_wrong_settings_are_told_at_once(
    store: S3Store, changes: dict[str, str | None], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    for call in all_calls(store):
        begin = time.monotonic()
        with pytest.raises(UserError, match=re.escape(line)) as failure:
            call()
        assert time.monotonic() - begin < 1
        assert SECRET_KEY not in str(failure.value) and "\n" not in str(failure.value)


def test_https_to_a_server_without_it(store: S3Store, server: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint.replace("http:", "https:"))
    with pytest.raises(UserError, match=r"no encrypted connection to 127\.0\.0\.1:\d+: look at AWS_ENDPOINT_URL"):
        store.read("a")


@pytest.mark.parametrize("bucket", ["no-such-bucket", "NO_BUCKET!"])
def test_buckets_that_are_not_there(bucket: str) -> None:
    store = S3Store(bucket, "x")
    for call in (store.read, store.stat, store.exists, store.list):
        with pytest.raises(UserError, match=f"^s3://{bucket}/x.*: (there is no such bucket|this cannot be the name)"):
            call("a")


@pytest.mark.parametrize("text", ["0", "-3", "soon", "nan", "inf", ""])
def test_the_deadline_is_checked(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(s3_requests.DEADLINE_NAME, text)
    with pytest.raises(UserError, match=f"DIFFUSSM_S3_DEADLINE is '{text}': it must be a positive number of seconds"):
        open_store("s3://bucket/x")


@pytest.mark.parametrize("how", ["AWS_REGION", "AWS_DEFAULT_REGION", "profile", "nothing"])
def test_the_region(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_REGION")
    if how == "profile":
        Path(os.environ["AWS_CONFIG_FILE"]).write_text("[profile far]\nregion = eu-north-1\n")
        monkeypatch.setenv("AWS_PROFILE", "far")
    elif how != "nothing":
        monkeypatch.setenv(how, "eu-north-1")
    assert s3_requests.make_client().meta.region_name == ("us-east-1" if how == "nothing" else "eu-north-1")
