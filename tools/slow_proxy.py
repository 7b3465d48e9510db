"""A proxy that makes an S3 server slow and unreliable, with a seed. Imported through tools.servers.

Bytes pass untouched in both directions, Host header included, so SigV4 signatures stay valid.
One thread for each connection; HTTP/1.1 with keep-alive, Content-Length, chunked bodies and
`Expect: 100-continue`.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import ssl
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Self

FaultKind = Literal["slow_down", "error", "reset", "truncate", "hang", "garble"]

_CHUNK_BYTES = 256 << 10
_HEAD_BYTES_MAX = 64 << 10
_LINE_BYTES_MAX = 8 << 10
_REPLIES: dict[FaultKind, tuple[str, str]] = {
    "slow_down": ("503 Slow Down", "SlowDown"),
    "error": ("500 Internal Server Error", "InternalError"),
}


@dataclass(frozen=True, slots=True)
class Faults:
    """How badly the proxy behaves. The shares are probabilities and add up to at most 1."""

    latency_s: float = 0.0  # Slept before each request is passed on.
    bytes_per_s: float = 0.0  # Of the bodies of all replies together; 0: as fast as it goes.
    slow_down_share: float = 0.0  # 503 SlowDown.
    error_share: float = 0.0  # 500 InternalError.
    reset_share: float = 0.0  # The connection is reset instead of an answer.
    truncate_share: float = 0.0  # Half of the body, then the connection ends.
    hang_share: float = 0.0  # No answer for hang_s, then the connection ends.
    hang_s: float = 60.0
    garble_share: float = 0.0  # One byte of the request's body is another one on its way to the server.
    methods: frozenset[str] | None = None  # None: faults strike every method.

    def pick(self, roll: float) -> FaultKind | None:
        """Return the fault that *roll*, in [0, 1), falls on."""
        shares: tuple[tuple[FaultKind, float], ...] = (
            ("slow_down", self.slow_down_share),
            ("error", self.error_share),
            ("reset", self.reset_share),
            ("truncate", self.truncate_share),
            ("hang", self.hang_share),
            ("garble", self.garble_share),
        )
        for kind, share in shares:
            if roll < share:
                return kind
            roll -= share
        return None


class _Line:
    """What the replies of all connections share: so many bytes a second, first come, first served."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._free_at_s = 0.0

    def wait_turn(self, size_bytes: int, bytes_per_s: float) -> None:
        """Return when a piece of *size_bytes* would have come over the line."""
        if not bytes_per_s:
            return
        with self._mutex:
            now_s = time.monotonic()
            self._free_at_s = arrives_s = max(now_s, self._free_at_s) + size_bytes / bytes_per_s
        time.sleep(arrives_s - now_s)


class SlowProxy:
    """Listens on a port of 127.0.0.1 and passes requests on to *upstream_url* (plain HTTP).

    `faults` may be assigned at any time. `fail_next()` plans faults that strike before any
    probability does. With *tls*, clients speak HTTPS to it.
    """

    def __init__(
        self,
        upstream_url: str,
        faults: Faults | None = None,
        *,
        seed: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        host, _, port = upstream_url.removeprefix("http://").rstrip("/").partition(":")
        self._upstream = (host, int(port or 80))
        self.faults = faults or Faults()
        self._tls = tls
        self._random = random.Random(seed)
        self._mutex = threading.Lock()  # Guards everything below, and the generator.
        self._requests: Counter[str] = Counter()
        self._faults_dealt: Counter[str] = Counter()
        self._planned: deque[FaultKind] = deque()
        self._line = _Line()
        self._connections: set[socket.socket] = set()
        self._closing = threading.Event()
        self._listener: socket.socket | None = None
        self._acceptor = threading.Thread()
        self._port = 0

    @property
    def endpoint_url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    @property
    def requests(self) -> Counter[str]:
        """Return a copy of the number of requests so far, by method."""
        with self._mutex:
            return self._requests.copy()

    @property
    def faults_dealt(self) -> Counter[str]:
        """Return a copy of the number of faults so far, by kind."""
        with self._mutex:
            return self._faults_dealt.copy()

    def reset_counts(self) -> None:
        with self._mutex:
            self._requests.clear()
            self._faults_dealt.clear()

    def fail_next(self, kind: FaultKind, times: int = 1) -> None:
        """Let the next *times* requests of the struck methods meet this fault."""
        with self._mutex:
            self._planned.extend([kind] * times)

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="slow-proxy", daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and end every connection."""
        self._closing.set()
        if self._listener is not None:
            _shut(self._listener)
            self._acceptor.join()
            self._listener.close()
        with self._mutex:
            connections = list(self._connections)
        for connection in connections:
            _shut(connection)

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Serve one client connection to its end. Closes it."""
        connection = _Connection(client, self._upstream)
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._enlist(client)
            if self._tls is not None:
                connection.client = self._tls.wrap_socket(client, server_side=True)
                self._enlist(connection.client)
            while self._serve_one(connection):
                pass
        except OSError:
            pass  # The client or the server went away: so does the connection.
        finally:
            with self._mutex:
                self._connections -= {client, connection.client}
            connection.close()

    def _enlist(self, client: socket.socket) -> None:
        with self._mutex:
            self._connections.add(client)
        if self._closing.is_set():
            raise OSError("closing")

    def _serve_one(self, connection: _Connection) -> bool:
        """Pass one request on, or fail it. Return whether the connection goes on."""
        head = connection.read_request_head()
        if head is None:
            return False
        fault = self._next_fault(head.method)
        if (latency_s := self.faults.latency_s) > 0:
            time.sleep(latency_s)
        if fault == "reset":
            connection.reset()
            return False
        if fault == "hang":
            self._closing.wait(self.faults.hang_s)
            return False
        if fault in _REPLIES:
            return connection.refuse(head, *_REPLIES[fault])
        return connection.exchange(head, self._hold_up, fault)

    def _hold_up(self, piece: bytes) -> None:
        self._line.wait_turn(len(piece), self.faults.bytes_per_s)

    def _next_fault(self, method: str) -> FaultKind | None:
        faults = self.faults
        with self._mutex:
            self._requests[method] += 1
            if faults.methods is not None and method not in faults.methods:
                return None
            kind = self._planned.popleft() if self._planned else faults.pick(self._random.random())
            if kind is not None:
                self._faults_dealt[kind] += 1
            return kind


class _Head:
    """The bytes of a request's or reply's first line and headers, and what they say."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        lines = raw.split(b"\r\n")
        self.first_line = lines[0].decode("latin-1")
        self._fields: dict[str, str] = {}
        for line in lines[1:]:
            name, colon, value = line.decode("latin-1").partition(":")
            if colon:
                self._fields[name.strip().lower()] = value.strip()

    @property
    def method(self) -> str:
        return self.first_line.split(" ", 1)[0]

    @property
    def status(self) -> int:
        return int(self.first_line.split(" ", 2)[1])

    @property
    def content_length(self) -> int | None:
        value = self._fields.get("content-length")
        return None if value is None else int(value)

    @property
    def is_chunked(self) -> bool:
        return "chunked" in self._fields.get("transfer-encoding", "").lower()

    @property
    def expects_continue(self) -> bool:
        return self._fields.get("expect", "").lower() == "100-continue"

    @property
    def closes(self) -> bool:
        return self._fields.get("connection", "").lower() == "close"


class _Stream:
    """A socket with a buffer of what was received and not used yet."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._buffer = bytearray()

    def read_until(self, mark: bytes, bytes_max: int) -> bytes | None:
        """Return the bytes up to and with *mark*; None when the peer ended before sending any."""
        while (end := self._buffer.find(mark)) < 0:
            if len(self._buffer) > bytes_max:
                raise OSError("too long a header")
            received = self.socket.recv(_CHUNK_BYTES)
            if not received:
                if self._buffer:
                    raise OSError("ended within a header")
                return None
            self._buffer += received
        return self._take(end + len(mark))

    def read_some(self, bytes_max: int) -> bytes:
        """Return 1 to *bytes_max* bytes, or none at the end."""
        if self._buffer:
            return self._take(min(bytes_max, len(self._buffer)))
        return self.socket.recv(min(bytes_max, _CHUNK_BYTES))

    def body(self, head: _Head, *, until_close: bool) -> Iterator[bytes]:
        """Yield the body's bytes as they stand on the wire, chunk headers included."""
        if head.is_chunked:
            yield from self._chunked_body()
        elif head.content_length is not None:
            yield from self._exactly(head.content_length)
        elif until_close:
            while received := self.read_some(_CHUNK_BYTES):
                yield received

    def _exactly(self, length: int) -> Iterator[bytes]:
        while length > 0:
            received = self.read_some(length)
            if not received:
                raise OSError("ended within a body")
            length -= len(received)
            yield received

    def _chunked_body(self) -> Iterator[bytes]:
        while True:
            line = self._line()
            yield line
            size = int(line.split(b";")[0], 16)
            if size == 0:
                break
            yield from self._exactly(size + 2)  # And its CR LF.
        while True:  # Trailers, up to an empty line.
            line = self._line()
            yield line
            if line == b"\r\n":
                return

    def _line(self) -> bytes:
        line = self.read_until(b"\r\n", _LINE_BYTES_MAX)
        if line is None:
            raise OSError("ended within a chunked body")
        return line

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken


class _Connection:
    """One client's connection and the one to the server that belongs to it."""

    def __init__(self, client: socket.socket, upstream: tuple[str, int]) -> None:
        self.client = client
        self._upstream_address = upstream
        self._client_stream: _Stream | None = None
        self._upstream: _Stream | None = None

    def read_request_head(self) -> _Head | None:
        raw = self._requests().read_until(b"\r\n\r\n", _HEAD_BYTES_MAX)
        return None if raw is None else _Head(raw)

    def exchange(self, head: _Head, hold_up: Callable[[bytes], None], fault: FaultKind | None) -> bool:
        """Pass the request on and the reply back. Return whether the connection goes on.

        *hold_up* is called with each piece of the reply's body before it is passed on.
        """
        upstream = self._connect()
        upstream.socket.sendall(head.raw)
        garble = fault == "garble" and not head.is_chunked
        for piece in self._request_body(head):
            upstream.socket.sendall(bytes([piece[0] ^ 1]) + piece[1:] if garble else piece)
            garble = False
        reply = self._reply_head(upstream)
        bodiless = head.method == "HEAD" or reply.status in (204, 304)
        if fault == "truncate" and not bodiless and (reply.content_length or 0) > 1:
            self._pass_half(upstream, reply)
            return False
        self.client.sendall(reply.raw)
        if not bodiless:
            for piece in upstream.body(reply, until_close=True):
                hold_up(piece)
                self.client.sendall(piece)
        unframed = not bodiless and not reply.is_chunked and reply.content_length is None
        return not (unframed or reply.closes or head.closes)

    def refuse(self, head: _Head, status: str, code: str) -> bool:
        """Read the request to its end and answer with an S3 error. Return that it goes on."""
        for _ in self._request_body(head):
            pass
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        reply = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        self.client.sendall(reply.encode() + (b"" if head.method == "HEAD" else body))
        return True

    def reset(self) -> None:
        """Make the close a TCP reset (RST)."""
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        self.client.close()
        if self._upstream is not None:
            self._upstream.socket.close()

    def _requests(self) -> _Stream:
        if self._client_stream is None:
            self._client_stream = _Stream(self.client)
        return self._client_stream

    def _request_body(self, head: _Head) -> Iterator[bytes]:
        if head.expects_continue:  # The server's own 100 is dropped in _reply_head.
            self.client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self._requests().body(head, until_close=False)

    def _pass_half(self, upstream: _Stream, reply: _Head) -> None:
        assert reply.content_length is not None
        self.client.sendall(reply.raw)
        left = reply.content_length // 2
        for piece in upstream.body(reply, until_close=True):
            self.client.sendall(piece[:left])
            left -= len(piece[:left])
            if left <= 0:
                return

    def _reply_head(self, upstream: _Stream) -> _Head:
        """Return the head of the final reply; interim ones (1xx) are dropped."""
        while True:
            raw = upstream.read_until(b"\r\n\r\n", _HEAD_BYTES_MAX)
            if raw is None:
                raise OSError("the server ended the connection")
            reply = _Head(raw)
            if reply.status >= 200:
                return reply

    def _connect(self) -> _Stream:
        """Return the connection to the server, a new one if the last was closed while idle."""
        if self._upstream is not None and _is_readable(self._upstream.socket):
            self._upstream.socket.close()
            self._upstream = None
        if self._upstream is None:
            upstream = socket.create_connection(self._upstream_address)
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._upstream = _Stream(upstream)
        return self._upstream


def _is_readable(connection: socket.socket) -> bool:
    poll = select.poll()  # select() knows no descriptor above 1023.
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def _shut(connection: socket.socket) -> None:
    """End a socket that another thread may be blocked on; that thread goes on and closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
