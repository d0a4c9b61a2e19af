"""Objects on their way from S3 and to it: what was interrupted goes on where it stopped, and versions never mix."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from botocore.client import BaseClient
from botocore.exceptions import ClientError

from diffussm.data.s3_errors import Changed, Incomplete, code_of
from diffussm.data.s3_requests import Patience, Requests
from diffussm.data.store import Stat
from diffussm.errors import UserError

Answer = dict[str, Any]
IF_ABSENT = {"IfNoneMatch": "*"}
PIECE_BYTES = 256 << 10  # taken from a connection at once
PARTS_FROM = 64 << 20  # an object of so many bytes is sent in parts
PART_BYTES = 16 << 20
MOST_PARTS = 10_000  # S3's own limit
PART_THREADS = 4
ABORT_SECONDS = 5
TOKEN = "diffussm-put"  # metadata by which an upload knows its own object


class Download:
    """A range of one version of an object, as far as it has arrived.

    Args:
        place: bucket and key.
        length: None: to the end.
        etag: the version; None: the one that answers first.
    """

    def __init__(
        self, place: dict[str, str], start: int, length: int | None, etag: str | None, patience: Patience
    ) -> None:
        self._place = place
        self._start = start
        self._end = math.inf if length is None else start + length
        self._etag = etag
        self._patience = patience
        self._content: bytearray | None = None  # of its full size from the first answer on
        self._arrived = 0

    def go_on(self, client: BaseClient) -> bytearray:
        """Ask for what is missing, and return the whole range.

        Raises:
            Incomplete: not all of it has arrived.
            Changed: the object is another version.
            UserError: it arrives too slowly.
        """
        try:
            answer = client.get_object(**self._place, **self._conditions())
        except ClientError as error:
            if code_of(error) in ("InvalidRange", "416") and self._content is None:
                return bytearray()  # it ends before the range begins
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 412:
                raise self._changed() from error
            raise
        with answer["Body"] as body:
            self._check(answer)
            view = memoryview(self._content)
            while self._arrived < len(view):
                # One recv: a read of so many bytes would wait for them all, however slowly they drip.
                piece = body.read1(min(PIECE_BYTES, len(view) - self._arrived))
                if not piece:
                    raise Incomplete(f"the connection ended after {self._arrived} of {len(view)} bytes")
                view[self._arrived : self._arrived + len(piece)] = piece
                self._arrived += len(piece)
                self._patience.progress()
        return self._content

    def _conditions(self) -> dict[str, str]:
        # Also of a whole object: the answer then tells its size twice, and one that was cut on its way shows.
        last = "" if self._end == math.inf else self._end - 1
        asked = {"Range": f"bytes={self._start + self._arrived}-{last}"}
        return asked if self._etag is None else asked | {"IfMatch": f'"{self._etag}"'}

    def _check(self, answer: Answer) -> None:
        """That the answer is the range and the version that were asked for."""
        first = self._start + self._arrived
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
        got_first, got_last, size = map(int, match.groups()) if match else (0, -1, 0)
        end = min(self._end, size)
        if (got_first, got_last + 1, answer["ContentLength"]) != (first, end, end - first):
            raise Incomplete(
                f"{answer['ContentLength']} bytes came as {answer.get('ContentRange', 'a whole object')!r}, "
                f"not the range from {first} that was asked for"
            )
        if self._etag is not None and etag_of(answer) != self._etag:  # a server that knows no conditions
            raise self._changed()
        if self._content is None:
            self._etag, self._content = etag_of(answer), bytearray(end - first)
            self._patience.expect(end - first)

    def _changed(self) -> Changed:
        return Changed(
            f"{self._patience.url} has changed since it was first looked at: let what writes it end, then start again"
        )


class Upload:
    """An object on its way to S3, whole or, if it is large, in parts.

    Args:
        place: bucket and key.
        condition: on what is there now, as requests say it; {}: none.
    """

    def __init__(
        self,
        requests: Requests,
        place: dict[str, str],
        url: str,
        content: bytes | bytearray | Path,
        condition: dict[str, str],
    ) -> None:
        self._requests = requests
        self._place = place
        self._url = url
        self._content = content
        self._size = content.stat().st_size if isinstance(content, Path) else len(content)
        self._condition = condition
        self._token = uuid.uuid4().hex

    def run(self) -> Stat:
        """Send it.

        Raises:
            FileExistsError: the condition does not hold.
            FileNotFoundError: nor can it: there is no such object.
        """
        try:
            answer = self._put_whole() if self._size < PARTS_FROM else self._put_parts()
        except (FileExistsError, UserError) as error:  # a first try may have written it, and its answer was lost
            answer = self._find_own(0 if isinstance(error, UserError) else math.inf)
            if answer is None:
                raise
        return Stat(self._size, etag_of(answer))

    def _put_whole(self) -> Answer:
        body = self._part(0, self._size)
        return self._send(
            lambda client: client.put_object(**self._place, **self._condition, Body=body, Metadata={TOKEN: self._token})
        )

    def _put_parts(self) -> Answer:
        begun = self._send(lambda client: client.create_multipart_upload(**self._place, Metadata={TOKEN: self._token}))
        place = self._place | {"UploadId": begun["UploadId"]}
        part_bytes = max(PART_BYTES, math.ceil(self._size / MOST_PARTS))

        def put_part(number: int) -> Answer:
            body = self._part((number - 1) * part_bytes, part_bytes)
            answer = self._send(lambda client: client.upload_part(**place, PartNumber=number, Body=body))
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(PART_THREADS) as threads:
                parts = list(threads.map(put_part, range(1, math.ceil(self._size / part_bytes) + 1)))
            return self._send(
                lambda client: client.complete_multipart_upload(
                    **place, **self._condition, MultipartUpload={"Parts": parts}
                )
            )
        except BaseException:  # parts that nobody completes are stored, and paid for
            with suppress(OSError, UserError):
                self._send(lambda client: client.abort_multipart_upload(**place), ABORT_SECONDS)
            raise

    def _part(self, start: int, length: int) -> bytes | bytearray:
        if not isinstance(self._content, Path):
            return self._content[start : start + length]
        with self._content.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def _find_own(self, seconds: float) -> Answer | None:
        try:
            answer = self._send(lambda client: head(client, self._place), seconds, least_tries=1)
        except (OSError, UserError):
            return None
        return answer if answer["Metadata"].get(TOKEN) == self._token else None

    def _send(self, request: Callable[[BaseClient], Answer], seconds: float = math.inf, least_tries: int = 3) -> Answer:
        seconds = min(seconds, self._requests.seconds)
        return self._requests.send(Patience(self._url, seconds, least_tries), request)


def head(client: BaseClient, place: dict[str, str]) -> Answer:
    """An object's size, etag and metadata."""
    try:
        return client.head_object(**place)
    except ClientError as error:
        if code_of(error) not in ("400", "403", "404"):
            raise
        client.get_object(**place)["Body"].close()  # raises, and says why: an answer to HEAD has no room for that
        raise Incomplete(f"HEAD is refused ({code_of(error)}), GET is not") from error


def etag_of(answer: Answer) -> str:
    return answer["ETag"].strip('"')
