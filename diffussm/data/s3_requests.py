"""Requests to S3: a client per process, and trying again until a request is answered or its time is up."""

from __future__ import annotations

import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import boto3
import botocore.awsrequest
import botocore.loaders
import botocore.session
from botocore.client import BaseClient
from botocore.config import Config

from diffussm.data.s3_errors import REQUEST_ERRORS, Expired, Incomplete, trouble
from diffussm.data.s3_heads import WholeHead
from diffussm.errors import UserError

DEADLINE_NAME = "DIFFUSSM_S3_DEADLINE"
DEADLINE = 120.0  # seconds without a byte
SLOWEST = 100_000  # bytes a second: what is transferred at less than that has failed
CONNECT_TIMEOUT = READ_TIMEOUT = 10.0  # seconds
CONNECTIONS = 64  # kept open
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between tries, doubling
SAY_AFTER, SAY_EVERY = 10.0, 30.0  # seconds of trouble
Answer = TypeVar("Answer")

botocore.awsrequest.AWSConnection.response_class = WholeHead  # of every client; it has no setting for this
_models = botocore.loaders.create_loader()  # what a client costs is reading them: 100 ms against 15
_jitter = random.SystemRandom()  # ranks that share a seed are not to come back all at once
_said = -math.inf  # when this process last told of trouble


def deadline() -> float:
    """Seconds, by DIFFUSSM_S3_DEADLINE.

    Raises:
        UserError: it is not a positive number.
    """
    text = os.environ.get(DEADLINE_NAME, str(DEADLINE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"{DEADLINE_NAME} is {text!r}: it must be a positive number of seconds, such as {DEADLINE:g}")
    return seconds


class Patience:
    """How long a request is tried: for ``seconds`` without a byte; and from its first answer on for no longer than that
    and what a slow link takes.

    Args:
        url: of the object.
        least_tries: made even so; a try to send much may take long by itself.
    """

    def __init__(self, url: str, seconds: float, least_tries: int = 1) -> None:
        self.url = url
        self._seconds = seconds
        self._least_tries = least_tries
        self._begin = self._progress = time.monotonic()
        self._end = math.inf
        self._tries, self._in_vain = 1, 0

    def expect(self, size: int) -> None:
        """The first answer is there: ``size`` bytes are to come."""
        self._end = time.monotonic() + self._seconds + size / SLOWEST

    def progress(self) -> None:
        """Bytes have arrived.

        Raises:
            UserError: they come too slowly.
        """
        self._progress, self._in_vain = time.monotonic(), 0
        if self._progress > self._end:
            self._give_up(f"less than {SLOWEST // 1000} kB a second arrive")

    def wait(self, problem: str) -> None:
        """Pause before another try.

        Raises:
            UserError: the time is up.
        """
        now = time.monotonic()
        end = min(self._progress + self._seconds, self._end)
        if now >= end and self._tries >= self._least_tries:
            self._give_up(problem)
        if now - self._progress > SAY_AFTER:
            _say(f"{self.url}: {problem}: try {self._tries} failed, trying on for {max(0, end - now):.0f} s")
        pause = min(FIRST_PAUSE * 2**self._in_vain, LONGEST_PAUSE) * _jitter.uniform(0.5, 1)
        self._tries += 1
        self._in_vain = min(self._in_vain + 1, 30)
        time.sleep(min(pause, max(0.0, end - now)))

    def _give_up(self, problem: str) -> None:
        seconds = time.monotonic() - self._begin
        raise UserError(
            f"{self.url}: {problem}: given up at try {self._tries}, after {seconds:.0f} s: look at the server and the "
            f"network and start again, or have more patience by {DEADLINE_NAME} (seconds)"
        )


class Requests:
    """Sends requests by this process's client. Threads share it; a forked process gets its own."""

    def __init__(self) -> None:
        self._processes: dict[int, _Process] = {}
        self.seconds = deadline()

    def send(self, patience: Patience, request: Callable[[BaseClient], Answer]) -> Answer:
        """What ``request`` returns, once it does.

        Raises:
            FileNotFoundError, FileExistsError, UserError: as :func:`trouble` and :class:`Patience`.
        """
        process = self._processes.setdefault(os.getpid(), _Process())
        client = None
        while True:
            try:
                client = process.client()
                answer = request(client)
            except (*REQUEST_ERRORS, Incomplete) as error:
                try:
                    problem = trouble(error, patience.url, client, process.worked)
                except Expired as expired:
                    problem = str(expired)
                    process.forget(client)
            else:
                process.worked = True
                return answer
            patience.wait(problem)


class _Process:
    """A process's client; ``worked`` once one of its requests has been answered."""

    def __init__(self) -> None:
        self.worked = False
        self._client: BaseClient | None = None
        self._lock = threading.Lock()

    def client(self) -> BaseClient:
        with self._lock:
            if self._client is None:
                self._client = make_client()
            return self._client

    def forget(self, client: BaseClient | None) -> None:
        """Make the next client anew, by the environment and the files as they are then."""
        with self._lock:
            if self._client is client:
                self._client = None


def make_client() -> BaseClient:
    """A client by the usual AWS settings. It tries everything once.

    Raises:
        UserError: the endpoint is not a URL.
    """
    config = Config(
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        max_pool_connections=CONNECTIONS,
        retries={"total_max_attempts": 1, "mode": "standard"},
        tcp_keepalive=True,
        response_checksum_validation="when_required",  # there are none of a range; samples have their crc32
    )
    settings = botocore.session.Session()
    settings.register_component("data_loader", _models)
    session = boto3.session.Session(botocore_session=settings)
    region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
    try:
        return session.client("s3", region_name=region, config=config)
    except ValueError as error:
        raise UserError("the S3 endpoint is not a URL such as https://host:9000: look at AWS_ENDPOINT_URL") from error


def _say(line: str) -> None:
    global _said
    now = time.monotonic()
    if now - _said >= SAY_EVERY:
        _said = now
        print(line, file=sys.stderr, flush=True)
