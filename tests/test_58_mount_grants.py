"""Opens that the channel extension answers on real mounts: what programs see is what they saw before."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from cache.index import Index
from tests.mounting import Folder, LiveMount, Mounting, content, kill_each, until
from tools.mounted import sluice_command

WRITABLE = ("-o", "rw", "--upload-delay=0.2", "--upload-open-delay=0.3")
OPENS_READ_ONLY = ("--profile=checkpoint",)
BODY = content(110_000, seed=5)
MODES = {"read-only": OPENS_READ_ONLY, "writable": WRITABLE, "passthrough": (*WRITABLE, "--passthrough=all")}


def mounted(mounting: Mounting, folder: Folder, mode: str) -> LiveMount:
    folder.put("sample", BODY)
    mount = mounting.mount(folder.url, "--workers=2", *MODES[mode])
    feature = mount.status()["features"]["granted_opens"]
    if not feature["on"]:
        pytest.skip(str(feature["reason"]))
    return mount


@pytest.fixture(params=MODES)
def mount(request: pytest.FixtureRequest, mounting: Mounting, folder: Folder) -> LiveMount:
    return mounted(mounting, folder, request.param)


@pytest.fixture(params=["writable", "passthrough"])
def writable(request: pytest.FixtureRequest, mounting: Mounting, folder: Folder) -> LiveMount:
    return mounted(mounting, folder, request.param)


def granted(mount: LiveMount) -> int:
    return int(mount.reads()["requests"]["opens_granted"])


def unlinked(mount: LiveMount) -> int:
    """Return how many files without a name are kept for those who have them open."""
    index = Index(mount.cache)
    try:
        return index.entries()["detached"]
    finally:
        index.close()


def open_by_grant(mount: LiveMount, path: Path) -> int:
    """Return a descriptor of the file, which one of the workers opened without Python."""
    path.read_bytes()
    before = granted(mount)
    fd = os.open(path, os.O_RDONLY)
    until(lambda: granted(mount) > before, "the channel opened it")
    return fd


def test_a_file_that_was_opened_once_is_opened_by_grant_from_then_on(mount: LiveMount) -> None:
    for _ in range(50):
        assert mount.read("sample") == BODY
        assert mount.read_anew("sample") == BODY
    until(lambda: mount.reads()["requests"]["opens"] == 100, "all opens are counted")
    assert granted(mount) >= 98


def test_what_leaves_the_cache_is_fetched_by_the_read(mount: LiveMount) -> None:
    fd = open_by_grant(mount, mount.directory / "sample")
    os.close(fd)
    mount.evict("sample")
    assert mount.read_anew("sample") == BODY


def test_a_trace_has_such_opens(mounting: Mounting, folder: Folder, tmp_path: Path) -> None:
    """What a trace records is what the policies hear."""
    names = [f"file-{number}" for number in range(6)]
    for name in names:
        folder.put(name, BODY)
    mount = mounted(mounting, folder, "read-only")
    for name in names:
        os.close(open_by_grant(mount, mount.directory / name))
    before = granted(mount)
    path = tmp_path / "trace"
    tracer = subprocess.Popen(
        [sluice_command(), "trace", mount.directory, path, "--seconds=600"], stdout=subprocess.PIPE, text=True
    )
    try:
        until(lambda: path.exists() and path.stat().st_size > 0, "the trace has begun")
        for name in names:
            assert mount.read(name) == BODY
        until(lambda: path.read_bytes().count(b"\n") > len(names), "all uses have arrived")
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=60)
    assert granted(mount) == before + len(names)


def test_an_unlinked_file_is_there_for_who_has_it_open_and_leaves_the_lake_afterwards(
    writable: LiveMount, folder: Folder
) -> None:
    path = writable.directory / "sample"
    fd = open_by_grant(writable, path)
    path.unlink()
    assert not path.exists()
    assert unlinked(writable) == 1
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, len(BODY), 0) == BODY
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)
    until(lambda: not (folder.path / "sample").exists(), "the lake deleted it")
    until(lambda: unlinked(writable) == 0, "the mover heard of the close")
    assert writable.status()["dirty_bytes"] == 0


def test_a_reader_by_grant_sees_what_another_writes(writable: LiveMount, folder: Folder) -> None:
    path = writable.directory / "sample"
    fd = open_by_grant(writable, path)
    with path.open("r+b", buffering=0) as writer:
        writer.write(b"new")
        assert os.pread(fd, 5, 0) == b"new" + BODY[3:5]
        os.truncate(path, 4)
        assert os.pread(fd, 100, 0) == b"new" + BODY[3:4]
    os.close(fd)
    until(lambda: (folder.path / "sample").read_bytes() == b"new" + BODY[3:4], "the lake has it")
    assert path.read_bytes() == b"new" + BODY[3:4]


def test_a_reader_by_grant_keeps_the_file_that_was_replaced(writable: LiveMount, folder: Folder) -> None:
    path, other = writable.directory / "sample", writable.directory / "other"
    fd = open_by_grant(writable, path)
    other.write_bytes(b"other")
    other.rename(path)
    assert path.read_bytes() == b"other"
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, len(BODY), 0) == BODY
    os.close(fd)
    until(lambda: (folder.path / "sample").read_bytes() == b"other", "the lake has it")


def test_permissions_hold(writable: LiveMount) -> None:
    """They are the kernel's (default_permissions): no open comes here that is not allowed."""
    path = writable.directory / "sample"
    os.close(open_by_grant(writable, path))
    path.chmod(0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534), os.setuid(65534)
            os.open(path, os.O_RDONLY)
        except PermissionError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_workers_that_die_leave_files_open_that_can_be_read(mount: LiveMount, folder: Folder) -> None:
    fd = open_by_grant(mount, mount.directory / "sample")
    for _ in range(3):
        kill_each(mount.pids()["workers"])
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, len(BODY), 0) == BODY
        assert mount.read_anew("sample") == BODY
    os.close(fd)


def test_a_new_version_of_the_lake_is_found(mounting: Mounting, folder: Folder) -> None:
    folder.put("sample", BODY)
    mount = mounting.mount(folder.url, *OPENS_READ_ONLY, "--ttl=0.2")
    if mount.status()["features"]["granted_opens"]["on"]:
        os.close(open_by_grant(mount, mount.directory / "sample"))
    folder.put("sample", b"new")
    until(lambda: mount.read("sample") == b"new", "the new version is shown")


def test_all_in_one_process_opens_through_python(mounting: Mounting, folder: Folder) -> None:
    folder.put("sample", BODY)
    mount = mounting.mount(folder.url, *OPENS_READ_ONLY, "--workers=0")
    assert mount.status()["features"]["granted_opens"] == {"on": False, "reason": "--workers 0"}
    for _ in range(5):
        assert mount.read("sample") == BODY
    assert mount.reads()["requests"]["opens"] == 5
    assert granted(mount) == 0
