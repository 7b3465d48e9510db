"""The mover as a child process: its sockets, its start and its end."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from cache.config import MountConfig
from cache.control import runtime_directory, socket_path
from cache.errors import SluiceError, UsageError
from cache.mover import Mover, TierPlan
from cache.server import Listeners, WorkerConnections, serve_mover
from fusefs.shared import Shared

log = logging.getLogger(__name__)

_ORPHAN_CHECK_S = 2.0


def worker_socket_path(config: MountConfig) -> Path:
    return socket_path(config.mountpoint).with_suffix(".worker")


@contextmanager
def listening(config: MountConfig) -> Iterator[Listeners]:
    """Make the sockets, for as long as the block runs. They outlive each mover."""
    paths = (worker_socket_path(config), socket_path(config.mountpoint))
    try:
        runtime_directory().mkdir(parents=True, exist_ok=True, mode=0o700)
        if runtime_directory().stat().st_uid != os.geteuid():
            raise UsageError(f"{runtime_directory()}: belongs to another user; set XDG_RUNTIME_DIR")
        sockets = [_listen(path) for path in paths]
    except OSError as error:
        raise SluiceError(f"{runtime_directory()}: no control socket: {error.strerror}") from error
    try:
        yield Listeners(*sockets)
    finally:
        for path, sock in zip(paths, sockets, strict=True):
            sock.close()
            path.unlink(missing_ok=True)


def _listen(path: Path) -> socket.socket:
    """Return a listening Unix socket at *path*, mode 0600, replacing a stale one."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(mask)
    sock.listen(256)
    return sock


def run(
    config: MountConfig,
    plans: list[TierPlan],
    shared: Shared,
    listeners: Listeners,
    *,
    first: bool,
    report: int,
) -> int:
    """Run the mover; return its exit status.

    The *first* one checks the lake. It writes "ready" and a sample of the lake, or the error's class
    and text, to the descriptor *report*; later ones have nobody to tell and go on without the check.
    """
    supervisor = os.getppid()

    async def until_stopped(mover: Mover, workers: WorkerConnections) -> None:
        if first:
            await mover.check_lake()
            _report(report, "ready {} {}".format(*await mover.sample_lake()))
        await _wait_for_the_end(supervisor, workers)

    try:
        trio.run(serve_mover, config, plans, shared, listeners, until_stopped, first)
        return 0
    except BaseException as caught:
        error = _innermost(caught)
        if first:
            with suppress(OSError):
                _report(report, f"{type(error).__name__} {error}")
        if not isinstance(error, SluiceError):
            log.critical("the mover failed", exc_info=caught)
        elif not first:
            log.error("the mover can't go on: %s", error)
        return 1


async def _wait_for_the_end(supervisor: int, workers: WorkerConnections) -> None:
    """Return on SIGTERM, or when supervisor and workers are gone: then nobody would end us."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        while True:
            with trio.move_on_after(_ORPHAN_CHECK_S):
                async for _ in signals:
                    return
            if os.getppid() != supervisor and workers.count == 0:
                log.warning("the supervisor is gone and so are the workers: the mover ends")
                return


def _report(report: int, text: str) -> None:
    os.write(report, text.encode())
    os.close(report)


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return error
