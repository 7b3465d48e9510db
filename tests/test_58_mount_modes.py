"""chmod of files that are being written: kept over close, upload, other changes and the death of all."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from fusefs import channel
from tests.mounting import Folder, Mounting

OPTIONS = ("-o", "rw", "--upload-delay=0.2")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "lake")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def make(path: Path, *modes: int, mtime_s: int = 0) -> None:
    """Write a file as tar(1) does: mode and time are set while it is open."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    os.write(fd, b"content")
    for mode in modes:
        os.fchmod(fd, mode)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == mode
    if mtime_s:
        os.utime(fd, (mtime_s, mtime_s))
    os.close(fd)


def test_modes_of_open_files_reach_the_lake(mounting: Mounting, folder: Folder) -> None:
    mount = mounting.mount(folder.url, *OPTIONS)
    wanted = {"a": (0o644,), "b": (0o644, 0o600), "c": (0o644, 0o755), "d": (0o664, 0o4755), "e": (0o400,)}
    for name, modes in wanted.items():
        make(mount.directory / name, *modes, mtime_s=1_600_000_000)
    os.rename(mount.directory / "a", mount.directory / "f")
    wanted["f"] = wanted.pop("a")
    os.chmod(mount.directory / "c", 0o640)  # Once it is closed.
    wanted["c"] = (0o640,)
    for name, modes in wanted.items():
        assert mode_of(mount.directory / name) == modes[-1], name
    mount.unmount()
    for name, modes in wanted.items():
        told = json.loads(os.getxattr(folder.path / name, "user.sluice.metadata"))
        assert int(told["mode"], 8) == modes[-1], name
        assert float(told["mtime"]) == 1_600_000_000, name


def test_a_mode_outlives_the_death_of_all_while_the_file_is_open(mounting: Mounting, folder: Folder) -> None:
    mount = mounting.mount(folder.url, "-o", "rw", "--upload-delay=600")
    fd = os.open(mount.directory / "file", os.O_CREAT | os.O_WRONLY, 0o600)
    os.write(fd, b"content")
    os.fchmod(fd, 0o644)
    make(mount.directory / "closed", 0o664)
    mount.kill_all()
    os.close(fd)
    mount.remount()
    assert mode_of(mount.directory / "file") == 0o644 and mode_of(mount.directory / "closed") == 0o664
    subprocess.run(["chmod", "600", str(mount.directory / "file")], check=True)
    assert mode_of(mount.directory / "file") == 0o600


def test_a_mode_set_while_the_file_is_open_is_in_force_at_once(mounting: Mounting, folder: Folder) -> None:
    """Also for whoever opens it meanwhile, and after more was written and fsynced."""
    mount = mounting.mount(folder.url, *OPTIONS)
    path = mount.directory / "file"
    with path.open("xb", buffering=0) as file:
        os.fchmod(file.fileno(), 0o660)
        file.write(b"1")
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o644)
        assert mode_of(path) == 0o644 and path.read_bytes() == b"1"
        file.write(b"2")
        os.fchmod(file.fileno(), 0o600)
        os.fsync(file.fileno())
        assert mode_of(path) == 0o600
    assert mode_of(path) == 0o600 and path.read_bytes() == b"12"


def test_status_says_whether_requests_are_answered_directly(mounting: Mounting, folder: Folder) -> None:
    features = mounting.mount(folder.url, *OPTIONS).status()["features"]
    assert features["direct_answers"]["on"] is features["granted_opens"]["on"]
    assert features["direct_reads"]["on"] is (channel.reads_failure() is None)
    single = mounting.mount(folder.url, *OPTIONS, "--workers=0").status()["features"]
    assert single["direct_answers"] == {"on": False, "reason": "--workers 0"}
    assert single["direct_reads"]["on"] is False
