"""An HTTP/1.1 proxy in front of an object store, with faults that can be switched while it runs.

It forwards whole requests, unchanged, so signatures stay valid. Each connection of a client has its own thread and
its own connection to the server.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import BinaryIO

#: (method, target) → the status and S3 error code to answer with, or None to forward the request.
Intercept = Callable[[str, str], tuple[int, str] | None]
#: Bytes of a body that always arrive.
BREAKABLE = 3000


class FaultProxy:
    """`with FaultProxy("127.0.0.1", port) as proxy:` then point AWS_ENDPOINT_URL at `proxy.endpoint`.

    The faults are attributes: `latency` seconds before each request is forwarded; `slow_down`, the fraction of
    requests answered with 503 SlowDown, drawn from `seed`; `refuse` resets every connection, also those that are
    open; `black_hole` accepts and never answers; `intercept` answers chosen requests with an error; `lose` counts the
    answers to be dropped, after the server has done what it was asked; `breaking`, the fraction of bodies longer than
    `BREAKABLE` bytes that end after so many, with their connection. `cut` is one-shot. `requests`, `bytes_up`,
    `bytes_down`, `refused` (by `slow_down` or `intercept`) and `cuts` (by `cut` or `breaking`) count.
    """

    def __init__(self, host: str, port: int, *, seed: int = 0) -> None:
        self.target = (host, port)
        self.latency = 0.0
        self.slow_down = self.breaking = 0.0
        self.black_hole = False
        self.lose = 0
        self.intercept: Intercept | None = None
        self.requests = self.bytes_up = self.bytes_down = self.refused = self.cuts = 0
        self._refuse = False
        self._cut: dict[str, int] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.settimeout(0.1)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def refuse(self) -> bool:
        return self._refuse

    @refuse.setter
    def refuse(self, value: bool) -> None:
        self._refuse = value
        if value:
            with self._lock:
                for connection in self._open:
                    _reset(connection)

    def cut(self, *, up: int | None = None, down: int | None = None) -> None:
        """Cut the connection once, after so many bytes of one body on its way up or of one response on its way down.

        Shorter ones pass.
        """
        with self._lock:
            self._cut = {way: count for way, count in (("up", up), ("down", down)) if count is not None}

    def clear(self) -> None:
        """No faults."""
        self.latency = self.slow_down = self.breaking = 0.0
        self.black_hole = self.refuse = False
        self.lose = 0
        self.intercept = None
        self.cut()

    def __enter__(self) -> FaultProxy:
        self._spawn(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self.refuse = True
        while self._threads:
            self._threads.pop().join()
        self._listener.close()

    def _spawn(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            client.settimeout(None)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(client)
            with self._lock:
                self._open.add(client)
            stack.callback(self._forget, client)
            # A reset or closed connection ends the exchange, as it does for a real proxy.
            stack.enter_context(contextlib.suppress(OSError, EOFError))
            if self._refuse:
                _reset(client)
                return
            server: socket.socket | None = None
            incoming = stack.enter_context(client.makefile("rb"))
            while head := _head(incoming):
                method, target = head[0].decode().split(" ")[:2]
                while self.black_hole and not self._stopped.wait(0.02):
                    pass
                if self.latency:
                    self._stopped.wait(self.latency)
                if self._refuse:
                    return
                if answer := self._answer(method, target):
                    for _ in _body(incoming, head):
                        pass
                    client.sendall(_error(*answer))
                    continue
                if server is None:
                    server = stack.enter_context(socket.create_connection(self.target))
                    outgoing = stack.enter_context(server.makefile("rb"))
                    with self._lock:
                        self._open.add(server)
                    stack.callback(self._forget, server)
                self._exchange(method, head, incoming, server, outgoing, client)

    def _exchange(
        self,
        method: str,
        head: list[bytes],
        incoming: BinaryIO,
        server: socket.socket,
        outgoing: BinaryIO,
        client: socket.socket,
    ) -> None:
        """One request up, its response down."""
        self._send("up", head, _body(incoming, head), server)
        response = _head(outgoing)
        if not response:
            raise EOFError
        with self._lock:
            lost = self.lose > 0
            self.lose -= lost
        if lost:
            raise EOFError
        status = int(response[0].split(b" ")[1])
        bodiless = method == "HEAD" or status in (204, 304)
        self._send("down", response, iter(()) if bodiless else _body(outgoing, response), client)

    def _send(self, way: str, head: list[bytes], body: Iterator[bytes], sink: socket.socket) -> None:
        limit = self._limit(way, head)
        sink.sendall(b"".join(head))
        sent = 0
        for piece in body:
            if limit is not None and sent + len(piece) > limit:
                sink.sendall(piece[: limit - sent])
                self.cuts += 1
                raise EOFError
            sink.sendall(piece)
            sent += len(piece)
            with self._lock:
                if way == "up":
                    self.bytes_up += len(piece)
                else:
                    self.bytes_down += len(piece)

    def _limit(self, way: str, head: list[bytes]) -> int | None:
        """The bytes after which this body is cut, if it is one of those."""
        length = _length(head)
        with self._lock:
            if way in self._cut and length > self._cut[way]:
                return self._cut.pop(way)
            if self.breaking and length > BREAKABLE and self._random.random() < self.breaking:
                return BREAKABLE
        return None

    def _answer(self, method: str, target: str) -> tuple[int, str] | None:
        with self._lock:
            self.requests += 1
            answer = self.intercept(method, target) if self.intercept else None
            if answer is None and self._random.random() < self.slow_down:
                answer = (503, "SlowDown")
            self.refused += answer is not None
        return answer

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)


def _head(source: BinaryIO) -> list[bytes]:
    """The lines of a request's or response's head, the empty one included; nothing when the other side is done."""
    lines = [source.readline()]
    while lines[-1] not in (b"\r\n", b""):
        lines.append(source.readline())
    return lines if lines[-1] else []


def _header(head: list[bytes], name: bytes) -> bytes | None:
    for line in head[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip().lower()
    return None


def _length(head: list[bytes]) -> int:
    return int(_header(head, b"content-length") or 0)


def _body(source: BinaryIO, head: list[bytes]) -> Iterator[bytes]:
    """The body as it is on the wire, in pieces."""
    if _header(head, b"transfer-encoding") == b"chunked":
        size = -1
        while size:
            line = source.readline()
            size = int(line.split(b";")[0], 16)
            yield line
            yield from _exactly(source, size + 2)
        return
    yield from _exactly(source, _length(head))


def _exactly(source: BinaryIO, count: int) -> Iterator[bytes]:
    while count:
        piece = source.read(min(count, 65536))
        if not piece:
            raise EOFError
        count -= len(piece)
        yield piece


def _error(status: int, code: str) -> bytes:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>Reduce your request rate.</Message></Error>'
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
