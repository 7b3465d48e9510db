"""Any process of a mount may be killed at any moment: reads go on, and the dead are replaced."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from cache import control, messages
from tests.mount_readers import Readers, readers
from tests.mounting import (
    MIB,
    Folder,
    LiveMount,
    Mounting,
    content,
    detach,
    is_alive,
    kill_each,
    mounts_below,
    processes_naming,
    until,
)

KILLS = 7


def fill(folder: Folder) -> dict[str, bytes]:
    """100 MiB, more than the tiers of these tests hold: so reads always need the mover too."""
    files = {f"small/{i:03d}": content(110_000 + i, seed=3) for i in range(300)}
    files |= {f"large/{i}": content(22 * MIB + i, seed=3) for i in range(3)}
    for key, body in files.items():
        folder.put(key, body)
    return files


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_number_of_workers_serves_the_tree(mounting: Mounting, folder: Folder, workers: int) -> None:
    folder.put("a/small", content(5000))
    folder.put("large", content(10 * MIB))
    mount = mounting.mount(folder.url, f"--workers={workers}", "--dram=64M")
    assert mount.read("a/small") == content(5000)
    assert mount.read("large") == content(10 * MIB)
    until(lambda: len(set(mount.status()["processes"]["workers"])) >= max(1, workers), "all are there")
    processes = mount.status()["processes"]
    if workers == 0:
        assert set(processes_naming(mount.home)) == {processes["supervisor"]}
        assert processes["mover"] == processes["supervisor"]
    else:
        assert len(set(processes["workers"])) == workers
        others = {processes["supervisor"], processes["mover"], processes["notifier"]}
        everyone = others.union(processes["workers"])
        assert set(processes_naming(mount.home)) == everyone
    mount.remount()
    assert mount.read_anew("large") == content(10 * MIB)
    assert mount.requests()["get"] == 0


@pytest.mark.parametrize("workers", [0, 3])
def test_several_readers_at_once_read_right(mounting: Mounting, folder: Folder, workers: int) -> None:
    fill(folder)
    mount = mounting.mount(folder.url, f"--workers={workers}", size="64M")
    with readers(mount.directory, folder.path, seed=11) as running:
        until(lambda: mount.reads()["requests"]["reads"] > 300, "300 reads")
        assert running.finish() > 0


def run_by(mount: LiveMount, changed: str) -> None:
    """Have the mount run by a `sluice` that executes *changed* first."""
    script = mount.home / "bin" / "sluice"
    script.parent.mkdir()
    script.write_text(f"import sys\n{changed}\nfrom tools.cli import main\nsys.exit(main())\n")
    mount.program = [sys.executable, str(script)]


def without_channel(mount: LiveMount) -> None:
    """Have the mount run by a `sluice` for which the extension was not built."""
    run_by(mount, "sys.modules['fusefs._channel'] = None")


def test_without_the_channel_extension_one_worker_serves_and_says_so(
    mounting: Mounting, folder: Folder
) -> None:
    folder.put("file", b"content")
    mount = mounting.prepare(folder.url, "--workers=3")
    without_channel(mount)
    mount.mount()
    status = mount.status()
    assert len(status["processes"]["workers"]) == 1
    assert status["features"]["several_workers"]["on"] is False
    assert "channel extension" in status["features"]["several_workers"]["reason"]
    assert "one worker instead of 3" in mount.log()
    assert mount.read("file") == b"content"
    kill_each(mount.pids()["workers"])
    assert mount.read_anew("file") == b"content"


# The first worker receives a request, which it never answers.
_SILENT_WORKER = """
import os, pathlib, select, time
from fusefs import supervisor
received, answering = pathlib.Path({received!r}), supervisor._become_worker

def worker(mount, operations, row):
    if received.exists():
        answering(mount, operations, row)
    mount.shared.counters.row(row).set("receives", 1)
    select.select([mount.device], [], [])
    os.read(mount.device, 1 << 21)
    received.touch()
    {then}

supervisor._become_worker = worker
"""


def test_all_may_be_killed_while_the_mount_has_not_answered_yet(mounting: Mounting, folder: Folder) -> None:
    """Nobody may wait for an answer who holds the device: the kernel would wait for him in turn."""
    folder.put("file", b"content")
    mount = mounting.prepare(folder.url, "--workers=1")
    received = mount.home / "received"
    run_by(mount, _SILENT_WORKER.format(received=str(received), then="time.sleep(3600)"))
    mount.directory.mkdir()
    command = [*mount.program, "mount", folder.url, str(mount.directory), *mount._options]
    with subprocess.Popen(command, env=mount._environment, stderr=subprocess.PIPE) as starting:
        until(received.exists, "a worker has received the first request")
        mount.kill_all()
        starting.communicate()
    detach(mount.directory)
    mount.mount()  # The cache is free again.
    assert mount.read("file") == b"content"


def test_a_worker_that_dies_with_the_first_request_is_replaced(mounting: Mounting, folder: Folder) -> None:
    folder.put("file", b"content")
    mount = mounting.prepare(folder.url, "--workers=1")
    received = mount.home / "received"
    run_by(mount, _SILENT_WORKER.format(received=str(received), then="os._exit(1)"))
    mount.mount()
    assert received.exists()
    assert mount.read("file") == b"content"


def kill_at_random(mount: LiveMount, running: Readers, seed: int, roles: tuple[str, ...]) -> set[int]:
    """Kill a process of one of *roles* KILLS times; each time wait for its successor and go on a little."""
    roll, killed = random.Random(seed), set()
    for _ in range(KILLS):
        running.check_alive()
        pids = until(lambda: known_pids(mount), "the mount tells its processes")
        victim = roll.choice([pid for role in roles for pid in pids[role]])
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)
        until(lambda victim=victim: not is_alive(victim), f"{victim} is dead")  # type: ignore[misc]
        time.sleep(roll.random() * 0.6)  # Where in the reads the next one strikes is the seed's choice.
    return killed


def known_pids(mount: LiveMount) -> dict[str, list[int]]:
    """Return the processes by role once all that status tells are alive; {} before."""
    try:
        pids = mount.pids()
    except Exception:  # Between two movers nobody answers.
        return {}
    return pids if all(is_alive(pid) for role in pids.values() for pid in role) else {}


@pytest.mark.parametrize(
    ("roles", "seed"), [(("workers",), 21), (("mover",), 22), (("workers", "mover"), 23)], ids=str
)
def test_killing_workers_and_mover_in_the_middle_of_reads_fails_no_read(
    mounting: Mounting, folder: Folder, roles: tuple[str, ...], seed: int
) -> None:
    fill(folder)
    mount = mounting.mount(folder.url, "--dram=64M", size="64M")
    with readers(mount.directory, folder.path, seed) as running:
        killed = kill_at_random(mount, running, seed, roles)
        assert running.finish() > KILLS
    pids = until(lambda: known_pids(mount), "all processes are there again")
    assert len(killed) == KILLS
    assert not killed & {pid for role in pids.values() for pid in role}
    assert len(pids["workers"]) == 2
    assert "Traceback" not in mount.log()
    assert mount.log().count("it is replaced") == KILLS, mount.log()


# Workers hold their first truncation until they may go on.
_HELD_TRUNCATION = """
import os, pathlib, trio
from fusefs import supervisor
from fusefs.writing import Writing
armed, held, go = (pathlib.Path({home!r}) / name for name in ("armed", "held", "go"))
at_once = Writing._cut

async def cut(self, inode, length):
    try:
        armed.rename(held)
    except FileNotFoundError:
        pass
    else:
        held.write_text(str(os.getpid()))
        while not go.exists():
            await trio.sleep(0.01)
    await at_once(self, inode, length)

Writing._cut = cut
"""


def test_what_a_worker_holds_when_another_dies_is_not_done_late(mounting: Mounting, folder: Folder) -> None:
    """The kernel sends it again: the first copy would empty what was written and synced since."""
    mount = mounting.prepare(folder.url, "-o", "rw", "--workers=3")
    run_by(mount, _HELD_TRUNCATION.format(home=str(mount.home)))
    mount.mount()
    path = mount.directory / "file"
    path.write_bytes(b"old")
    (mount.home / "armed").touch()
    with subprocess.Popen([sys.executable, "-c", f"import os; os.truncate({str(path)!r}, 0)"]) as truncating:
        holder = int(
            until(lambda: (mount.home / "held").exists() and (mount.home / "held").read_text(), "held")
        )
        others = [pid for pid in mount.pids()["workers"] if pid != holder]
        assert len(others) == 2
        kill_each(others[:1])
        assert truncating.wait(60) == 0, "another worker has answered"
    with open(path, "r+b") as file:
        file.write(b"new and synced")
        file.flush()
        os.fsync(file.fileno())
    (mount.home / "go").touch()
    time.sleep(0.2)  # He would go on within 0.01 s.
    assert mount.read_anew("file") == b"new and synced"
    assert not is_alive(holder), "who holds a copy is replaced before the kernel sends another"


# A worker holds the first LOOKUP of the name "slow" until it is killed.
_HELD_LOOKUP = """
import os, pathlib, trio
from fusefs import supervisor
from fusefs.namespace import Namespace
held, at_once, lookup = pathlib.Path({home!r}) / "held", Namespace.lookup_nowait, Namespace.lookup

async def slow(self, parent, name):
    if name == b"slow" and not held.exists():
        held.write_text(str(os.getpid()))
        await trio.sleep_forever()
    return await lookup(self, parent, name)

Namespace.lookup_nowait = lambda self, parent, name: None if name == b"slow" else at_once(self, parent, name)
Namespace.lookup = slow
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_who_waits_for_a_directorys_lock_to_tell_the_kernel_keeps_nobody_from_starting(
    mounting: Mounting, folder: Folder, workers: int
) -> None:
    """It waits for a LOOKUP that a worker holds, and no signal ends that: that worker is to be replaced."""
    for name in ("d/stays", "d/changes"):
        folder.put(name, b"old")
    mount = mounting.prepare(folder.url, "-o", "rw", f"--workers={workers}", "--ttl=0.5")
    run_by(mount, _HELD_LOOKUP.format(home=str(mount.home)))
    mount.mount()
    assert mount.read("d/changes") == b"old"
    slow = mount.directory / "d" / "slow"
    look = [sys.executable, "-c", f"import os; os.path.exists({str(slow)!r})"]
    held = mount.home / "held"
    with subprocess.Popen(look) as looking, ExitStack() as listing:
        holder = int(until(lambda: held.exists() and held.read_text(), "a worker holds the LOOKUP"))
        folder.put("d/changes", b"new")
        notifier = mount.pids()["notifier"][0]
        time.sleep(0.6)  # Past the ttl.
        listing.enter_context(subprocess.Popen(["ls", mount.directory / "d"], stdout=subprocess.DEVNULL))
        until(lambda: state_of(notifier) == "D", "the notifier waits for the directory")
        victims = [pid for pid in mount.pids()["workers"] if pid != holder] or [holder]
        os.kill(victims[0], signal.SIGKILL)
        assert looking.wait(30) == 0, "another worker has answered"
    until(lambda: state_of(notifier) == "S", "the notifier has gone on")
    assert mount.read_anew("d/changes") == b"new"
    kill_each([notifier])
    until(lambda: known_pids(mount).get("notifier", [notifier]) != [notifier], "it is replaced")


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_after_the_death_of_all_processes_the_next_mount_uses_the_cache(
    mounting: Mounting, folder: Folder
) -> None:
    files = fill(folder)
    mount = mounting.mount(folder.url, "--dram=64M")
    wanted = [name for name in files if name.startswith("large/0") or "/00" in name]
    for name in wanted:
        mount.read(name)
    mount.kill_all()
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        os.statvfs(mount.directory)
    mount.unmount()
    mount.mount()
    for name in wanted:
        assert mount.read(name) == files[name], name
    assert mount.requests()["get"] == 0
    assert mount.requests()["list"] == 0


def test_after_death_in_the_middle_of_reads_all_bytes_are_right(mounting: Mounting, folder: Folder) -> None:
    fill(folder)
    mount = mounting.mount(folder.url, "--dram=64M", size="64M")
    for round_number in range(2):
        running = Readers(mount.directory, folder.path, seed=31 + round_number)
        try:
            before = mount.reads()["requests"]["reads"]
            until(lambda: mount.reads()["requests"]["reads"] > before + 150, "150 reads")  # noqa: B023
        finally:
            mount.kill_all()
            running.kill()
        mount.unmount()
        mount.mount()
    with readers(mount.directory, folder.path, seed=39) as checked:
        until(lambda: mount.reads()["requests"]["reads"] > 300, "300 reads")
        checked.finish()
    assert mount.reads()["corrupt_blocks"] == 0


def test_without_the_supervisor_reads_go_on_and_umount_ends_everything(
    mounting: Mounting, folder: Folder
) -> None:
    files = fill(folder)
    mount = mounting.mount(folder.url, "--dram=64M")
    assert mount.read("large/0") == files["large/0"]
    kill_each([mount.supervisor])
    assert mount.read_anew("large/0") == files["large/0"]
    assert mount.read("large/1") == files["large/1"]
    mount.unmount()
    assert processes_naming(mount.home) == []
    mount.mount()
    assert mount.read_anew("large/1") == files["large/1"]
    assert mount.reads()["bytes_by_source"]["lake"] == 0  # The next shard may be fetched ahead by now.
    mount.unmount()
    assert mounts_below(mount.home) == []


def test_a_worker_that_dies_with_unread_answers_leaves_the_mover_alone(
    mounting: Mounting, folder: Folder
) -> None:
    """The socket of such a worker is reset, not closed (unix(7)), which the mover must outlive too."""
    folder.put("file", b"content")
    mount = mounting.mount(folder.url)
    pids = mount.pids()
    question = messages.frame(messages.Asked(1, messages.Lookup(1, b"file")))
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as worker:
            worker.connect(str(control.socket_path(mount.directory).with_suffix(".worker")))
            worker.sendall(question * 3)
            assert worker.recv(1, socket.MSG_PEEK)
    with socket.socket(socket.AF_UNIX) as worker:
        worker.connect(str(control.socket_path(mount.directory).with_suffix(".worker")))
        worker.sendall(b"\x03\0\0\0???")
        assert worker.recv(1) == b"", "what is no message ends the connection"
    assert mount.read("file") == b"content"
    assert mount.pids() == pids
    assert "the mover failed" not in mount.log()
