"""Data sets in S3, or in what speaks its language: s3://bucket/prefix. docs/s3.md has the settings and the faults."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from botocore.client import BaseClient

from diffussm.data.s3_errors import Changed, Refused
from diffussm.data.s3_requests import Patience, Requests
from diffussm.data.s3_transfer import IF_ABSENT, Answer, Download, Upload, etag_of, head
from diffussm.data.store import Stat, checked_folder, checked_name, not_swapped
from diffussm.errors import UserError

DELETE_THREADS = 16


class S3Store:
    """The objects of a bucket whose keys begin with ``prefix/``.

    Credentials, region and endpoint come from the usual AWS settings, for each process anew, and again when the
    credentials have expired. Trouble that may pass is waited out for DIFFUSSM_S3_DEADLINE seconds (120) without a byte;
    once a read's first byte is there, for no longer than that and a second for every 100 kB in all.

    Raises:
        UserError: the URL has no bucket, or the deadline is not a positive number.
    """

    def __init__(self, bucket: str, prefix: str = "") -> None:
        if not bucket:
            raise UserError("an s3:// URL needs a bucket: s3://bucket/prefix")
        self._bucket = bucket
        self._root = f"{prefix.strip('/')}/".lstrip("/")
        self._requests = Requests()

    def __str__(self) -> str:
        return f"s3://{self._bucket}/{self._root}".rstrip("/")

    def read(self, name: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytearray:
        place, patience = self._find(name)
        if length == 0:
            self._requests.send(patience, lambda client: head(client, place))
            return bytearray()
        return self._requests.send(patience, Download(place, start, length, etag, patience).go_on)

    def stat(self, name: str) -> Stat:
        place, patience = self._find(name)
        answer = self._requests.send(patience, lambda client: head(client, place))
        return Stat(answer["ContentLength"], etag_of(answer))

    def put(self, name: str, content: bytes | bytearray | Path, if_absent: bool = False) -> Stat:
        place, patience = self._find(name)
        return Upload(self._requests, place, patience.url, content, IF_ABSENT if if_absent else {}).run()

    def swap(self, name: str, old: bytes | None, new: bytes) -> None:
        place, patience = self._find(name)
        try:
            content, condition = self._look(name)
            if content != old:
                raise not_swapped(patience.url)
            Upload(self._requests, place, patience.url, new, condition).run()
        except (FileExistsError, FileNotFoundError, Changed) as error:
            raise not_swapped(patience.url) from error

    def delete(self, name: str) -> None:
        place, patience = self._find(name)
        with suppress(FileNotFoundError):
            self._requests.send(patience, lambda client: client.delete_object(**place))

    def delete_all(self, prefix: str, first: str | None = None) -> None:
        folder = checked_folder(self, prefix, first)
        if first is not None:
            self.delete(first)
        with ThreadPoolExecutor(DELETE_THREADS) as threads:
            list(threads.map(self.delete, self.list(f"{folder}/")))

    def sweep(self) -> None:
        query = {"Bucket": self._bucket, "Prefix": self._root}
        with suppress(Refused):  # it takes a permission of its own; a rule of the bucket's may do it as well
            while True:
                page = self._ask(lambda client: client.list_multipart_uploads(**query))
                for upload in page.get("Uploads", []):
                    self._abort({"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]})
                if not page["IsTruncated"]:
                    return
                query["KeyMarker"], query["UploadIdMarker"] = page["NextKeyMarker"], page["NextUploadIdMarker"]

    def exists(self, name: str) -> bool:
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> dict[str, Stat]:
        query = {"Bucket": self._bucket, "Prefix": self._root + prefix}
        found: dict[str, Stat] = {}
        while True:
            page = self._ask(lambda client: client.list_objects_v2(**query))
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):  # consoles keep folders as such objects
                    found[entry["Key"].removeprefix(self._root)] = Stat(entry["Size"], etag_of(entry))
            if not page["IsTruncated"]:
                return dict(sorted(found.items()))
            query["ContinuationToken"] = page["NextContinuationToken"]

    def _look(self, name: str) -> tuple[bytearray | None, dict[str, str]]:
        """A small object's content, None where there is none, and the condition that it is still the same version."""
        try:
            etag = self.stat(name).etag
            return self.read(name, etag=etag), {"IfMatch": f'"{etag}"'}
        except FileNotFoundError:
            return None, IF_ABSENT

    def _abort(self, upload: dict[str, str]) -> None:
        with suppress(Refused):  # it has ended meanwhile
            self._ask(lambda client: client.abort_multipart_upload(**upload))

    def _ask(self, request: Callable[[BaseClient], Answer]) -> Answer:
        """The answer to a request about the store itself."""
        return self._requests.send(Patience(str(self), self._requests.seconds), request)

    def _find(self, name: str) -> tuple[dict[str, str], Patience]:
        """Where an object is, as requests say it; and the patience for one request."""
        key = f"{self._root}{checked_name(self, name)}"
        return {"Bucket": self._bucket, "Key": key}, Patience(f"s3://{self._bucket}/{key}", self._requests.seconds)
