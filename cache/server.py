"""The mover's sockets: workers' requests on one, admin commands on the other."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import trio

from cache import messages
from cache.admin import Admin
from cache.config import MountConfig
from cache.control import REQUEST_BYTES_MAX
from cache.errors import SluiceError
from cache.listing import Changed
from cache.mover import Mover, TierPlan, run_mover
from cache.write_path import Shared

log = logging.getLogger(__name__)

_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED.
_RECEIVE_BYTES = 256 << 10
_CHANGED_AT_ONCE, _CHANGED_MAX = 1000, 100_000


class WorkerConnections:
    """Serves every worker's connection; one task for each request under way."""

    def __init__(self, mover: Mover, nursery: trio.Nursery, is_orphaned: Callable[[], bool]) -> None:
        """*nursery*: where requests are carried out, to their end even if their worker dies.

        *is_orphaned*: whether the supervisor is gone, and the notifier with it.
        """
        self._mover = mover
        self._nursery = nursery
        self._is_orphaned = is_orphaned
        self._changed: dict[tuple[int, bytes], None] = {}  # What the kernel is to forget, oldest first.
        self._connections: list[WorkerConnection] = []

    @property
    def count(self) -> int:
        return sum(not connection.notifies for connection in self._connections)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection until the worker closes it."""
        connection = WorkerConnection(stream, self._mover, self._nursery, self._tell)
        self._connections.append(connection)
        try:
            await connection.run()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # The worker died; its successor asks again.
        except* (ValueError, msgspec.MsgspecError):
            log.exception("a worker sent what is no message; its connection is closed")
        finally:
            self._connections.remove(connection)
            await trio.aclose_forcefully(stream)

    async def tell_changes(self, changes: trio.MemoryReceiveChannel[Changed]) -> None:
        """Pass on, for the kernel, which entries show something else now, as the notifier asks for them."""
        async for changed in changes:
            self._mover.keeper.names_changed()
            self._changed |= dict.fromkeys((int(parent), name) for parent, name in changed)
            self._tell()

    def _tell(self) -> None:
        """Tell what changed, if somebody is ready for it; else it is kept, up to `_CHANGED_MAX` of it."""
        ready = next((it for it in self._connections if it.is_ready), None)
        if ready is None and self._is_orphaned():  # Nobody replaces a worker any more.
            ready = next(iter(self._connections), None)
        if ready is not None and self._changed:
            ready.is_ready = False
            entries = list(self._changed)[:_CHANGED_AT_ONCE]
            for entry in entries:
                del self._changed[entry]
            ready.send(messages.Invalidate(entries))
        for entry in list(self._changed)[: max(0, len(self._changed) - _CHANGED_MAX)]:
            del self._changed[entry]  # The kernel asks for it again after the ttl.


class WorkerConnection:
    def __init__(
        self, stream: trio.SocketStream, mover: Mover, requests: trio.Nursery, on_ready: Callable[[], None]
    ) -> None:
        self.notifies = False  # It is the notifier's,
        self.is_ready = False  # which waits for what it is to tell. Then *on_ready* is called.
        self._on_ready = on_ready
        self._stream = stream
        self._requests = requests
        self._mover = mover
        self._out = bytearray()
        self._wake = trio.Event()
        self._is_writing = False

    async def run(self) -> None:
        # The same socket without trio.
        with socket.fromfd(self._stream.socket.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as direct:
            direct.setblocking(False)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                reader, room = messages.FrameReader(), memoryview(bytearray(_RECEIVE_BYTES))
                while count := await _received(direct, room):
                    for packed in reader.feed(room[:count]):
                        self._begin(messages.decode_asked(packed))
                    self._mover.committer.flush_due()
                    self._send_now(direct)
                nursery.cancel_scope.cancel()

    def _begin(self, asked: messages.Asked) -> None:
        if isinstance(asked.request, messages.Notifies):
            self.notifies = self.is_ready = True
            self._on_ready()
            return
        try:
            put = partial(self._put, asked.number)
            is_begun = self._mover.begin_nowait(asked.request, asked.id, put, asked.resends)
        except Exception:  # `_answer` meets it again, and tells the worker.
            is_begun = False
        if not is_begun:
            self._requests.start_soon(self._answer, asked)

    def _put(self, number: int, answer: messages.Answer) -> None:
        """Keep the answer for `_send_now`: it is told in the turn of the loop in which the request came."""
        answer.number = number
        self._out += _framed(answer)

    def _send_now(self, direct: socket.socket) -> None:
        """Send what gathered: a turn of the loop until `_write` did would take longer than the call."""
        if self._out and not self._is_writing:
            with suppress(OSError):  # It is full, or the worker is gone: `_write` sees to that.
                del self._out[: direct.send(self._out)]
        if self._out:
            self._wake.set()

    def send(self, message: messages.FromMover) -> None:
        self._out += messages.frame(message)
        self._wake.set()

    async def _write(self) -> None:
        """Send what has gathered; answers that end together leave in one system call."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            out, self._out = self._out, bytearray()
            if not out:
                continue
            self._is_writing = True
            try:
                await self._stream.send_all(out)
            except trio.BrokenResourceError:
                return
            self._is_writing = False

    async def _answer(self, asked: messages.Asked) -> None:
        try:
            answer = await self._mover.handle(asked.request, asked.id, asked.resends)
        except SluiceError as error:
            answer = messages.failure(asked.number, error)
        except Exception as error:
            log.exception("a request failed: %r", asked.request)
            answer = messages.failure(asked.number, SluiceError(f"{type(error).__name__}: {error}"))
        if not isinstance(asked.request, messages.UNANSWERED):
            answer.number = asked.number
            self._out += _framed(answer)
            self._wake.set()


def _framed(answer: messages.Answer) -> bytes:
    """Return the frame to send. Whoever asked is answered, whatever the answer is."""
    try:
        return messages.frame(answer)
    except Exception as error:
        log.exception("an answer can't be told: %r", answer)
        return messages.frame(messages.failure(answer.number, SluiceError(f"no answer: {error}")))


async def _received(direct: socket.socket, room: memoryview) -> int:
    """Return how many bytes of *room* arrived next, 0 at the end. Raises trio.BrokenResourceError.

    As trio's own, without a first call that finds nothing, and without new memory, which at this size is
    mapped and unmapped each time.
    """
    while True:
        await trio.lowlevel.wait_readable(direct)
        try:
            return direct.recv_into(room)
        except BlockingIOError:
            continue
        except OSError as error:
            raise trio.BrokenResourceError from error


async def serve_control(admin: Admin, stream: trio.SocketStream) -> None:
    """Serve one connection of the control socket: one request, its progress, its result."""
    async with stream:
        try:
            if not _is_allowed(stream):
                await _reply(stream, {"error": "this mount belongs to another user"})
                return
            request = json.loads(await _receive_line(stream))
            result = await admin.handle(request, lambda progress: _reply(stream, {"progress": progress}))
            await _reply(stream, {"result": result})
        except SluiceError as error:
            await _reply(stream, {"error": str(error)})
        except (ValueError, KeyError, TypeError) as error:
            await _reply(stream, {"error": f"not a request: {error!r}"})
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except Exception as error:  # The mover outlives any command.
            log.exception("a command failed")
            await _reply(stream, {"error": f"internal error: {type(error).__name__}: {error}; see the log"})


async def _receive_line(stream: trio.SocketStream) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):
        chunk = await stream.receive_some(65536)
        if not chunk or len(received) > REQUEST_BYTES_MAX:
            raise ValueError("the request is cut off or too long")
        received += chunk
    return bytes(received)


async def _reply(stream: trio.SocketStream, reply: dict[str, Any]) -> bool:
    """Send; return whether there was somebody to send to: the command may have been interrupted."""
    try:
        await stream.send_all(json.dumps(reply).encode() + b"\n")
    except trio.BrokenResourceError:
        return False
    return True


def _is_allowed(stream: trio.SocketStream) -> bool:
    packed = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(packed)
    return uid in (0, os.geteuid())


@dataclass(frozen=True, slots=True)
class Listeners:
    """Listening sockets that the supervisor made and keeps, so that they outlive each mover."""

    workers: socket.socket
    control: socket.socket


async def serve_mover(
    config: MountConfig,
    plans: list[TierPlan],
    shared: Shared,
    listeners: Listeners,
    on_ready: Callable[[Mover, WorkerConnections], Awaitable[None]],
    first: bool,
) -> None:
    """Run the mover with its sockets until *on_ready* returns; then move DRAM's content to NVMe."""

    async def serve(mover: Mover, changes: trio.MemoryReceiveChannel[Changed]) -> None:
        async with trio.open_nursery() as nursery:
            supervisor = os.getppid()
            connections = WorkerConnections(mover, nursery, lambda: os.getppid() != supervisor)
            admin = Admin(mover, shared.features, supervisor if config.workers else os.getpid())
            mover.control_files.stats = admin.status
            nursery.start_soon(connections.tell_changes, changes)
            nursery.start_soon(_accept, nursery, listeners.workers, connections.serve)
            nursery.start_soon(_accept, nursery, listeners.control, partial(serve_control, admin))
            await on_ready(mover, connections)
            async for _ in mover.residency.drain_dram():
                pass
            nursery.cancel_scope.cancel()

    await run_mover(config, plans, shared, serve, first=first)


async def _accept(
    nursery: trio.Nursery, listening: socket.socket, serve: Callable[[trio.SocketStream], Awaitable[None]]
) -> None:
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening.dup()))
    while True:
        try:
            nursery.start_soon(serve, await listener.accept())
        except OSError as error:
            log.warning("can't accept a connection: %s", error)
            await trio.sleep(0.1)
