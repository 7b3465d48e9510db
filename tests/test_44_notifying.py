"""Which names the kernel is to forget: whom the mover tells, and when."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from cache import messages, server
from cache.server import WorkerConnections


@dataclass(eq=False)
class FakeConnection:
    notifies: bool = False
    is_ready: bool = False
    got: list[Any] = field(default_factory=list)

    def send(self, message: messages.Invalidate) -> None:
        self.got += message.entries


class Told:
    """The mover's side, with connections of nobody."""

    def __init__(self) -> None:
        self.is_orphaned = False
        mover: Any = SimpleNamespace(keeper=SimpleNamespace(names_changed=lambda: None))
        self.connections = WorkerConnections(mover, None, lambda: self.is_orphaned)  # type: ignore[arg-type]

    async def change(self, *names: bytes) -> None:
        send, receive = trio.open_memory_channel[Any](1)
        async with send:
            await send.send([(1, name) for name in names])
        await self.connections.tell_changes(receive)

    def add(self, connection: FakeConnection) -> FakeConnection:
        self.connections._connections.append(connection)  # type: ignore[arg-type]
        return connection


async def test_changes_wait_for_the_notifier_and_never_go_to_a_worker() -> None:
    told = Told()
    worker = told.add(FakeConnection())
    await told.change(b"a", b"b")
    await told.change(b"a")
    notifier = told.add(FakeConnection(notifies=True, is_ready=True))
    told.connections._tell()
    assert notifier.got == [(1, b"a"), (1, b"b")] and not notifier.is_ready
    await told.change(b"c")
    assert len(notifier.got) == 2, "it has not asked for more"
    notifier.is_ready = True
    told.connections._tell()
    assert notifier.got[2:] == [(1, b"c")] and worker.got == []
    assert told.connections.count == 1


async def test_without_a_supervisor_a_worker_tells() -> None:
    told = Told()
    worker = told.add(FakeConnection())
    told.is_orphaned = True
    await told.change(b"a")
    assert worker.got == [(1, b"a")]


async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_CHANGED_MAX", 3)
    told = Told()
    await told.change(*(b"%d" % number for number in range(10)))
    notifier = told.add(FakeConnection(notifies=True, is_ready=True))
    told.connections._tell()
    assert notifier.got == [(1, b"7"), (1, b"8"), (1, b"9")]
