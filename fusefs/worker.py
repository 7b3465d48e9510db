"""A worker: one of the interchangeable processes that answer the kernel. Composition root."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable

import pyfuse3
import trio

from cache.client import MoverClient, SocketMoverClient
from cache.config import MountConfig
from cache.index import Index
from cache.messages import Closed
from cache.policy.freshness import Freshness
from cache.staging import StagingFiles
from cache.tier import TierFiles
from fusefs import channel
from fusefs.control import ControlDirectory
from fusefs.control_operations import ControlOperations
from fusefs.direct import DirectAnswers
from fusefs.durability import Durability
from fusefs.filesystem import Filesystem
from fusefs.namespace import Namespace
from fusefs.shared import Shared
from fusefs.write_gate import WriteGate
from fusefs.writing import Writing
from fusefs.written import WrittenFiles

log = logging.getLogger(__name__)

# Requests that wait at one time. While so many do nobody receives any, those for cached bytes neither.
REQUESTS_MAX = 10_000
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
    operations: ControlOperations,
    config: MountConfig,
    index: Index,
    tiers: list[TierFiles],
    mover: MoverClient,
    shared: Shared,
    row: int,
) -> list[Callable[[], Awaitable[None]]]:
    """Give *operations* what it answers with; return what is to run beside it. *row*: of the counters."""
    freshness = Freshness(config.ttl_s, config.immutable)
    namespace = Namespace(index, mover, freshness, None if config.read_only else shared.passed_names)
    counters = shared.counters.row(row)
    counters.set("pid", os.getpid())
    operations.control = ControlDirectory(mover, read_only=config.read_only)
    operations.counters = counters
    if operations.passthrough is not None:
        operations.passthrough.sweep()
    staging = None if config.read_only else StagingFiles(config.index_directory)
    grants = None if operations.no_open else shared.grants
    if grants is not None:
        grants.answer()
    operations.filesystem = filesystem = Filesystem(
        index,
        tiers,
        mover,
        namespace,
        counters,
        staging,
        no_open=operations.no_open,
        passthrough=operations.passthrough,
        grants=grants,
    )
    if staging is None:
        return [filesystem.used.tell_regularly]
    gate = WriteGate(shared.counters, counters, shared.budget, mover)
    durability = Durability(config.durability, config.durability_default)
    operations.writing = writing = Writing(
        index,
        mover,
        filesystem,
        staging,
        shared.opens,
        gate,
        durability,
        operations.passthrough,
        passes_staged=config.passthrough == "all",
    )
    return [filesystem.used.tell_regularly, writing.release_descriptors_regularly]


def answer_directly(
    operations: ControlOperations, mover: SocketMoverClient, config: MountConfig, shared: Shared, row: int
) -> list[Callable[[], Awaitable[None]]]:
    """Have what waits for nothing answered without pyfuse3, where the channel extension is there.

    Return what is to run beside it. *row*: of the counters.
    """
    if channel.module() is None:
        return []
    writing, written = operations.writing, None
    if writing is not None and not writing.passes_staged:
        written = writing.written = WrittenFiles(
            operations.filesystem.namespace,
            writing.staging,
            shared.opens,
            shared.counters,
            row,
            shared.budget,
            lambda inode: mover.tell(Closed(inode)),
            answers_cached=operations.passthrough is not None,
        )
    answers = DirectAnswers(
        operations.filesystem,
        writing,
        operations.control,
        mover,
        operations.counters,
        (config.uid, config.gid),
        written,
    )
    answers.start()
    return [answers.answer_failed_reads]


async def run_worker(
    operations: ControlOperations,
    config: MountConfig,
    tiers: list[TierFiles],
    socket_path: str,
    shared: Shared,
    row: int,
    *,
    in_thread: bool,
) -> None:
    """Answer requests until the mount is gone. The session was initialised before the fork.

    *in_thread*: receive them in a thread; the device blocks then.
    """
    shared.counters.row(row).set("receives", 1)
    if in_thread:
        device = channel.receive_in_thread()
        if operations.passthrough is not None:
            operations.passthrough.device = device
    index = Index(config.index_directory)
    try:
        async with trio.open_nursery() as nursery:
            patience_s = config.retry_s + _PATIENCE_S
            mover = SocketMoverClient(socket_path, invalidate, patience_s, shared.opens.resends)
            nursery.start_soon(mover.run)
            for task in equip(operations, config, index, tiers, mover, shared, row):
                nursery.start_soon(task)
            for task in answer_directly(operations, mover, config, shared, row):
                nursery.start_soon(task)
            await pyfuse3.main(max_tasks=REQUESTS_MAX)
            nursery.cancel_scope.cancel()
    finally:
        index.close()
