"""A TCP proxy that loses answers: the server did what it was asked to, and the client never hears of it."""

from __future__ import annotations

import random
import socket
import struct
import threading
from contextlib import suppress
from typing import Self

_CHUNK_BYTES = 256 << 10
_INTERIM = b"HTTP/1.1 100"  # "Continue": the answer proper is still to come.
_HEAD_END = b"\r\n\r\n"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s. The close becomes a TCP reset.


class LossyProxy:
    """Passes bytes on to *upstream_url* (plain HTTP); of *share* of the answers none arrive.

    The connection is reset instead. `lost` counts them. `share` may be assigned at any time.
    """

    def __init__(self, upstream_url: str, share: float, seed: int = 0) -> None:
        host, _, port = upstream_url.removeprefix("http://").rstrip("/").partition(":")
        self._upstream = (host, int(port))
        self._random = random.Random(seed)
        self._mutex = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.share, self.lost = share, 0

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._start(self._accept)
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._mutex:
            for open_one in self._sockets:
                _shut(open_one)
        for thread in list(self._threads):
            thread.join()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        """Pass on what the client sends; another thread does so with the answers."""
        try:
            server = socket.create_connection(self._upstream)
        except OSError:
            client.close()
            return
        asked = threading.Event()
        with self._mutex:
            self._sockets |= {client, server}
        answering = threading.Thread(target=self._answer, args=(server, client, asked))
        answering.start()
        try:
            while chunk := client.recv(_CHUNK_BYTES):
                asked.set()
                server.sendall(chunk)
        except OSError:
            pass
        _shut(server)
        answering.join()
        with self._mutex:
            self._sockets -= {client, server}
        for done in (client, server):
            done.close()

    def _answer(self, server: socket.socket, client: socket.socket, asked: threading.Event) -> None:
        """Pass on what the server sends, until an answer is to be lost."""
        try:
            while chunk := server.recv(_CHUNK_BYTES):
                if chunk.startswith(_INTERIM):  # The answer may come in the same chunk.
                    interim, end, chunk = chunk.partition(_HEAD_END)
                    client.sendall(interim + end)
                if asked.is_set() and chunk:
                    if self._loses():
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                        break
                    asked.clear()  # More of the same answer may follow.
                client.sendall(chunk)
        except OSError:
            pass
        _shut(client)

    def _loses(self) -> bool:
        with self._mutex:
            loses = self._random.random() < self.share
            self.lost += loses
            return loses


def _shut(open_one: socket.socket) -> None:
    with suppress(OSError):
        open_one.shutdown(socket.SHUT_RDWR)
