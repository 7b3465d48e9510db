"""A worker's line to the mover. It outlives movers: what was not answered is asked again."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable
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

    def __init__(self, path: str, on_invalidate: OnInvalidate, patience_s: float) -> None:
        """*patience_s*: how long movers that die before they answer anything are borne with."""
        self._path = path
        self._patience_s = patience_s
        self._heard_s = 0.0  # When a mover last answered, or a request began to wait for one.
        self._on_invalidate = on_invalidate
        self._asked: dict[int, tuple[messages.Asked, trio.Event]] = {}
        self._answers: dict[int, Answer] = {}
        self._number = 0
        self._out = bytearray()
        self._wake = trio.Event()

    async def ask(self, request: messages.Request, id: int = 0) -> Answer:
        self._number += 1
        number, arrived = self._number, trio.Event()
        if not self._asked:
            self._heard_s = trio.current_time()
        asked = messages.Asked(number, request, id_of(request, id))
        self._asked[number] = (asked, arrived)
        self._send(asked)
        try:
            with trio.fail_after(_ANSWER_S_MAX):
                await arrived.wait()
        except trio.TooSlowError as error:
            raise MoverUnavailable(f"the mover did not answer in {_ANSWER_S_MAX:.0f} s") from error
        finally:
            del self._asked[number]
        answer = self._answers.pop(number)
        if answer.error:
            messages.raise_failure(answer)
        return answer

    def tell(self, request: messages.Request) -> None:
        self._send(messages.Asked(0, request))

    def _send(self, asked: messages.Asked) -> None:
        self._out += messages.frame(asked)
        self._wake.set()

    async def run(self) -> None:
        """Keep the connection up, for ever."""
        while True:
            try:
                stream = await trio.open_unix_socket(self._path)
            except OSError:
                await trio.sleep(_RECONNECT_S)
                continue
            self._ask_again()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, stream)
                    await self._read(stream)
                    nursery.cancel_scope.cancel()
            finally:
                await trio.aclose_forcefully(stream)
            log.info("the mover is gone; waiting for the next one (%d requests open)", len(self._asked))
            self._give_up_late()
            await trio.sleep(_RECONNECT_S)

    def _give_up_late(self) -> None:
        """Fail what is asked if no mover has lived long enough to answer anything for too long."""
        if trio.current_time() - self._heard_s <= self._patience_s:
            return
        for number, (_, arrived) in self._asked.items():
            text = f"no mover has answered for {self._patience_s:.0f} s; see the log"
            self._answers[number] = messages.failure(number, MoverUnavailable(text))
            arrived.set()

    def _ask_again(self) -> None:
        """Forget what was on its way, and send all that is unanswered on the new connection."""
        self._out.clear()
        for asked, _ in self._asked.values():
            self._out += messages.frame(asked)
        self._wake.set()

    async def _read(self, stream: trio.SocketStream) -> None:
        reader = messages.FrameReader()
        try:
            while chunk := await stream.receive_some(_RECEIVE_BYTES):
                for packed in reader.feed(chunk):
                    self._take(messages.decode_from_mover(packed))
        except trio.BrokenResourceError:
            return

    def _take(self, message: messages.FromMover) -> None:
        self._heard_s = trio.current_time()
        if isinstance(message, messages.Invalidate):
            self._on_invalidate(message.entries)
        elif message.number in self._asked:
            self._answers[message.number] = message
            self._asked[message.number][1].set()

    async def _write(self, stream: trio.SocketStream) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            out, self._out = self._out, bytearray()
            try:
                await stream.send_all(out)
            except trio.BrokenResourceError:
                return  # `_read` sees it too.


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
