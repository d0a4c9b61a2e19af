"""An HTTP proxy between a client and an S3 server that spoils answers as a test tells it to."""

from __future__ import annotations

import dataclasses
import http.client
import math
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

DRIP_SECONDS = 0.02


@dataclass
class Answer:
    """What the server has answered to a request, on its way to the client."""

    proxy: FaultProxy
    handler: BaseHTTPRequestHandler
    status: int
    headers: dict[str, str]
    body: bytes

    def head(self) -> bytes:
        first = f"HTTP/1.1 {self.status} {http.client.responses[self.status]}"
        lines = [first, *(f"{name}: {value}" for name, value in self.headers.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1")

    def send(self, body: bytes | None = None) -> None:
        """The head as it is, and of the body as much as is given; by default all."""
        self.handler.wfile.write(self.head())
        self.more(self.body if body is None else body)

    def more(self, body: bytes) -> None:
        if self.handler.command != "HEAD":
            self.proxy.bytes_sent += len(body)
            self.handler.wfile.write(body)

    def hang_up(self) -> None:
        self.handler.close_connection = True


Fault = Callable[[Answer], None]


def reset(at: int) -> Fault:
    """The connection is reset when ``at`` bytes of the body have been sent."""

    def spoil(answer: Answer) -> None:
        answer.send(answer.body[:at])
        answer.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        answer.handler.connection.close()
        answer.hang_up()

    return spoil


def early_close(at: int) -> Fault:
    def spoil(answer: Answer) -> None:
        answer.send(answer.body[:at])
        answer.hang_up()

    return spoil


def cut_head(at: int) -> Fault:
    """The connection is closed when ``at`` bytes of the head have been sent."""

    def spoil(answer: Answer) -> None:
        answer.handler.wfile.write(answer.head()[:at])
        answer.hang_up()

    return spoil


def shorten(at: int, total: bool = False, multiple: int = 1) -> Fault:
    """Fewer bytes, and a head that fits them; with ``total`` as if the whole object ended there.

    Args:
        multiple: of so many bytes is where the object is cut.
    """

    def spoil(answer: Answer) -> None:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers["Content-Range"])
        first, size = map(int, match.groups())
        end = (first + at) // multiple * multiple
        answer.body = answer.body[: end - first]
        answer.headers["Content-Length"] = str(len(answer.body))
        answer.headers["Content-Range"] = f"bytes {first}-{end - 1}/{end if total else size}"
        answer.send()

    return spoil


def flip(at: int) -> Fault:
    """A bit of the body is another one."""

    def spoil(answer: Answer) -> None:
        body = bytearray(answer.body)
        body[min(at, len(body) - 1)] ^= 1
        answer.send(bytes(body))

    return spoil


def refuse(status: int, code: str, access_key: str = "") -> Fault:
    """An error of S3 in place of the answer; with ``access_key`` only to requests that are signed with it."""

    def spoil(answer: Answer) -> None:
        if access_key in answer.handler.headers["Authorization"]:
            text = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
            headers = {"Content-Type": "application/xml", "Content-Length": str(len(text))}
            answer = dataclasses.replace(answer, status=status, headers=headers, body=text)
        answer.send()

    return spoil


def stall(at: int) -> Fault:
    """After ``at`` bytes of the body nothing more, on a connection that stays open."""

    def spoil(answer: Answer) -> None:
        answer.send(answer.body[:at])
        answer.proxy.closing.wait()
        answer.hang_up()

    return spoil


def drip(bytes_per_second: float) -> Fault:
    def spoil(answer: Answer) -> None:
        size = max(1, round(bytes_per_second * DRIP_SECONDS))
        answer.send(b"")
        for start in range(0, len(answer.body), size):
            answer.more(answer.body[start : start + size])
            if answer.proxy.closing.wait(size / bytes_per_second):
                break
        answer.hang_up()

    return spoil


def lose(answer: Answer) -> None:
    """The server has done what it was asked to, and nobody hears of it."""
    answer.hang_up()


@dataclass
class Rule:
    fault: Fault
    times: float
    method: str
    part: str


@dataclass
class FaultProxy:
    """Passes requests on to ``upstream``, in a ``with`` block.

    Attributes:
        endpoint: the proxy's URL.
        requests: "METHOD path" of each that has come.
        bytes_sent: of answers' bodies.
        rules: what is spoiled, in turn, and how often yet.
    """

    upstream: str
    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    bytes_sent: int = 0
    closing: threading.Event = field(default_factory=threading.Event)
    rules: list[Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def inject(self, fault: Fault, times: float = math.inf, method: str = "GET", part: str = "") -> None:
        """Spoil the next answers to requests whose path has ``part`` in it."""
        self.rules.append(Rule(fault, times, method, part))

    def __enter__(self) -> FaultProxy:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _pick(self, method: str, path: str) -> Fault:
        with self._lock:
            self.requests.append(f"{method} {path}")
            for rule in self.rules:
                if rule.times > 0 and rule.method == method and rule.part in path:
                    rule.times -= 1
                    return rule.fault
        return Answer.send

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy, upstream = self, urlsplit(self.upstream)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 20

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                connection = http.client.HTTPConnection(upstream.hostname, upstream.port, timeout=20)
                try:
                    connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        if name.lower() != "expect":
                            connection.putheader(name, value)
                    connection.endheaders(body or None)
                    response = connection.getresponse()
                    content = response.read()
                finally:
                    connection.close()
                hidden = ("connection", "transfer-encoding", "content-length")
                headers = {name: value for name, value in response.getheaders() if name.lower() not in hidden}
                headers["Content-Length"] = response.getheader("Content-Length") or str(len(content))
                proxy._pick(self.command, self.path)(Answer(proxy, self, response.status, headers, content))

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:  # the client, or a killed server, has hung up
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        return Handler
