"""A worker: one of the interchangeable processes that answer the kernel. Composition root."""

from __future__ import annotations

import logging
import os

import pyfuse3
import trio

from cache.client import MoverClient, SocketMoverClient
from cache.config import MountConfig
from cache.counters import CounterRow
from cache.index import Index
from cache.policy.freshness import Freshness
from cache.tier import TierFiles
from fusefs.filesystem import Filesystem
from fusefs.namespace import Namespace
from fusefs.operations import Operations

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0  # Beyond the lake's retries, for movers that can't even start.


async def shake_hands(handshake: trio.Event) -> None:
    """Answer INIT, and nothing else.

    pyfuse3 calls `init` and writes the reply in one step without a checkpoint, so once this task
    runs again the reply is out, and the session's tasks are cancelled before they read on.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        with trio.fail_after(30):
            await handshake.wait()
        nursery.cancel_scope.cancel()


def invalidate(entries: list[tuple[int, bytes]]) -> None:
    """Have the kernel forget names that show something else now, in pyfuse3's own thread."""
    for parent, name in entries:
        pyfuse3.invalidate_entry_async(
            pyfuse3.InodeT(parent), pyfuse3.FileNameT(name), pyfuse3.InodeT(0), ignore_enoent=True
        )


def equip(
    operations: Operations,
    config: MountConfig,
    index: Index,
    tiers: list[TierFiles],
    mover: MoverClient,
    counters: CounterRow,
) -> Filesystem:
    """Give *operations* a filesystem over *index*; return it."""
    namespace = Namespace(index, mover, Freshness(config.ttl_s, config.immutable))
    counters.set("pid", os.getpid())
    operations.counters = counters
    if operations.passthrough is not None:
        operations.passthrough.sweep()
    operations.filesystem = Filesystem(
        index,
        tiers,
        mover,
        namespace,
        counters,
        no_open=operations.no_open,
        passthrough=operations.passthrough,
    )
    return operations.filesystem


async def run_worker(
    operations: Operations,
    config: MountConfig,
    tiers: list[TierFiles],
    socket_path: str,
    counters: CounterRow,
) -> None:
    """Answer requests until the mount is gone. The session was initialised before the fork."""
    index = Index(config.index_directory)
    try:
        async with trio.open_nursery() as nursery:
            mover = SocketMoverClient(socket_path, invalidate, config.retry_s + _PATIENCE_S)
            filesystem = equip(operations, config, index, tiers, mover, counters)
            nursery.start_soon(mover.run)
            nursery.start_soon(filesystem.flush_used_regularly)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()
    finally:
        index.close()
