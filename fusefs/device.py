"""The FUSE device and the mount itself: mount(2) as root, fusermount3 for everybody else."""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

from cache.errors import SluiceError, UsageError

FILESYSTEM_TYPE = "fuse.sluice"
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MNT_FORCE, _MNT_DETACH = 1, 2, 4, 1, 2
_CONNECTIONS = Path("/sys/fs/fuse/connections")  # Documentation/filesystems/fuse.rst
_NOTIFY_RESEND = struct.pack("=IiQ", 16, 7, 0)  # linux/fuse.h: FUSE_NOTIFY_RESEND, kernel 6.9.
_INVALIDATE_ENTRY = struct.Struct(
    "=IiQQII"
)  # FUSE_NOTIFY_INVAL_ENTRY: length, 3, 0, parent, length of the name, 0.
_BACKING = struct.Struct("=iIQ")  # linux/fuse.h, kernel 6.9: struct fuse_backing_map.
_BACKING_OPEN, _BACKING_CLOSE = 0x4010E501, 0x4004E502  # _IOW(229, 1, …), _IOW(229, 2, uint32_t)
_libc = ctypes.CDLL(None, use_errno=True)


def mount_device(source: str, mountpoint: Path, *, read_only: bool, allow_other: bool) -> int:
    """Mount and return the device's descriptor, not yet initialised. Raises SluiceError."""
    if os.geteuid() == 0:
        return _mount_as_root(source, mountpoint, read_only=read_only, allow_other=allow_other)
    return _mount_with_helper(source, mountpoint, read_only=read_only, allow_other=allow_other)


def _mount_as_root(source: str, mountpoint: Path, *, read_only: bool, allow_other: bool) -> int:
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SluiceError(f"/dev/fuse: {error.strerror}; load the fuse module (modprobe fuse)") from error
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions"
    if allow_other:
        options += ",allow_other"
    flags = _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if read_only else 0)
    arguments = [text.encode() for text in (source, str(mountpoint), FILESYSTEM_TYPE)]
    if _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode()):
        code = ctypes.get_errno()
        os.close(device)
        raise SluiceError(f"{mountpoint}: can't mount there: {os.strerror(code)}")
    return device


def _mount_with_helper(source: str, mountpoint: Path, *, read_only: bool, allow_other: bool) -> int:
    """fusermount3 mounts and sends the descriptor over a socket (libfuse, util/fusermount.c)."""
    helper = shutil.which("fusermount3")
    if helper is None:
        raise SluiceError("fusermount3 is missing: install the package fuse3, or mount as root")
    options = f"nosuid,nodev,subtype=sluice,fsname={source},default_permissions,{'ro' if read_only else 'rw'}"
    if allow_other:
        options += ",allow_other"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        result = subprocess.run(
            [helper, "-o", options, "--", str(mountpoint)],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        if result.returncode:
            line = " ".join(result.stderr.split())
            if "user_allow_other" in line:
                raise UsageError("--allow-other: needs the line user_allow_other in /etc/fuse.conf")
            raise SluiceError(f"{mountpoint}: can't mount there: {line}")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                return array.array("i", data)[0]
    raise SluiceError("fusermount3 sent no device")


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount. Raises OSError: EBUSY while files are open there, EINVAL if nothing is mounted.

    *lazy*: detach it where files are open.
    """
    if os.geteuid() == 0:
        if _libc.umount2(str(mountpoint).encode(), _MNT_DETACH if lazy else 0):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(mountpoint))
        return
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        code = errno.EBUSY if "busy" in result.stderr else errno.EINVAL
        raise OSError(code, os.strerror(code), str(mountpoint))


def cut_off(mountpoint: Path) -> None:
    """Detach the mount where files are open, and have all requests fail: nobody will answer any more.

    Else who waits for an answer keeps the notifier waiting for him, that the device open, and the device him.
    Without root it takes the control file system of FUSE, where the file is the user's who mounted.
    """
    connection = _device_number(mountpoint).rpartition(":")[2]
    if os.geteuid() != 0 or _libc.umount2(str(mountpoint).encode(), _MNT_FORCE | _MNT_DETACH):
        with suppress(OSError):
            unmount(mountpoint, lazy=True)
        with suppress(OSError):
            (_CONNECTIONS / connection / "abort").write_text("1")


def resend_requests(device: int) -> bool:
    """Have the kernel send the unanswered requests again; return False where it can't (< 6.9)."""
    try:
        os.write(device, _NOTIFY_RESEND)
    except OSError:
        return False
    return True


def invalidate_entry(device: int, parent: int, name: bytes) -> bool:
    """Have the kernel forget a name; return False where the mount is gone.

    Waits for who holds the directory's lock, for an answer of ours perhaps, and nothing interrupts it.
    """
    length = _INVALIDATE_ENTRY.size + len(name) + 1
    try:
        os.write(device, _INVALIDATE_ENTRY.pack(length, 3, 0, parent, len(name), 0) + name + b"\0")
    except OSError as error:
        return error.errno not in (errno.ENODEV, errno.ENOTCONN)  # ENOENT: it does not know the name.
    return True


def open_backing(device: int, fd: int) -> int:
    """Register a file for passthrough; return its backing id, which keeps the file open.

    Raises OSError: EPERM without CAP_SYS_ADMIN, ELOOP for a file on a stacked file system.
    """
    return int(fcntl.ioctl(device, _BACKING_OPEN, bytearray(_BACKING.pack(fd, 0, 0))))


def close_backing(device: int, backing_id: int) -> None:
    """Forget a backing id. Who has a file open with it keeps it. Raises OSError: ENOENT."""
    fcntl.ioctl(device, _BACKING_CLOSE, bytearray(backing_id.to_bytes(4, "little")))


def set_read_ahead(mountpoint: Path, kib: int) -> str | None:
    """Set how far the kernel reads ahead in this mount; return None, or why it stays at 128 KiB.

    Asks the mount nothing: were all its workers killed meanwhile, even SIGKILL would not end who waits.
    """
    path = f"/sys/class/bdi/{_device_number(mountpoint)}/read_ahead_kb"
    try:
        Path(path).write_text(str(kib))
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def _device_number(mountpoint: Path) -> str:
    """Return "major:minor" of what is mounted there last, "0:0" if nothing is (proc_pid_mountinfo(5))."""
    wanted = os.fsencode(mountpoint.parent.resolve() / mountpoint.name)
    for line in reversed(Path("/proc/self/mountinfo").read_bytes().splitlines()):
        fields = line.split(b" ")
        shown = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), fields[4])
        if shown == wanted:
            return fields[2].decode()
    return "0:0"


def mount_tmpfs(directory: Path, size_bytes: int) -> str | None:
    """Mount a tmpfs of that size (or resize the one that is there); return None, or why not."""
    flags = 0x20 if os.path.ismount(directory) else _MS_NOSUID | _MS_NODEV  # 0x20: MS_REMOUNT
    options = f"size={size_bytes},mode=0700".encode()
    if _libc.mount(b"sluice-dram", str(directory).encode(), b"tmpfs", ctypes.c_ulong(flags), options):
        return os.strerror(ctypes.get_errno())
    return None
