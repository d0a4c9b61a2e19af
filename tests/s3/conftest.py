from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from s3.fault_proxy import FaultProxy

from benchmarks.seaweed import Seaweed
from diffussm.data import s3_requests
from diffussm.data.s3 import S3Store

BUCKET = "tests"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A real server with the bucket ``tests``."""
    with Seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        keys = {name: server.environment[name.upper()] for name in ("aws_access_key_id", "aws_secret_access_key")}
        client = boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1", **keys)
        client.create_bucket(Bucket=BUCKET)
        yield server


@pytest.fixture(autouse=True)
def settings(server: Seaweed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The server's, and nothing of this machine's."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def prefix() -> str:
    """The test's own."""
    return uuid.uuid4().hex


@pytest.fixture
def store(prefix: str) -> S3Store:
    return S3Store(BUCKET, prefix)


@pytest.fixture
def proxy(server: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Stands before the server of every store that is opened from now on; they try again soon."""
    for name, value in {"CONNECT_TIMEOUT": 0.5, "READ_TIMEOUT": 0.5, "FIRST_PAUSE": 0.02, "LONGEST_PAUSE": 0.1}.items():
        monkeypatch.setattr(s3_requests, name, value)
    monkeypatch.setenv(s3_requests.DEADLINE_NAME, "20")
    with FaultProxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def impatient(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds that every store waits that is opened from now on."""
    monkeypatch.setattr(s3_requests, "READ_TIMEOUT", 0.2)
    monkeypatch.setenv(s3_requests.DEADLINE_NAME, "0.5")
    return 0.5
