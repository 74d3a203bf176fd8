"""The server that a hub sends readers of weights to, on loopback: signed links that expire, ranges, short bodies."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Sent:
    """A request for bytes [start, stop) of a file of `size`; `token` is what it was signed with."""

    file: str
    start: int
    stop: int
    size: int
    token: str | None = None

    @classmethod
    def of(cls, file: str, wanted: str, size: int, token: str | None = None) -> Sent:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        assert match is not None, wanted
        assert int(match[1]) <= int(match[2]) < size
        return cls(file, int(match[1]), int(match[2]) + 1, size, token)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def answer(self, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        place = {"Content-Range": f"bytes {self.start}-{self.stop - 1}/{self.size}"}
        return 206, headers | place, body[self.start : self.stop]


def _nothing(sent: Sent) -> int | None:
    return None


@dataclass
class _Link:
    file: str
    body: bytes
    left: float


class Cdn:
    """`with Cdn() as cdn:` then `hub.cdn = cdn`. A link is good for `uses` requests.

    `fault` may return a status to answer with. `short` answers end early. `answer_with` adds headers, or replaces them.
    """

    def __init__(self) -> None:
        self.uses = float("inf")
        self.short = 0
        self.fault: Callable[[Sent], int | None] = _nothing
        self.answer_with: dict[str, str] = {}
        self.answers_ranges = True
        self.sent: list[Sent] = []
        self.whole: list[str] = []
        self.refused = 0
        self._links: dict[str, _Link] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Cdn:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def links(self) -> int:
        """Links that were made."""
        return len(self._links)

    def link(self, file: str, body: bytes) -> str:
        """A new signed link."""
        with self._lock:
            name = f"/{len(self._links)}/{file}"
            self._links[name] = _Link(file, body, self.uses)
        return f"http://127.0.0.1:{self._server.server_port}{name}?X-Signature=secret"

    def expire(self) -> None:
        """No link is good any more."""
        with self._lock:
            for found in self._links.values():
                found.left = 0

    def take(self, path: str) -> _Link | None:
        """Use a link."""
        with self._lock:
            found = self._links[path]
            found.left -= 1
            if found.left < 0:
                self.refused += 1
                return None
            return found

    def cut(self) -> bool:
        """Whether this answer ends early."""
        with self._lock:
            self.short -= 1
            return self.short >= 0


@dataclass
class _Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        # Whoever is sent more than was asked for hangs up.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _handler(cdn: Cdn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            link = cdn.take(urlsplit(self.path).path)
            answer = _Answer(403) if link is None else self.found(link)
            self.send_response(answer.status)
            for name, value in (answer.headers | cdn.answer_with).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if answer.status == 206 and cdn.cut():
                self.close_connection = True
                self.wfile.write(answer.body[: len(answer.body) // 2])
                return
            self.wfile.write(answer.body)

        def found(self, link: _Link) -> _Answer:
            wanted = self.headers.get("Range")
            if wanted is None or not cdn.answers_ranges:
                cdn.whole.append(link.file)
                return _Answer(200, link.body)
            sent = Sent.of(link.file, wanted, len(link.body), self.headers.get("Authorization"))
            fault = cdn.fault(sent)
            if fault is not None:
                return _Answer(fault)
            cdn.sent.append(sent)
            status, headers, body = sent.answer({}, link.body)
            return _Answer(status, body, headers)

    return Handler
