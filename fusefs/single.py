"""`--workers 0`: supervisor, worker and mover in one process, wired without the socket.

For debugging: one process to trace, profile and stop in. A crash ends the mount.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from contextlib import suppress

import pyfuse3
import trio

from cache.client import LocalMoverClient
from cache.config import MountConfig
from cache.counters import ShownDirectories
from cache.errors import SluiceError
from cache.mover import Mover, TierPlan
from cache.server import Listeners, WorkerConnections, serve_mover
from cache.store import CacheStore
from fusefs import channel, device, passthrough
from fusefs.control_operations import ControlOperations
from fusefs.shared import Shared
from fusefs.worker import REQUESTS_MAX, equip, shake_hands

log = logging.getLogger(__name__)


def run(
    config: MountConfig,
    plans: list[TierPlan],
    shared: Shared,
    listeners: Listeners,
    store: CacheStore,
    announce: Callable[[], None],
) -> int:
    """Serve the mount in this process until it is unmounted; return the exit status."""
    shared.features["several_workers"] = {"on": False, "reason": "--workers 0"}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

    async def serve(mover: Mover, _: WorkerConnections) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, config, nursery.cancel_scope)
            await mover.check_lake()
            store.note_lake_answered()
            await _serve_session(config, plans, mover, shared, announce)
            nursery.cancel_scope.cancel()

    try:
        trio.run(serve_mover, config, plans, shared, listeners, serve, True)
    except BaseExceptionGroup as group:
        matched = group.subgroup(SluiceError)
        while isinstance(matched, BaseExceptionGroup):
            matched = matched.exceptions[0]  # type: ignore[assignment]
        raise matched or group from group
    store.mark_clean()
    return 0


async def _serve_session(
    config: MountConfig, plans: list[TierPlan], mover: Mover, shared: Shared, announce: Callable[[], None]
) -> None:
    sample = await mover.sample_lake()
    fd = device.mount_device(
        config.lake.url, config.mountpoint, read_only=config.read_only, allow_other=config.allow_other
    )
    try:
        handshake = trio.Event()
        operations = ControlOperations(config, handshake.set)
        operations.shown = ShownDirectories() if channel.load() is None else None
        passthrough.want(config)
        pyfuse3.init(operations, f"/dev/fd/{fd}", set())
        await shake_hands(handshake)
        failure = passthrough.failure(config, fd, [plan.path for plan in plans])
        shared.features.update(passthrough.choose(config, channel.load(), failure, sample))
        operations.take_features(shared, fd)
        async with trio.open_nursery() as nursery:
            client = LocalMoverClient(mover.handle, nursery)
            files = [tier.files for tier in mover.residency.tiers]
            for task in equip(operations, config, mover.index, files, client, shared, 1):
                nursery.start_soon(task)
            announce()
            await pyfuse3.main(max_tasks=REQUESTS_MAX)
            nursery.cancel_scope.cancel()
    finally:
        with suppress(OSError):
            device.unmount(config.mountpoint, lazy=True)


async def _end_on_signal(config: MountConfig, session: trio.CancelScope) -> None:
    """Unmount on a signal, which ends the session; cut it off where files are open."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async for _ in signals:
            try:
                await trio.to_thread.run_sync(device.unmount, config.mountpoint)
            except OSError as error:  # In use, or not mounted yet.
                log.warning("%s: %s; detached, open files are cut off", config.mountpoint, error.strerror)
                with suppress(OSError):
                    await trio.to_thread.run_sync(lambda: device.unmount(config.mountpoint, lazy=True))
                session.cancel()
