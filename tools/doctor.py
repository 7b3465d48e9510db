"""`sluice doctor`: what this machine supports, what the missing pieces cost, and how to get them."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cache import control
from cache.config import LakeConfig, default_cache_path
from cache.model import GIB
from tools.mount import user_allow_other
from tools.option_kinds import dram_bytes_default, format_size, memory_bytes
from tools.options import Parser
from tools.status import all_mounts, console, find_mount, printable

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["ok", "off", "bad"]  # "off": mounts work without it. "bad": they do not.

PACKAGES_NEEDED = ("pyfuse3", "trio", "lmdb", "boto3", "msgspec", "xxhash", "rich")
PASSTHROUGH_KERNEL = (6, 9)  # FUSE_PASSTHROUGH and FUSE_NOTIFY_RESEND, linux/fuse.h.
TMPFS_XATTR_KERNEL = (6, 6)  # "shmem: Add support for user xattrs".
CUSTOM_IO_LIBFUSE = (3, 14)  # fuse_session_custom_io().
FILES_MIN = 4096
HIDDEN_SHOWN_MAX = 100
_CAP_SYS_ADMIN = 21  # <linux/capability.h>
_NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "gpfs", "fuse")


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    state: State
    detail: str
    cost: str = ""  # What is lost; empty if ok.
    mend: str = ""

    def unless(self, good: bool, state: State, cost: str, mend: str) -> Check:
        """Return this check as it is if *good*, else with what it costs and how to mend it."""
        return self if good else Check(self.name, state, self.detail, cost, mend)


def ok(name: str, detail: str) -> Check:
    return Check(name, "ok", detail)


def main(argv: Sequence[str]) -> int:
    """Show the checks; 0 if mounts can work here."""
    parser = Parser(prog="sluice doctor", description="Check what SluiceFS finds on this machine.")
    parser.add_argument("directory", nargs="?", metavar="DIR", help="a mount, to see the keys that it hides")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args(argv)
    caches, hidden = _cache_paths_and_hidden(arguments.directory)
    checks = [*all_checks(), *(cache_check(path) for path in caches)]
    works = all(check.state != "bad" for check in checks)
    if arguments.json:
        found = {"ok": works, "checks": [asdict(check) for check in checks], "hidden": hidden}
        print(json.dumps(found, indent=2))
    else:
        _show(checks, hidden, works)
    return 0 if works else 1


def _cache_paths_and_hidden(directory: str | None) -> tuple[list[Path], dict[str, Any] | None]:
    """Return the cache directories to check and, for a mount, the result of the verb `hidden`."""
    if directory is None:
        return [default_cache_path(LakeConfig("")).parent], None
    mountpoint, _ = find_mount(directory)
    tiers = control.call(mountpoint, "status").get("tiers", [])
    hidden: dict[str, Any] = control.call(mountpoint, "hidden", limit=HIDDEN_SHOWN_MAX)
    return [Path(tier["path"]) for tier in tiers if tier["name"] != "dram"], hidden


def all_checks() -> Iterator[Check]:
    """Yield the checks that concern the machine, the most needed first."""
    kernel = _numbers(platform.release())
    yield device_check()
    yield fusermount_check()
    yield libfuse_check()
    yield kernel_check("kernel: passthrough", kernel, "reads of cached files pass through Python")
    yield kernel_check("kernel: resend", kernel, "requests that a worker had when it died fail with EIO")
    yield privilege_check()
    yield sharing_check()
    yield channel_check()  # Before the packages: it must be loaded before pyfuse3.
    yield checksums_check()
    for name in PACKAGES_NEEDED:
        yield package_check(name)
    yield package_check("obstore", cost="boto3 fetches the bytes: about a tenth of the requests a second")
    yield files_check()
    yield memory_check()
    yield tmpfs_check(Path("/dev/shm"), kernel)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def device_check(device: Path = Path("/dev/fuse")) -> Check:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        mend = "modprobe fuse; in a container: docker run --device /dev/fuse --cap-add SYS_ADMIN"
        return Check("/dev/fuse", "bad", "missing", "nothing can be mounted", mend)
    except OSError as error:
        mend = "chmod 666 /dev/fuse; in a container: allow the device"
        return Check("/dev/fuse", "bad", str(error.strerror), "nothing can be mounted", mend)
    return ok("/dev/fuse", "usable")


def fusermount_check() -> Check:
    path = shutil.which("fusermount3")
    state: State = "off" if os.geteuid() == 0 else "bad"
    found = ok("fusermount3", path or "missing")
    return found.unless(path is not None, state, "only root can mount", "apt install fuse3")


def libfuse_check() -> Check:
    try:
        libfuse = ctypes.CDLL("libfuse3.so.3")
        libfuse.fuse_pkgversion.restype = ctypes.c_char_p
        version = libfuse.fuse_pkgversion().decode()
    except OSError:
        # libfuse 3.17 changed the number, and pyfuse3's wheel may bring its own.
        detail = "libfuse3.so.3 is not found by name"
        return Check("libfuse", "off", detail, "its version is unknown", "apt install libfuse3-3")
    cost = "no passthrough, one worker only"
    mend = "a distribution with libfuse 3.14 or later (Debian 12, Ubuntu 24.04)"
    return ok("libfuse", version).unless(_numbers(version) >= CUSTOM_IO_LIBFUSE, "off", cost, mend)


def kernel_check(name: str, kernel: tuple[int, ...], cost: str) -> Check:
    wanted = ".".join(map(str, PASSTHROUGH_KERNEL))
    return ok(name, f"Linux {platform.release()}").unless(
        kernel >= PASSTHROUGH_KERNEL, "off", cost, f"Linux {wanted} or later"
    )


def privilege_check() -> Check:
    capabilities = re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    admin = bool(capabilities and int(capabilities[1], 16) >> _CAP_SYS_ADMIN & 1)
    cost = "no passthrough, no tmpfs of its own (/dev/shm instead), kernel read-ahead stays at 128 KiB"
    found = ok("CAP_SYS_ADMIN", "root" if os.geteuid() == 0 and admin else "held" if admin else "missing")
    return found.unless(admin, "off", cost, "run `sluice mount` as root or with this capability")


def sharing_check() -> Check:
    allowed = os.geteuid() == 0 or user_allow_other()
    mend = "add the line user_allow_other to /etc/fuse.conf"
    found = ok("allow-other", "permitted" if allowed else "not permitted")
    return found.unless(allowed, "off", "only you can read your mounts", mend)


def channel_check() -> Check:
    try:
        reason: str | None = importlib.import_module("fusefs.channel").load()
    except Exception as error:  # Whatever an extension that was built elsewhere may raise.
        reason = f"{type(error).__name__}: {error}"
    cost = "one worker only, no passthrough, every open is answered by Python"
    mend = "apt install gcc libfuse3-dev pkg-config python3-dev, then install sluicefs again"
    return ok("channel extension", reason or "loaded").unless(reason is None, "off", cost, mend)


def checksums_check() -> Check:
    """Check what the channel extension needs to read cached files."""
    try:
        reason: str | None = importlib.import_module("fusefs.channel").reads_failure()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    cost = "reads of cached files take Python twice the processor time"
    return ok("xxhash's library", reason or "found").unless(
        reason is None, "off", cost, "apt install libxxhash0, and see the channel extension"
    )


def package_check(name: str, cost: str = "") -> Check:
    """Check an import package; needed unless *cost* says what its want costs."""
    try:
        importlib.import_module(name)
        return ok(name, importlib.metadata.version(name))
    except Exception as error:  # Also a library that the extension misses.
        state: State = "off" if cost else "bad"
        return Check(
            name, state, f"{type(error).__name__}: {error}", cost or "no mount", f"pip install {name}"
        )


def files_check() -> Check:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or hard >= FILES_MIN
    cost = f"fewer than {FILES_MIN} files can be kept open"
    found = ok("open files", "unlimited" if hard == resource.RLIM_INFINITY else f"up to {hard}")
    return found.unless(enough, "off", cost, "raise the hard limit: limits.conf, or LimitNOFILE= in the unit")


def memory_check() -> Check:
    default = dram_bytes_default()
    found = ok("memory", f"{format_size(memory_bytes())}; DRAM tier by default {format_size(default)}")
    return found.unless(default > 0, "off", "no DRAM tier by default", "give --dram SIZE, or more memory")


def tmpfs_check(path: Path, kernel: tuple[int, ...]) -> Check:
    if not path.is_dir() or not os.access(path, os.W_OK) or filesystem_type(path) != "tmpfs":
        cost = "no DRAM tier unless root can mount one"
        return Check("tmpfs", "off", f"no writable tmpfs at {path}", cost, f"mount -t tmpfs tmpfs {path}")
    size = format_size(shutil.disk_usage(path).total)
    if _keeps_user_xattrs(path):
        return ok("tmpfs", f"{path}, {size}")
    mend = "Linux 6.6 or later" if kernel < TMPFS_XATTR_KERNEL else "a kernel with CONFIG_TMPFS_XATTR"
    cost = "the DRAM tier's files can't carry attributes and are not kept over a crash"
    return Check("tmpfs", "off", f"{path}, {size}, no user attributes", cost, mend)


def _keeps_user_xattrs(directory: Path) -> bool:
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=directory) as file:
        os.setxattr(file.fileno(), "user.sluice", b"1")
        return True
    return False


def filesystem_type(path: Path) -> str:
    """Return the type of the file system that holds *path*."""
    types = {mount.mountpoint: mount.filesystem_type for mount in all_mounts()}
    return next((types[place] for place in (path, *path.parents) if place in types), "unknown")


def cache_check(directory: Path) -> Check:
    """Check the file system under a cache directory, which may not exist yet."""
    place = next(p for p in (directory, *directory.parents) if p.exists())
    kind, free = filesystem_type(place), shutil.disk_usage(place).free
    found = ok(f"cache {directory}", f"{kind}, {format_size(free)} free")
    mend = "give --cache DIR on a local disk"
    if not os.access(place, os.W_OK):
        return found.unless(False, "off", "not writable: mounts need --cache", mend)
    if kind.startswith(_NETWORK_FILESYSTEMS):
        return found.unless(False, "off", "a network file system: as slow as the lake", mend)
    if kind == "overlay":
        return found.unless(False, "off", "stacked on another file system: passthrough may be refused", mend)
    return found.unless(free >= 2 * GIB, "off", "almost full: little can be cached", mend)


def _show(checks: list[Check], hidden: dict[str, Any] | None, works: bool) -> None:
    out = console()
    out.print(_table(checks))
    if hidden is not None:
        out.print(f"{hidden['count']} keys of the lake can't be shown as paths", markup=False)
        for item in hidden["keys"]:
            out.print(f"  {printable(item['key'])}: {item['reason']}", markup=False)
    out.print("mounts can work here" if works else "mounts can't work here: mend what is bad", style="bold")


def _table(checks: list[Check]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("check", "", "found", "cost", "mend"):
        table.add_column(name, overflow="fold")
    styles = {"ok": "green", "off": "yellow", "bad": "red"}
    for check in checks:
        state = Text(check.state, style=styles[check.state])
        texts = [Text(printable(text)) for text in (check.detail, check.cost, check.mend)]
        table.add_row(Text(check.name), state, *texts)
    return table
