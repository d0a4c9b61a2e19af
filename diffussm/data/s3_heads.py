"""Heads of answers that have come to their end: what was cut in them may be a size or an etag."""

from __future__ import annotations

import http.client
from typing import Any


class WholeHead(http.client.HTTPResponse):
    """An answer of which the connection has given the whole head; Python takes a head that was cut for a whole one."""

    def begin(self) -> None:
        """Read the head.

        Raises:
            http.client.RemoteDisconnected: the connection was closed before its end.
        """
        file = self.fp
        self.fp = _WholeLines(file)  # closed by http.client where this fails
        super().begin()
        self.fp = file


class _WholeLines:
    """A file that has only lines which come to their end; all else is the file's own."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def readline(self, limit: int) -> bytes:
        line = self._file.readline(limit)
        if len(line) < limit and not line.endswith(b"\n"):
            raise http.client.RemoteDisconnected("the connection was closed in the head of an answer")
        return line
