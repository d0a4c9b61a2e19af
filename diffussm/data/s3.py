"""Data sets in S3, or in what speaks its language: s3://bucket/prefix. docs/s3.md has the settings and the faults."""

from __future__ import annotations

import re
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from botocore.client import BaseClient
from botocore.exceptions import ClientError

from diffussm.data.s3_errors import Incomplete, code_of
from diffussm.data.s3_requests import Patience, Requests
from diffussm.data.store import Stat, checked_name
from diffussm.errors import UserError

PIECE_BYTES = 256 << 10  # taken from a connection at once
PARTS_FROM = 64 << 20  # an object of so many bytes is sent in parts
PART_BYTES = 16 << 20
MOST_PARTS = 10_000  # S3's own limit
PART_THREADS = 4
TOKEN = "diffussm-put"  # metadata by which a conditional put knows its own object again


class S3Store:
    """The objects of a bucket whose keys begin with ``prefix/``.

    Credentials, region and endpoint come from the usual AWS settings, anew in each process and when they have expired.
    Trouble that may pass is waited out for DIFFUSSM_S3_DEADLINE seconds (120) without a byte, and no longer than that
    plus a second for every 100 kB of the object.

    Raises:
        UserError: there is no bucket in the URL, or the deadline is not a positive number.
    """

    def __init__(self, bucket: str, prefix: str = "") -> None:
        if not bucket:
            raise UserError("an s3:// URL needs a bucket: s3://bucket/prefix")
        self._bucket = bucket
        self._root = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._requests = Requests()

    def __str__(self) -> str:
        return f"s3://{self._bucket}/{self._root}".rstrip("/")

    def read(self, name: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytearray:
        if length == 0:
            self.stat(name)
            return bytearray()
        patience = self._patience(name)
        download = _Download(self._place(name), start, length, etag, patience)
        return self._requests.send(patience, download.go_on)

    def stat(self, name: str) -> Stat:
        return _stat(self._requests.send(self._patience(name), lambda client: _head(client, self._place(name))))

    def exists(self, name: str) -> bool:
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._requests.send(self._patience(name), lambda client: client.delete_object(**self._place(name)))

    def list(self, prefix: str = "") -> dict[str, Stat]:
        patience = Patience(str(self), self._requests.seconds)
        found: dict[str, Stat] = {}
        query = {"Bucket": self._bucket, "Prefix": self._root + prefix}
        while True:
            page = self._requests.send(patience, lambda client: client.list_objects_v2(**query))
            patience = Patience(str(self), self._requests.seconds)
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):  # consoles keep empty folders as such objects
                    found[entry["Key"][len(self._root) :]] = Stat(entry["Size"], entry["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return dict(sorted(found.items()))
            query["ContinuationToken"] = page["NextContinuationToken"]
