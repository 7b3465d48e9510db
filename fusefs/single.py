"""`--workers 0`: supervisor, worker and mover in one process, wired without the socket.

For debugging: one process to trace, profile and stop in. A crash ends the mount.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyfuse3
import trio

from cache.client import LocalMoverClient
from cache.config import MountConfig
from cache.counters import ShownDirectories
from cache.errors import SluiceError
from cache.mover import Mover, TierPlan
from cache.server import Listeners, WorkerConnections, serve_mover
from cache.store import CacheStore
from fusefs import channel, device
from fusefs.operations import Operations
from fusefs.worker import Shared, equip

log = logging.getLogger(__name__)


def run(
    config: MountConfig,
    plans: list[TierPlan],
    shared: Shared,
    listeners: Listeners,
    features: dict[str, Any],
    store: CacheStore,
    announce: Callable[[], None],
) -> int:
    """Serve the mount in this process until it is unmounted; return the exit status."""
    features["several_workers"] = {"on": False, "reason": "--workers 0"}
    features["no_open"] = channel.no_open_feature(config, channel.load())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

    async def serve(mover: Mover, _: WorkerConnections) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, config, nursery.cancel_scope)
            await mover.check_lake()
            await _serve_session(config, mover, shared, announce, no_open=bool(features["no_open"]["on"]))
            nursery.cancel_scope.cancel()

    try:
        trio.run(serve_mover, config, plans, shared, listeners, features, serve, True)
    except BaseExceptionGroup as group:
        matched = group.subgroup(SluiceError)
        while isinstance(matched, BaseExceptionGroup):
            matched = matched.exceptions[0]  # type: ignore[assignment]
        raise matched or group from group
    store.mark_clean()
    return 0


async def _serve_session(
    config: MountConfig, mover: Mover, shared: Shared, announce: Callable[[], None], *, no_open: bool
) -> None:
    fd = device.mount_device(
        config.lake.url, config.mountpoint, read_only=config.read_only, allow_other=config.allow_other
    )
    try:
        initialised = trio.Event()
        operations = Operations(config, initialised.set, no_open=no_open)
        operations.shown = ShownDirectories() if channel.load() is None else None
        pyfuse3.init(operations, f"/dev/fd/{fd}", set())
        async with trio.open_nursery() as nursery:
            client = LocalMoverClient(mover.handle, nursery)
            files = [tier.files for tier in mover.residency.tiers]
            for task in equip(operations, config, mover.index, files, client, shared, 1):
                nursery.start_soon(task)
            nursery.start_soon(_announce_when, initialised, announce)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()
    finally:
        with suppress(OSError):
            device.unmount(config.mountpoint, lazy=True)


async def _announce_when(initialised: trio.Event, announce: Callable[[], None]) -> None:
    await initialised.wait()
    announce()


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
