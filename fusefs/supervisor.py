"""The supervisor: mounts, performs the INIT handshake once, forks the others and replaces the dead.

It holds the listening sockets and the device, so a worker or a mover that dies takes nothing with
it. It runs no event loop and no thread of its own, so forking is safe at any time.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from fusefs import channel

NO_CHANNEL = channel.load()  # Before pyfuse3 is imported, which binds to it.

import pyfuse3  # noqa: E402
import trio  # noqa: E402

from cache import errors  # noqa: E402
from cache.config import MountConfig  # noqa: E402
from cache.counters import ShownDirectories  # noqa: E402
from cache.errors import SluiceError  # noqa: E402
from cache.mover import TierPlan  # noqa: E402
from cache.server import Listeners  # noqa: E402
from cache.store import CacheStore, note_owner, open_store  # noqa: E402
from cache.tier import TierFiles  # noqa: E402
from fusefs import device, mover_process, notifier, passthrough, single, tiers  # noqa: E402
from fusefs.control_operations import ControlOperations  # noqa: E402
from fusefs.shared import Shared  # noqa: E402
from fusefs.worker import run_worker, shake_hands  # noqa: E402

log = logging.getLogger(__name__)

READ_AHEAD_KIB = 1024
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_SIGNALS = {signal.SIGCHLD, *_STOP_SIGNALS}
_RESTART_S_MAX = 5.0
_LIVED_LONG_S = 10.0
_END_S_MAX = 5.0  # A killed process takes far less.
_SIGNAL_S = 2.0  # So long a process may take to end that was told to.


@dataclass
class Child:
    """A process to keep alive. *row*: its row of counters. *failures*: deaths soon after a start."""

    name: str
    row: int
    start: Callable[[], NoReturn]
    pid: int = 0
    started_s: float = 0.0
    failures: int = 0
    due_s: float | None = None  # When it is to be started again.
    makes_way: bool = False  # We killed it.
    held: bool = False  # It died, and may have held requests that were not sent again since.

    @property
    def is_worker(self) -> bool:
        return self.row > 0


@dataclass
class Mount:
    """What the supervisor holds for one mount, in the order in which it was acquired."""

    config: MountConfig
    store: CacheStore
    plans: list[TierPlan]
    listeners: Listeners
    shared: Shared
    sample: tuple[int, int] = (0, 0)  # Objects of the lake and their bytes.
    device: int = -1
    in_thread: bool = False  # How workers receive: see receiver.c.
    resends: bool = False  # The kernel sends unanswered requests again when it is told to.
    children: list[Child] = field(default_factory=list)
    unmounted: bool = False
    waited_since_s: float | None = None  # For workers that were killed to end; infinity once it was told.

    def waits_for(self, child: Child) -> None:
        """Tell the operator of a killed worker that does not end: nobody answers the mount meanwhile."""
        self.waited_since_s = self.waited_since_s or time.monotonic()
        if time.monotonic() - self.waited_since_s > _END_S_MAX:
            self.waited_since_s = math.inf
            log.error(
                "%s (process %d) was killed and does not end: a disk does not answer. The mount waits for it",
                child.name,
                child.pid,
            )


def supervise(config: MountConfig, announce: Callable[[], None]) -> int:
    """Serve the mount until it is unmounted or SIGTERM; return the exit status.

    Calls *announce* once the mount answers. Raises SluiceError when it can't be started, with
    nothing mounted and no process left.
    """
    if config.workers > 1 and NO_CHANNEL is not None:
        log.warning("one worker instead of %d: %s", config.workers, NO_CHANNEL)
    store = open_store(config)
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        note_owner(store, f"mounted on {config.mountpoint} by process {os.getpid()}")
        shared = Shared.make(config)
        plans = tiers.lay_out(config, store, shared.features)
        with mover_process.listening(config) as listeners:
            if config.workers == 0:
                return single.run(config, plans, shared, listeners, store, announce)
            mount = Mount(config, store, plans, listeners, shared)
            return _run(mount, announce)
    finally:
        tiers.take_down(config, store)
        store.release()
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _run(mount: Mount, announce: Callable[[], None]) -> int:
    _note_features(mount)
    mover = Child("mover", 0, lambda: _become_mover(mount, first=False, report=-1))
    try:
        mover.pid = _start_first_mover(mount)
        mover.started_s = time.monotonic()
        mount.store.note_lake_answered()
        operations = _mount_and_shake_hands(mount)
        workers = 1 if NO_CHANNEL is not None else max(1, mount.config.workers)
        mount.children = [
            Child(f"worker {number}", number, lambda row=number: _become_worker(mount, operations, row))  # type: ignore[misc]
            for number in range(1, workers + 1)
        ]
        for child in mount.children:
            _start(mount, child)
        supervisor = os.getpid()
        mount.children += [mover, Child("notifier", 0, lambda: _become_notifier(mount, supervisor))]
        _start(mount, mount.children[-1])
        _watch(mount, announce)
    finally:
        status = _stop(mount, mover)
    return status


def _note_features(mount: Mount) -> None:
    mount.shared.features["several_workers"] = {
        "on": NO_CHANNEL is None and mount.config.workers > 1,
        "reason": NO_CHANNEL or f"--workers {mount.config.workers}",
    }
    mount.shared.features["kernel_read_ahead"] = {
        "on": os.geteuid() == 0,
        "reason": f"{READ_AHEAD_KIB} KiB" if os.geteuid() == 0 else "128 KiB: more needs root",
    }


def _start_first_mover(mount: Mount) -> int:
    """Fork the mover and wait until it has looked at the lake. Raises what it raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _become_mover(mount, first=True, report=writing)
    os.close(writing)
    try:
        line = _await_report(reading)
    except BaseException:
        os.kill(pid, signal.SIGKILL)  # It may wait for the lake for long, and holds nothing yet.
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(reading)
    if line.startswith("ready "):
        objects, size_bytes = line.split()[1:]
        mount.sample = int(objects), int(size_bytes)
        return pid
    os.waitpid(pid, 0)
    name, _, text = line.partition(" ")
    kind = getattr(errors, name, SluiceError) if name else SluiceError
    raise kind(text or "the mover died while it started; see the log")


def _await_report(reading: int) -> str:
    """Return all that comes through the pipe. Raises SluiceError when we are told to stop."""
    received = b""
    while True:
        if select.select([reading], [], [], 0.1)[0]:
            piece = os.read(reading, 4096)
            if not piece:
                return received.decode(errors="replace")
            received += piece
        elif signal.sigtimedwait(_STOP_SIGNALS, 0) is not None:
            raise SluiceError("interrupted before the lake had answered")


def _become_mover(mount: Mount, *, first: bool, report: int) -> NoReturn:
    """Be the mover from here on, in a forked child."""
    if mount.device >= 0:
        os.close(mount.device)  # A mount whose device is open anywhere does not end.
    _forget_signals()
    status = mover_process.run(
        mount.config, mount.plans, mount.shared, mount.listeners, first=first, report=report
    )
    logging.shutdown()
    os._exit(status)


def _become_worker(mount: Mount, operations: ControlOperations, row: int) -> NoReturn:
    """Be a worker from here on, in a forked child. Ends with 0 when the mount is gone."""
    _forget_signals()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    status = 1
    try:
        files = [TierFiles(plan.name, plan.path, is_memory=plan.is_memory) for plan in mount.plans]
        path = mover_process.worker_socket_path(mount.config)
        answer = partial(run_worker, in_thread=mount.in_thread)
        trio.run(answer, operations, mount.config, files, str(path), mount.shared, row)
        status = 0
    except BaseException:
        log.exception("worker %d ends", row)
    logging.shutdown()
    os._exit(status)


def _become_notifier(mount: Mount, supervisor: int) -> NoReturn:
    """Be the notifier from here on, in a forked child. It may outlive the mount, but not hold the cache."""
    mount.store.release()
    for listening in (mount.listeners.workers, mount.listeners.control):
        listening.close()
    _forget_signals()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    mount.shared.counters.row(0).set("notifier_pid", os.getpid())
    status = 1
    try:
        notifier.run(mount.device, mover_process.worker_socket_path(mount.config), supervisor)
        status = 0
    except BaseException:
        log.exception("the notifier ends")
    logging.shutdown()
    os._exit(status)


def _forget_signals() -> None:
    """Undo the supervisor's mask. Ctrl-C in a terminal goes to all; the supervisor acts on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _mount_and_shake_hands(mount: Mount) -> ControlOperations:
    config = mount.config
    source = config.lake.url
    mount.device = device.mount_device(
        source, config.mountpoint, read_only=config.read_only, allow_other=config.allow_other
    )
    handshake = trio.Event()
    operations = ControlOperations(config, lambda: handshake.set())
    passthrough.want(config)
    pyfuse3.init(operations, f"/dev/fd/{mount.device}", set())
    operations.counters = mount.shared.counters.row(0)
    operations.shown = ShownDirectories() if NO_CHANNEL is None else None
    trio.run(shake_hands, handshake)
    paths = [plan.path for plan in mount.plans]
    failure = passthrough.failure(config, mount.device, paths)
    mount.shared.features.update(passthrough.choose(config, NO_CHANNEL, failure, mount.sample))
    operations.take_features(mount.shared, mount.device)
    # Who polls the device is woken for each request of all workers, who waits in read(2) for his own.
    mount.in_thread = config.workers > 1 and channel.can_receive_in_thread()
    mount.resends = device.resend_requests(mount.device)  # There are none yet.
    os.set_blocking(mount.device, mount.in_thread or NO_CHANNEL is not None)
    return operations


def _start(mount: Mount, child: Child) -> None:
    child.due_s, child.started_s, child.makes_way = None, time.monotonic(), False
    if child.row:
        mount.shared.counters.row(child.row).set("receives", 0)
    child.pid = os.fork()
    if child.pid == 0:
        child.start()
    if child.row:  # So that `status` names every worker from the start.
        mount.shared.counters.row(child.row).set("pid", child.pid)


def _ask(mount: Mount) -> int:
    """Send the mount its first request, from a child; return its pid. It ends with 0 or an errno.

    Who holds the device must not ask: were all killed when a worker had received the request, he would
    wait for the answer, SIGKILL or not, and the kernel for him to close the device.
    """
    pid = os.fork()
    if pid:
        return pid
    os.close(mount.device)
    status = 0
    try:
        os.statvfs(mount.config.mountpoint)
    except OSError as error:
        status = error.errno or errno.EIO
    os._exit(status)


def _check_answer(mount: Mount, code: int) -> None:
    if code:
        how = os.strerror(code) if code > 0 else f"who asked it was killed by signal {-code}"
        raise SluiceError(f"{mount.config.mountpoint}: the mount does not answer: {how}")


def _watch(mount: Mount, announce: Callable[[], None]) -> None:
    """Replace what dies, until the mount is gone or somebody wants us to stop.

    Calls *announce* once the mount answers; raises SluiceError if it fails to.
    """
    asking = _ask(mount)
    if failure := device.set_read_ahead(mount.config.mountpoint, READ_AHEAD_KIB):
        log.info("the kernel reads ahead 128 KiB only: %s", failure)
    while not mount.unmounted:
        due_s = min((child.due_s for child in mount.children if child.due_s is not None), default=None)
        wait_s = 3600.0 if due_s is None else max(0.01, due_s - time.monotonic())
        received = signal.sigtimedwait(_SIGNALS, wait_s)
        if received is not None and received.si_signo in _STOP_SIGNALS:
            log.info("signal %d: unmounting", received.si_signo)
            return
        ended = _reap(mount)
        if asking in ended:
            _check_answer(mount, ended[asking])
            asking = 0  # A worker may come to have its number.
            announce()
        _start_due(mount)


def _start_due(mount: Mount) -> None:
    """Start what is to be started again by now."""
    now_s = time.monotonic()
    due = [child for child in mount.children if child.due_s is not None and child.due_s <= now_s]
    if mount.unmounted or not due:
        return
    if mount.resends and any(child.held for child in due) and not _have_sent_again(mount):
        due = [child for child in due if not child.is_worker]
    for child in due:
        _start(mount, child)


def _have_sent_again(mount: Mount) -> bool:
    """Have the kernel send again what dead workers held; return False while somebody may hold a copy.

    The kernel sends again all that is unanswered, also what healthy workers hold. Were these to go on, they
    would carry out late what another one has answered by then: a truncation, or a write, of a file that was
    written to and synced since. So they are killed first: who is dead and reaped does nothing late. For the
    same reason none starts before the kernel was told: it would hold new requests by then.
    """
    workers = [child for child in mount.children if child.is_worker]
    alive = [child for child in workers if child.pid]
    for child in alive:
        if not child.makes_way:
            child.makes_way = True
            os.kill(child.pid, signal.SIGKILL)
    if alive:
        mount.waits_for(alive[0])
        return False
    mount.waited_since_s = None
    mount.shared.opens.note_resend()
    device.resend_requests(mount.device)
    for child in workers:
        child.held = False
    return True


def _reap(mount: Mount) -> dict[int, int]:
    """Note which processes have ended; return the exit code of each by its pid, negative for a signal."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)
        for child in mount.children:
            if child.pid == pid:
                child.pid = 0
                _note_death(mount, child, ended[pid])


def _note_death(mount: Mount, child: Child, code: int) -> None:
    if code == 0 and child.name != "mover":
        mount.unmounted = True  # The kernel told it so.
        return
    now_s = time.monotonic()
    child.held = child.is_worker and bool(mount.shared.counters.row(child.row).get("receives"))
    if child.makes_way:
        child.due_s = now_s
        return
    child.failures = 0 if now_s - child.started_s > _LIVED_LONG_S else child.failures + 1
    wait_s = min(_RESTART_S_MAX, 0.05 * 2 ** max(0, child.failures - 2)) if child.failures > 1 else 0.0
    child.due_s = now_s + wait_s
    how = f"signal {-code}" if code < 0 else f"status {code}"
    log.warning(
        "%s ended with %s; it is replaced%s", child.name, how, f" in {wait_s:.1f} s" if wait_s else ""
    )


def _stop(mount: Mount, mover: Child) -> int:
    """Unmount, end all children, and mark the cache clean if the mover ended well."""
    if mount.device >= 0:
        if not mount.unmounted:
            mount.unmounted = _unmount(mount)
        os.close(mount.device)
    others = [child for child in mount.children if child.pid and child is not mover]
    _end([child for child in others if not child.is_worker], signal.SIGKILL, patience_s=0)
    _end([child for child in others if child.is_worker], signal.SIGTERM, 10 if mount.unmounted else 0)
    if not mover.pid:
        return 1
    with suppress(ProcessLookupError):
        os.kill(mover.pid, signal.SIGTERM)
    _, status = os.waitpid(mover.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        log.error("the mover ended with status %d", os.waitstatus_to_exitcode(status))
        return 1
    try:
        mount.store.mark_clean()
    except (SluiceError, OSError) as error:
        log.warning("the cache can't be marked clean (%s); it is checked at the next mount", error)
    return 0


def _unmount(mount: Mount) -> bool:
    """Unmount; return False where files are open, which the end of the workers cuts off then."""
    try:
        device.unmount(mount.config.mountpoint)
        return True
    except OSError as error:
        log.warning("%s: %s; detached, open files are cut off", mount.config.mountpoint, error.strerror)
        device.cut_off(mount.config.mountpoint)
        return False


def _end(children: list[Child], with_signal: int, patience_s: float) -> None:
    """Wait for children to end by themselves; signal those that take longer. Leaves what no signal ends."""
    for number, wait_s in ((with_signal, patience_s), (signal.SIGKILL, _SIGNAL_S), (None, _SIGNAL_S)):
        _await_ends(children, wait_s)
        for child in children:
            if child.pid and number is not None:
                os.kill(child.pid, number)
            elif child.pid:
                log.error("%s (process %d) does not end: a disk does not answer", child.name, child.pid)


def _await_ends(children: list[Child], wait_s: float) -> None:
    """Return once all have ended, or *wait_s* have passed."""
    deadline_s = time.monotonic() + wait_s
    while True:
        for child in children:
            if child.pid and os.waitpid(child.pid, os.WNOHANG)[0]:
                child.pid = 0
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not any(child.pid for child in children):
            return
        signal.sigtimedwait({signal.SIGCHLD}, min(left_s, 0.05))
