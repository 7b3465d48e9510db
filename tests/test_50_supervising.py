"""Who is started again, and when: the supervisor's decisions, without processes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from cache.counters import Counters
from cache.opens import OpenTable
from fusefs import channel

channel.load()  # Before pyfuse3 is imported, for tests of the channel in this process.

from fusefs import supervisor  # noqa: E402
from fusefs.supervisor import Child, Mount  # noqa: E402


@dataclass
class Supervised:
    """A mount of three workers, a mover and a notifier. *did*: what was done, in order."""

    mount: Mount
    did: list[str] = field(default_factory=list)

    def child(self, name: str) -> Child:
        return next(child for child in self.mount.children if child.name == name)

    def receives(self, *names: str) -> None:
        for name in names:
            self.mount.shared.counters.row(self.child(name).row).set("receives", 1)

    def dies(self, *names: str, code: int = -9) -> None:
        for name in names:
            child = self.child(name)
            child.pid = 0
            supervisor._note_death(self.mount, child, code)

    def start_due(self) -> list[str]:
        self.did.clear()
        supervisor._start_due(self.mount)
        return list(self.did)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Supervised:
    shared: Any = SimpleNamespace(counters=Counters(4), opens=OpenTable())
    mount = Mount(None, None, [], None, shared, resends=True)  # type: ignore[arg-type]
    names = {"worker 1": 1, "worker 2": 2, "worker 3": 3, "mover": 0, "notifier": 0}
    mount.children = [
        Child(name, row, lambda: None, pid=100 + number)  # type: ignore[arg-type,return-value]
        for number, (name, row) in enumerate(names.items())
    ]
    made = Supervised(mount)

    def start(mount: Mount, child: Child) -> None:
        child.due_s, child.makes_way, child.pid, child.started_s = None, False, 200, time.monotonic()
        if child.row:
            mount.shared.counters.row(child.row).set("receives", 0)
        made.did.append(f"start {child.name}")

    def resend(device: int) -> bool:
        made.did.append(f"resend {shared.opens.resends}")
        return True

    by_pid = {child.pid: child.name for child in mount.children}
    monkeypatch.setattr(supervisor, "_start", start)
    monkeypatch.setattr(supervisor.os, "kill", lambda pid, number: made.did.append(f"kill {by_pid[pid]}"))
    monkeypatch.setattr(supervisor.device, "resend_requests", resend)
    made.receives("worker 1", "worker 2", "worker 3")
    return made


def test_requests_are_sent_again_once_all_workers_are_dead_and_before_one_starts(made: Supervised) -> None:
    made.dies("worker 2")
    assert made.start_due() == ["kill worker 1", "kill worker 3"]
    assert made.start_due() == []
    made.dies("worker 1")
    assert made.start_due() == []
    made.dies("worker 3")
    assert made.start_due() == ["resend 1", "start worker 1", "start worker 2", "start worker 3"]
    assert made.start_due() == []


def test_others_that_die_meanwhile_are_started_again_at_once(made: Supervised) -> None:
    made.dies("worker 1", "mover", "notifier")
    assert made.start_due() == ["kill worker 2", "kill worker 3", "start mover", "start notifier"]


def test_who_dies_before_it_could_receive_is_started_alone(made: Supervised) -> None:
    """It holds nothing: one that can't start takes no healthy one with it."""
    made.dies("worker 1")
    made.start_due()
    made.dies("worker 2", "worker 3")
    made.start_due()
    made.receives("worker 2", "worker 3")
    made.dies("worker 1", code=1)
    made.child("worker 1").due_s = 0.0
    assert made.start_due() == ["start worker 1"]


def test_who_is_to_wait_is_not_started_with_others_and_kills_none_later(made: Supervised) -> None:
    made.dies("worker 1")
    made.child("worker 1").due_s = time.monotonic() + 3600
    made.dies("worker 2")
    assert made.start_due() == ["kill worker 3"]
    made.dies("worker 3")
    assert made.start_due() == ["resend 1", "start worker 2", "start worker 3"]
    made.receives("worker 2", "worker 3")
    made.child("worker 1").due_s = 0.0
    assert made.start_due() == ["start worker 1"]


def test_a_kernel_that_sends_nothing_again_has_healthy_workers_go_on(made: Supervised) -> None:
    made.mount.resends = False
    made.dies("worker 2")
    assert made.start_due() == ["start worker 2"]


def test_a_killed_worker_that_does_not_end_is_told_of_once(
    made: Supervised, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made.dies("worker 1", "worker 3")
    for _ in range(20):
        now[0] += 1
        made.start_due()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "worker 2 (process 101) was killed and does not end: a disk does not answer. The mount waits for it"
    ]


def test_a_worker_or_notifier_that_the_kernel_sent_away_ends_the_mount(made: Supervised) -> None:
    made.dies("notifier", code=0)
    assert made.mount.unmounted
    made.dies("worker 1")
    assert made.start_due() == []


def child_process(ignores: bool, ready: int) -> int:
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if ignores else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.write(ready, b".")
        while True:
            signal.pause()
    return pid


@pytest.mark.parametrize("ignores", [0, 2, 5])
def test_all_children_are_told_to_end_and_those_that_do_not_are_killed(
    monkeypatch: pytest.MonkeyPatch, ignores: int
) -> None:
    monkeypatch.setattr(supervisor, "_SIGNAL_S", 0.3)
    reading, writing = os.pipe()
    children = []
    for number in range(1, 6):
        pid = child_process(number <= ignores, writing)
        children.append(Child(f"worker {number}", number, lambda: None, pid=pid))  # type: ignore[arg-type,return-value]
    pids = [child.pid for child in children]
    for _ in children:
        os.read(reading, 1)
    supervisor._end(children, signal.SIGTERM, patience_s=0)
    assert [child.pid for child in children] == [0] * 5
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    os.close(reading)
    os.close(writing)


def test_what_no_signal_ends_is_told_of_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(supervisor, "_SIGNAL_S", 0.0)
    monkeypatch.setattr(supervisor.os, "kill", lambda pid, number: killed.append((pid, number)))
    monkeypatch.setattr(supervisor.os, "waitpid", lambda pid, options: (0, 0))
    supervisor._end([Child("worker 1", 1, lambda: None, pid=7)], signal.SIGTERM, patience_s=0)  # type: ignore[arg-type,return-value]
    assert killed == [(7, signal.SIGTERM), (7, signal.SIGKILL)]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
