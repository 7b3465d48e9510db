"""Mounting and unmounting as people and machines do it: fstab, systemd, signals, umount(8)."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cache import control
from tests.memory_s3 import MemoryS3
from tests.mounting import (
    Folder,
    LiveMount,
    Mounting,
    content,
    is_alive,
    mounts_below,
    processes_naming,
    sluice,
    until,
)
from tools.mounted import MountFailed, sluice_command

OPTIONS = ("--dram=0", "--keep-free=0", "--workers=2")


def ended(mount: LiveMount, within_s: float = 20) -> None:
    until(lambda: not processes_naming(mount.home), "its processes have ended", within_s)
    assert mounts_below(mount.home) == []


@pytest.fixture
def mount(mounting: Mounting, folder: Folder) -> LiveMount:
    folder.put("d/file", content(200_000))
    return mounting.mount(folder.url, "--dram=64M")


# --- mount(8) and /etc/fstab -------------------------------------------------------------------


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def installed() -> Iterator[None]:
    """`sluice` where mount(8) looks for it: it sets a PATH of its own for /sbin/mount.fuse3."""
    link = Path("/usr/local/bin/sluice")
    with open("/run/lock/sluice-tests", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Other test processes make and remove the same link.
        if link.exists():
            yield
            return
        link.unlink(missing_ok=True)
        link.symlink_to(sluice_command())
        try:
            yield
        finally:
            link.unlink()


def test_an_fstab_line_mounts_and_umount_8_unmounts(
    mounting: Mounting, tmp_path: Path, installed: None
) -> None:
    """With a space in the lake's name, and the options as fstab(5) writes them."""
    lake = Folder(tmp_path / "my lake")
    lake.put("d/file", b"content")
    mount = mounting.prepare(lake.url)
    mount.directory.mkdir()
    fstab = tmp_path / "fstab"
    where = [lake.url.replace(" ", "\\040"), mount.directory, "fuse.sluice"]
    words = f"ro,nofail,noauto,_netdev,cache={mount.cache}:64M,dram=0,keep_free=0,workers=2,ttl=7,allow_other"
    fstab.write_text(f"{where[0]} {where[1]} {where[2]} {words} 0 0\n")
    done = run("mount", "-T", fstab, mount.directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert mount.read("d/file") == b"content"
    status = mount.status()
    assert (status["ttl_s"], status["lake"], len(status["processes"]["workers"])) == (7.0, lake.url, 2)
    assert f" {mount.directory} fuse.sluice ro," in Path("/proc/self/mounts").read_text()
    assert run("umount", mount.directory).returncode == 0
    ended(mount)


def test_a_wrong_fstab_line_fails_with_its_reason(
    mounting: Mounting, folder: Folder, installed: None
) -> None:
    mount = mounting.prepare(folder.url)
    mount.directory.mkdir()
    words = f"cache={mount.cache},wrokers=2"
    done = run("mount", "-t", "fuse.sluice", folder.url, mount.directory, "-o", words)
    assert done.returncode != 0
    assert "wrokers" in done.stderr and "workers" in done.stderr
    assert mounts_below(mount.home) == []


# --- systemd and the foreground ----------------------------------------------------------------


@contextmanager
def foreground(
    mount: LiveMount, lake: str, *options: str, notify: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """Run `sluice mount --foreground`; killed at the end if it still runs."""
    mount.directory.mkdir(exist_ok=True)
    words = ["mount", lake, str(mount.directory), f"--cache={mount.cache}:64M", "--foreground"]
    process = subprocess.Popen(
        [sluice_command(), *words, *OPTIONS, *options],
        env={**os.environ, "NOTIFY_SOCKET": notify},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_systemd_is_told_when_the_mount_answers_and_when_it_ends(
    mounting: Mounting, folder: Folder, tmp_path: Path, workers: str
) -> None:
    folder.put("file", b"content")
    mount = mounting.prepare(folder.url)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(20)
        with foreground(
            mount, folder.url, f"--workers={workers}", notify=str(tmp_path / "notify")
        ) as process:
            assert systemd.recv(4096).decode().startswith("READY=1\nSTATUS=mounted ")
            assert mount.read("file") == b"content"
            process.send_signal(signal.SIGTERM)
            assert systemd.recv(4096) == b"STOPPING=1"
            out, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert out.startswith(f"mounted {folder.url} on {mount.directory}")
    ended(mount)


def test_ctrl_c_in_a_terminal_unmounts(mounting: Mounting, folder: Folder) -> None:
    """A terminal sends SIGINT to all processes of the mount at once."""
    folder.put("file", b"content")
    mount = mounting.prepare(folder.url)
    with foreground(mount, folder.url) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("mounted ")
        assert mount.read("file") == b"content"
        os.killpg(process.pid, signal.SIGINT)
        process.wait(20)
        assert process.returncode == 0
    ended(mount)
    assert (mount.cache / "clean").exists()


# --- The daemon --------------------------------------------------------------------------------


def test_mount_returns_only_when_the_mount_answers(mounting: Mounting, memory_s3: MemoryS3) -> None:
    memory_s3.put("file", b"content")
    memory_s3.latency_s = 0.5
    mount = mounting.mount(memory_s3.url, *memory_s3.options)
    assert os.path.ismount(mount.directory)
    assert mount.read("file") == b"content"
    assert len(mount.pids()["workers"]) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_after_a_mistyped_lake_the_same_cache_directory_serves_the_right_one(
    mounting: Mounting, memory_s3: MemoryS3, workers: int
) -> None:
    memory_s3.put("file", b"content")
    options = (f"--endpoint-url={memory_s3.endpoint_url}", "--retry=0.2", f"--workers={workers}")
    with pytest.raises(MountFailed, match="no such bucket"):
        mounting.mount(f"{memory_s3.url}-mistyped", *options, name="m")
    mount = mounting.mount(memory_s3.url, *options, name="m")
    assert mount.read("file") == b"content"
    mount.unmount()
    with pytest.raises(MountFailed, match="holds the cache of"):
        mounting.mount(f"{memory_s3.url}-mistyped", *options, name="m")


def test_the_daemon_has_let_go_of_terminal_and_directory(mount: LiveMount) -> None:
    for role in mount.pids().values():
        for pid in role:
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {os.devnull}
            assert os.getsid(pid) == mount.supervisor


def test_the_log_says_when_something_was_amiss_and_with_what(mounting: Mounting, folder: Folder) -> None:
    folder.put("file", b"content")
    log = mounting.home / "sluice.log"
    mount = mounting.mount(folder.url, f"--log-file={log}")
    victim = mount.pids()["workers"][0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: "signal 9; it is replaced" in log.read_text(), "the log tells of the death")
    for line in log.read_text().splitlines():
        stamp, level, pid = line.split()[:3]
        assert stamp[:2] == "20" and stamp[10] == "T"
        assert level in ("INFO", "WARNING") and pid.isdecimal()
    assert not (mount.cache / "log").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_sigterm_unmounts_and_keeps_the_cache(mounting: Mounting, folder: Folder, workers: str) -> None:
    folder.put("file", content(100_000))
    mount = mounting.mount(folder.url, f"--workers={workers}", "--dram=64M")
    mount.read("file")
    os.kill(mount.supervisor, signal.SIGTERM)
    ended(mount)
    assert (mount.cache / "clean").exists()
    mount.mount()
    assert mount.read("file") == content(100_000)
    assert mount.requests()["get"] == 0


@pytest.mark.parametrize("workers", ["0", "2"])
def test_sigterm_ends_a_mount_that_is_in_use_too(mounting: Mounting, folder: Folder, workers: str) -> None:
    folder.put("file", content(100_000))
    mount = mounting.mount(folder.url, f"--workers={workers}")
    fd = os.open(mount.directory / "file", os.O_RDONLY)
    try:
        assert os.pread(fd, 10, 0) == content(100_000)[:10]
        os.kill(mount.supervisor, signal.SIGTERM)
        ended(mount, within_s=30)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(OSError, match=r"not connected|connection abort"):
            os.pread(fd, 10, 50_000)
    finally:
        with suppress(OSError):  # Closing tells what reading told.
            os.close(fd)
    mount.mount()
    assert mount.read("file") == content(100_000)


# --- umount ------------------------------------------------------------------------------------


def test_umount_of_a_busy_mount_fails_and_names_who_uses_it(mount: LiveMount) -> None:
    sleeper = subprocess.Popen(["sleep", "60"], cwd=mount.directory / "d")
    try:
        done = sluice("umount", mount.directory)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert f"in use by sleep (pid {sleeper.pid})" in done.stderr
        assert mount.read("d/file") == content(200_000)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert sluice("umount", mount.directory).returncode == 0
    ended(mount)


@pytest.mark.parametrize("command", [("umount",), ("fusermount3", "-u")], ids=lambda words: words[0])
def test_any_umount_ends_the_mount_and_keeps_the_cache(mount: LiveMount, command: tuple[str, ...]) -> None:
    mount.read("d/file")
    assert run(*command, mount.directory).returncode == 0
    ended(mount)
    assert (mount.cache / "clean").exists()
    mount.mount()
    assert mount.read("d/file") == content(200_000)
    assert mount.requests()["get"] == 0


def test_a_lazy_umount_ends_the_mount_once_the_last_file_is_closed(mount: LiveMount) -> None:
    supervisor = mount.supervisor
    with (mount.directory / "d/file").open("rb", buffering=0) as file:
        assert run("umount", "-l", mount.directory).returncode == 0
        assert file.read() == content(200_000)
        assert is_alive(supervisor)
    ended(mount)


def test_umount_of_what_is_not_mounted_says_so(mount: LiveMount) -> None:
    inside = sluice("umount", mount.directory / "d")
    assert inside.returncode == 2 and str(mount.directory) in inside.stderr
    mount.unmount()
    again = sluice("umount", mount.directory)
    assert again.returncode == 2 and str(mount.directory) in again.stderr
    assert len(again.stderr.splitlines()) == 1


def test_umount_clears_a_dead_mount_away(mount: LiveMount) -> None:
    mount.kill_all()
    done = sluice("umount", mount.directory)
    assert done.returncode == 0, done.stderr
    assert not os.path.ismount(mount.directory)
    mount.mount()
    assert mount.read("d/file") == content(200_000)


def test_a_dead_mount_is_told_from_a_living_one(mount: LiveMount) -> None:
    mount.kill_all()
    shown = sluice("status", "--json")
    assert shown.returncode == 1
    row = next(row for row in json.loads(shown.stdout) if row["mountpoint"] == str(mount.directory))
    assert "error" in row
    second = sluice("mount", "/", mount.directory, f"--cache={mount.cache}:64M", *OPTIONS)
    assert second.returncode == 2 and "umount" in second.stderr
    began_s = time.monotonic()
    assert sluice("status", mount.directory).returncode != 0
    assert time.monotonic() - began_s < 30


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_kernel_reads_ahead_as_far_as_status_says(mount: LiveMount) -> None:
    number = os.stat(mount.directory).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(number)}:{os.minor(number)}/read_ahead_kb")
    told = mount.status()["features"]["kernel_read_ahead"]
    assert told["on"]
    until(lambda: f"{setting.read_text().strip()} KiB" == told["reason"], "the setting is made")


def test_status_tells_the_stable_keys_of_a_mount(mount: LiveMount) -> None:
    mount.read("d/file")
    shown = json.loads(sluice("status", "--json", mount.directory / "d").stdout)
    assert (shown["mountpoint"], shown["dirty_bytes"]) == (str(mount.directory), 0)
    assert set(shown["processes"]) == {"supervisor", "workers", "mover", "notifier"}
    assert set(shown["lake_io"]["requests"]) == {"list", "head", "get", "put", "copy", "delete"}
    assert shown["lake_io"]["requests"]["get"] == 1
    assert shown["lake_io"]["bytes_fetched"] == 200_000
    assert sum(shown["reads"]["bytes_by_source"].values()) == 200_000
    for tier in shown["tiers"]:
        assert {"name", "path", "used_bytes", "size_bytes", "objects"} <= set(tier)
    assert all({"on", "reason"} == set(feature) for feature in shown["features"].values())
    assert {"lake", "profile", "uploads", "sets"} <= set(shown)


def test_two_mounts_of_one_lake_live_side_by_side(mounting: Mounting, folder: Folder) -> None:
    folder.put("file", content(50_000))
    one, two = mounting.mount(folder.url), mounting.mount(folder.url)
    assert one.read("file") == two.read("file") == content(50_000)
    one.unmount()
    assert two.read_anew("file") == content(50_000)
    assert two.status()["mountpoint"] == str(two.directory)


def test_sync_and_retry_of_what_is_not_there_or_not_written(mounting: Mounting, folder: Folder) -> None:
    """A mistyped path is not to pass for durable; who names none is not refused for a read-only mount."""
    folder.put("d/file", b"1")
    mount = mounting.mount(folder.url)
    assert control.call(mount.directory, "retry", paths=[]) == {"retried": 0}
    done = sluice("sync", mount.directory / "d/fiel")
    assert (done.returncode, done.stdout) == (1, "") and "no such file" in done.stderr
    done = sluice("sync", mount.directory / "d/file")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
