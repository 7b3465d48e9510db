"""Small real disks: ext4 in a file, mounted through a loop device."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20


@contextmanager
def small_disk(home: Path, size_bytes: int) -> Iterator[Path]:
    """An ext4 filesystem of *size_bytes* at home/disk; unmounted at the end, whoever still uses it."""
    image, mountpoint = home / "disk.img", home / "disk"
    with image.open("wb") as file:
        file.truncate(size_bytes)
    mountpoint.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=1", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mountpoint], check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=True)
        image.unlink()


@contextmanager
def frozen(mountpoint: Path, for_s: float) -> Iterator[None]:
    """Have whoever writes there wait until *for_s* have passed (linux/fs.h: FIFREEZE, FITHAW)."""
    directory = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.ioctl(directory, 0xC0045877, 0)
    thaw = threading.Timer(for_s, fcntl.ioctl, (directory, 0xC0045878, 0))
    thaw.start()
    try:
        yield
    finally:
        thaw.join()
        os.close(directory)


def make_read_only(mountpoint: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", mountpoint], check=True)


def fill_up(disk: Path, leave_bytes: int = 0) -> Path:
    """Return a file that takes all of the disk but about *leave_bytes*."""
    balloon = disk / "balloon"
    with balloon.open("wb") as file:
        while True:
            status = os.statvfs(disk)
            room = status.f_bavail * status.f_frsize - leave_bytes
            if room <= 0:
                return balloon
            try:
                file.write(bytes(min(room, MIB)))
                file.flush()
            except OSError:
                return balloon
