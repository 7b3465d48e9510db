"""A worker's line to the mover. It outlives movers: what was not answered is asked again."""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

import trio

from cache import messages
from cache.errors import MoverUnavailable
from cache.messages import Answer

log = logging.getLogger(__name__)

_RECEIVE_BYTES = 256 << 10
_RECONNECT_S = 0.05
_ANSWER_S_MAX = 3600.0  # Ten million keys take that long to list. Reads fail far earlier, at the mover.

_OWN_ID = 1 << 63  # Of the ids that are made here.

OnInvalidate = Callable[[list[tuple[int, bytes]]], None]
OnAnswer = Callable[[Answer], None]


class MoverClient(Protocol):
    async def ask(self, request: messages.Request, id: int = 0) -> Answer:
        """Return the answer. Raises what the mover raised, or MoverUnavailable.

        *id* names a Change (see `Asked`); 0 has one made, under which it is asked again should the
        mover die, but not by another worker should this one.
        """

    def tell(self, request: messages.Request) -> None:
        """Send what needs no answer; it may be lost when the mover dies."""


def id_of(request: messages.Request, id: int) -> int:
    """Return the id to send *request* with: none but a Change needs one.

    The kernel's own never have the top bit. 63 random bits are not given twice in a mount's life.
    """
    if id or not isinstance(request, messages.Change):
        return id
    return _OWN_ID | secrets.randbits(63)


class SocketMoverClient:
    """The client over a Unix socket. `run` must be started before the first request."""

    def __init__(self, path: str, on_invalidate: OnInvalidate, patience_s: float, resends: int = 0) -> None:
        """*patience_s*: how long movers that die before they answer anything are borne with.

        *resends*: see `messages.Asked`.
        """
        self._path = path
        self._resends = resends
        self._patience_s = patience_s
        self._heard_s = 0.0  # When a mover last answered, or a request began to wait for one.
        self._on_invalidate = on_invalidate
        self._asked: dict[int, tuple[messages.Asked, OnAnswer]] = {}
        self._number = 0
        self._out = bytearray()
        self._wake = trio.Event()
        self._reader = messages.FrameReader()
        self._socket: socket.socket | None = None  # While there is a connection.
        self._is_writing = False
        self._room = memoryview(bytearray(_RECEIVE_BYTES))  # So much made anew each time is mapped anew.
        self.on_socket: Callable[[int], None] = _nothing  # Gets its descriptor, and -1 before it is closed.

    async def ask(self, request: messages.Request, id: int = 0) -> Answer:
        arrived = trio.Event()
        answers: list[Answer] = []

        def take(answer: Answer) -> None:
            answers.append(answer)
            arrived.set()

        number = self.ask_then(request, id, take)
        try:
            with trio.fail_after(_ANSWER_S_MAX):
                await arrived.wait()
        except trio.TooSlowError as error:
            raise MoverUnavailable(f"the mover did not answer in {_ANSWER_S_MAX:.0f} s") from error
        finally:
            self._asked.pop(number, None)
        if answers[0].error:
            messages.raise_failure(answers[0])
        return answers[0]

    def ask_then(self, request: messages.Request, id: int, then: OnAnswer) -> int:
        """Ask without waiting: *then* gets the answer, a failure too. It must not raise. Returns a number."""
        self._number += 1
        if not self._asked:
            self._heard_s = trio.current_time()
        asked = messages.Asked(self._number, request, id_of(request, id), self._resends)
        self._asked[self._number] = (asked, then)
        self._out += messages.frame(asked)
        self._send_now()
        return asked.number

    def tell(self, request: messages.Request) -> None:
        self._out += messages.frame(messages.Asked(0, request, 0, self._resends))
        self._wake.set()  # It goes with the next question, or in the loop's next turn.

    def _send_now(self) -> None:
        """Send what gathered: a turn of the loop until `_write` did would take longer than the call."""
        if self._socket is not None and not self._is_writing:
            with suppress(OSError):  # It is full, or the mover is gone: `_write` sees to that.
                del self._out[: self._socket.send(self._out)]
        if self._out:
            self._wake.set()

    async def run(self) -> None:
        """Keep the connection up, for ever."""
        while True:
            try:
                connected = self._connect()
            except OSError:
                await trio.sleep(_RECONNECT_S)
                continue
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(connected))
            self._socket = connected
            self._ask_again()
            self.on_socket(connected.fileno())
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, stream)
                    await self._read(connected)
                    nursery.cancel_scope.cancel()
            finally:
                self.on_socket(-1)
                self._socket, self._is_writing = None, False
                await trio.aclose_forcefully(stream)
            log.info("the mover is gone; waiting for the next one (%d requests open)", len(self._asked))
            self._give_up_late()
            await trio.sleep(_RECONNECT_S)

    def _connect(self) -> socket.socket:
        """Return a connection. That of a Unix socket waits for nobody."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            made.connect(self._path)
        except BaseException:
            made.close()
            raise
        return made

    def _give_up_late(self) -> None:
        """Fail what is asked if no mover has lived long enough to answer anything for too long."""
        if trio.current_time() - self._heard_s <= self._patience_s:
            return
        text = f"no mover has answered for {self._patience_s:.0f} s; see the log"
        for number in list(self._asked):
            self._take(messages.failure(number, MoverUnavailable(text)))

    def _ask_again(self) -> None:
        """Forget what was on its way, and send all that is unanswered on the new connection."""
        self._out.clear()
        self._reader = messages.FrameReader()
        for asked, _ in self._asked.values():
            self._out += messages.frame(asked)
        self._wake.set()

    async def _read(self, connected: socket.socket) -> None:
        """Take what arrives, until the connection ends.

        In the call that receives it: after an await the channel might have taken what came behind it.
        """
        while True:
            await trio.lowlevel.wait_readable(connected)
            if not self.receive_nowait():
                return

    def receive_nowait(self) -> bool:
        """Take what has arrived, if anything; return whether the connection is up still."""
        if self._socket is None:
            return False
        try:
            count = self._socket.recv_into(self._room)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._take_chunk(self._room[:count])
        return count > 0  # Its end `_read` will see, too.

    def _take_chunk(self, chunk: memoryview) -> None:
        for packed in self._reader.feed(chunk):
            message = messages.decode_from_mover(packed)
            self._heard_s = trio.current_time()
            if isinstance(message, messages.Invalidate):
                self._on_invalidate(message.entries)
            else:
                self._take(message)

    def _take(self, answer: Answer) -> None:
        if answer.number in self._asked:
            _, then = self._asked.pop(answer.number)
            then(answer)

    async def _write(self, stream: trio.SocketStream) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            out, self._out = self._out, bytearray()
            if not out:
                continue
            self._is_writing = True
            try:
                await stream.send_all(out)
            except trio.BrokenResourceError:
                return  # `_read` sees it too.
            self._is_writing = False


def _nothing(fd: int) -> None:
    """Nobody waits for the socket besides trio."""


class LocalMoverClient:
    """The same without a socket, for `--workers 0`: requests are function calls."""

    def __init__(
        self, handle: Callable[[messages.Request, int], Awaitable[Answer]], nursery: trio.Nursery
    ) -> None:
        self._handle = handle
        self._nursery = nursery

    async def ask(self, request: messages.Request, id: int = 0) -> Answer:
        return await self._handle(request, id_of(request, id))

    def tell(self, request: messages.Request) -> None:
        self._nursery.start_soon(self._handle, request, 0)
