"""Names and attributes on writable mounts."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mounting import LiveMount
from tests.writable_mounts import KINDS, SMALL, drop_pages, fails_with, mounted_writable


@pytest.fixture(scope="module", params=KINDS)
def mount(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveMount]:
    with mounted_writable(request, tmp_path_factory) as mount:
        yield mount


@pytest.fixture
def work(mount: LiveMount, request: pytest.FixtureRequest) -> Path:
    """A directory of the test's own."""
    made = mount.directory / "".join(c if c.isalnum() else "-" for c in request.node.name)
    made.mkdir()
    return made


RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4

AT_FDCWD = -100


_libc = ctypes.CDLL(None, use_errno=True)


def renameat2(old: Path, new: Path, flags: int) -> None:
    if _libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# Names


def read_directory(directory: Path) -> Iterator[str]:
    """Yield the entries in pieces of some twenty: os.scandir has a thousand at once."""
    fd, room = os.open(directory, os.O_RDONLY | os.O_DIRECTORY), ctypes.create_string_buffer(512)
    try:
        while (length := _libc.getdents64(fd, room, len(room))) > 0:
            at = 0
            while at < length:  # getdents64(2): inode, offset, length, kind, name.
                (size,) = struct.unpack_from("=H", room, at + 16)
                name = room.raw[at + 19 : at + size].split(b"\0", 1)[0]
                at += size
                if name not in (b".", b".."):
                    yield os.fsdecode(name)
        assert length == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(fd)


@pytest.mark.parametrize("change", ["rename behind", "rename before", "move away", "remove"])
def test_who_changes_entries_while_reading_them_meets_each_once(work: Path, change: str) -> None:
    names = [f"{number:04d}" for number in range(120)]
    for name in names:
        os.mknod(work / name)
    (work.parent / "elsewhere").mkdir(exist_ok=True)
    met = []
    for name in read_directory(work):
        if name not in names:
            continue  # Entries that came meanwhile may be met or not.
        met.append(name)
        if change == "remove":
            os.unlink(work / name)
        elif change == "move away":
            os.rename(work / name, work.parent / "elsewhere" / name)
        else:
            os.rename(work / name, work / (f"x{name}" if change == "rename behind" else f"+{name}"))
    assert met == names
    expected = {
        "rename behind": [f"x{name}" for name in names],
        "rename before": [f"+{name}" for name in names],
    }
    assert sorted(os.listdir(work)) == expected.get(change, [])


def test_o_excl_makes_the_file_or_fails(work: Path) -> None:
    path = work / "file"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    fails_with(errno.EEXIST, os.open, path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    fails_with(errno.EEXIST, os.mkdir, path)


def test_of_many_who_make_one_name_one_succeeds(work: Path) -> None:
    made: list[int] = []
    start = threading.Barrier(8)

    def make() -> None:
        for number in range(20):
            start.wait(30)
            with suppress(FileExistsError):
                os.close(os.open(work / f"{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                made.append(number)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(made) == list(range(20))
    assert sorted(os.listdir(work), key=int) == [str(number) for number in range(20)]


def test_listings_show_changes_at_once(work: Path) -> None:
    for number in range(30):
        (work / f"f{number:02d}").write_bytes(b"x")
        assert len(os.listdir(work)) == number + 1
        assert not (work / f"g{number:02d}").exists()
    for number in range(0, 30, 2):
        os.rename(work / f"f{number:02d}", work / f"g{number:02d}")
    names = sorted(os.listdir(work))
    assert names == sorted(f"{'fg'[number % 2 == 0]}{number:02d}" for number in range(30))
    for count, name in enumerate(names, 1):
        os.unlink(work / name)
        assert len(os.listdir(work)) == 30 - count
        assert not (work / name).exists()


def test_directories_are_made_and_removed(work: Path) -> None:
    os.makedirs(work / "a/b/c")
    assert os.stat(work / "a").st_nlink == 2 and stat.S_ISDIR(os.stat(work / "a/b").st_mode)
    fails_with(errno.ENOTEMPTY, os.rmdir, work / "a/b")
    fails_with(errno.EEXIST, os.mkdir, work / "a")
    (work / "a/b/c/file").write_bytes(b"")
    fails_with(errno.ENOTEMPTY, os.rmdir, work / "a/b/c")
    fails_with(errno.ENOTDIR, os.rmdir, work / "a/b/c/file")
    fails_with(errno.EISDIR, os.unlink, work / "a/b/c")
    os.unlink(work / "a/b/c/file")
    for path in ("a/b/c", "a/b", "a"):
        os.rmdir(work / path)
        assert not (work / path).exists()
    fails_with(errno.ENOENT, os.rmdir, work / "a")
    assert os.listdir(work) == []


def test_making_and_removing_entries_moves_the_mtime_of_the_directory(work: Path) -> None:
    seen = [os.stat(work).st_mtime_ns]
    for change in (
        lambda: (work / "file").write_bytes(b""),
        lambda: os.mkdir(work / "d"),
        lambda: os.rename(work / "file", work / "other"),
        lambda: os.unlink(work / "other"),
        lambda: os.rmdir(work / "d"),
    ):
        change()
        seen.append(os.stat(work).st_mtime_ns)
    assert seen == sorted(set(seen))


def test_rename_replaces_and_keeps_the_inode(work: Path) -> None:
    (work / "new").write_bytes(b"new")
    (work / "old").write_bytes(b"old")
    inode = os.stat(work / "new").st_ino
    with (work / "old").open("rb") as replaced:
        os.replace(work / "new", work / "old")
        assert replaced.read() == b"old"
        assert os.fstat(replaced.fileno()).st_nlink == 0
    assert os.listdir(work) == ["old"]
    assert (work / "old").read_bytes() == b"new" and os.stat(work / "old").st_ino == inode
    os.rename(work / "old", work / "old")
    assert os.listdir(work) == ["old"]


def test_rename_keeps_to_the_rules(work: Path) -> None:
    os.makedirs(work / "d/e")
    os.makedirs(work / "full/inside")
    (work / "file").write_bytes(b"")
    fails_with(errno.EISDIR, os.rename, work / "file", work / "d")
    fails_with(errno.ENOTDIR, os.rename, work / "d", work / "file")
    fails_with(errno.ENOTEMPTY, os.rename, work / "d", work / "full")
    fails_with(errno.EINVAL, os.rename, work / "d", work / "d/e/f")
    fails_with(errno.ENOENT, os.rename, work / "nothing", work / "x")
    os.rename(work / "d", work / "full/inside")
    assert os.listdir(work / "full/inside") == ["e"]


def test_rename_with_flags(work: Path) -> None:
    (work / "a").write_bytes(b"a")
    (work / "b").write_bytes(b"b")
    os.makedirs(work / "d/e")
    fails_with(errno.EEXIST, renameat2, work / "a", work / "b", RENAME_NOREPLACE)
    renameat2(work / "a", work / "c", RENAME_NOREPLACE)
    renameat2(work / "c", work / "b", RENAME_EXCHANGE)
    assert ((work / "b").read_bytes(), (work / "c").read_bytes()) == (b"a", b"b")
    renameat2(work / "b", work / "d", RENAME_EXCHANGE)
    assert (work / "d").read_bytes() == b"a" and os.listdir(work / "b") == ["e"]
    fails_with(errno.ENOENT, renameat2, work / "b", work / "nothing", RENAME_EXCHANGE)
    fails_with(errno.EINVAL, renameat2, work / "b", work / "w", RENAME_WHITEOUT)
    assert sorted(os.listdir(work)) == ["b", "c", "d"]


def test_directories_of_the_lake_are_renamed_with_all_that_is_in_them(mount: LiveMount, work: Path) -> None:
    lake = mount.directory / "lake"
    os.rename(lake / "tree", work / "tree")
    assert (work / "tree/a/leaf").read_bytes() == b"leaf"
    assert not (lake / "tree").exists() and "tree" not in os.listdir(lake)
    (work / "tree/a/new").write_bytes(b"new")
    os.rename(work / "tree/a", work / "b")
    assert sorted(os.listdir(work / "b")) == ["leaf", "new"]
    assert (work / "b/leaf").read_bytes() == b"leaf" and (work / "b/new").read_bytes() == b"new"
    os.rename(lake / "moved", work / "here")
    assert (work / "here").read_bytes() == SMALL and not (lake / "moved").exists()


def test_open_files_outlive_their_names(mount: LiveMount, work: Path) -> None:
    (work / "file").write_bytes(b"one")
    for path in (work / "file", mount.directory / "lake/gone"):
        with path.open("r+b", buffering=0) as file:
            os.unlink(path)
            fails_with(errno.ENOENT, os.stat, path)
            assert os.fstat(file.fileno()).st_nlink == 0
            os.pwrite(file.fileno(), b"two", 1)
            drop_pages(file.fileno())
            assert os.pread(file.fileno(), 4, 0)[1:] == b"two"
            path.write_bytes(b"another")
            assert os.pread(file.fileno(), 4, 0)[1:] == b"two"
        assert path.read_bytes() == b"another"


def test_a_file_is_written_on_under_its_new_name(work: Path) -> None:
    os.mkdir(work / "d")
    with (work / "file").open("wb", buffering=0) as file:
        file.write(b"before ")
        os.rename(work / "file", work / "d/moved")
        file.write(b"after")
        os.rename(work / "d", work / "e")
        file.write(b" all")
    assert (work / "e/moved").read_bytes() == b"before after all"


def test_symlinks_lead_where_they_were_made_to(work: Path) -> None:
    (work / "file").write_bytes(b"content")
    for name, target in (
        ("here", "file"),
        ("up", "../" + work.name + "/file"),
        ("broken", "nothing/ü"),
        ("long", "x" * 1500),
    ):
        os.symlink(target, work / name)
        assert os.readlink(work / name) == target
        assert os.lstat(work / name).st_size == len(os.fsencode(target))
        assert stat.S_ISLNK(os.lstat(work / name).st_mode)
    assert (work / "here").read_bytes() == (work / "up").read_bytes() == b"content"
    fails_with(errno.ENOENT, os.stat, work / "broken")
    fails_with(errno.EEXIST, os.symlink, "x", work / "here")
    os.rename(work / "here", work / "there")
    assert os.readlink(work / "there") == "file"
    os.unlink(work / "there")
    assert (work / "file").read_bytes() == b"content"
    (work / "broken").unlink()
    assert not os.path.lexists(work / "broken")


def test_fifos_and_sockets_are_there_and_device_nodes_refused(work: Path) -> None:
    os.mkfifo(work / "fifo", 0o600)
    assert stat.S_ISFIFO(os.stat(work / "fifo").st_mode)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((work / "fifo").read_bytes()))
    reader.start()
    (work / "fifo").write_bytes(b"through")
    reader.join(30)
    assert got == [b"through"]
    os.mknod(work / "plain", 0o640 | stat.S_IFREG)
    assert stat.S_ISREG(os.stat(work / "plain").st_mode) and (work / "plain").read_bytes() == b""
    fails_with(errno.EOPNOTSUPP, os.mknod, work / "dev", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    os.rename(work / "fifo", work / "other")
    os.unlink(work / "other")
    assert os.listdir(work) == ["plain"]


def test_hard_links_are_refused_as_what_they_are(work: Path) -> None:
    (work / "file").write_bytes(b"")
    fails_with(errno.EOPNOTSUPP, os.link, work / "file", work / "link")


def test_names_that_the_lake_cannot_hold_are_refused(work: Path) -> None:
    fails_with(errno.ENAMETOOLONG, lambda: (work / ("n" * 256)).write_bytes(b""))
    fails_with(errno.ENAMETOOLONG, os.mkdir, work / ("n" * 300))
    fails_with(errno.ENAMETOOLONG, os.stat, work / ("n" * 600))
    (work / "file").write_bytes(b"")
    fails_with(errno.ENAMETOOLONG, os.rename, work / "file", work / ("n" * 256))
    deep = work
    for _ in range(3):
        deep = deep / ("d" * 250)
        os.mkdir(deep)
    fails_with(errno.ENAMETOOLONG, lambda: (deep / ("f" * 250)).write_bytes(b""))
    fails_with(errno.EINVAL, lambda: (work / "x.rclonelink").write_bytes(b""))
    os.symlink("target", work / ("s" * 244))
    fails_with(errno.ENAMETOOLONG, os.symlink, "target", work / ("s" * 245))  # The lake's has eleven more.
    fails_with(errno.ENAMETOOLONG, os.rename, work / ("s" * 244), work / ("s" * 250))
    (work / ("n" * 255)).write_bytes(b"as long as it may be")
    assert (work / ("n" * 255)).read_bytes() == b"as long as it may be"


def test_names_that_the_lake_can_not_hold_are_refused(mount: LiveMount, work: Path) -> None:
    """Names that are no UTF-8, as of old archives. The mover could not tell that, and ended."""
    movers = mount.pids()["mover"]
    (work / "file").write_bytes(b"")
    for name in (b"\xfe", b"caf\xe9.txt", b"\xed\xa0\x80"):
        path = os.fsencode(work) + b"/" + name
        fails_with(errno.EINVAL, os.mkdir, path)
        fails_with(errno.EINVAL, os.open, path, os.O_CREAT | os.O_WRONLY)
        fails_with(errno.EINVAL, os.mknod, path)
        fails_with(errno.EINVAL, os.symlink, "target", path)
        fails_with(errno.EINVAL, os.rename, work / "file", path)
        fails_with(errno.ENOENT, os.stat, path)
        fails_with(errno.ENOENT, os.unlink, path)
        fails_with(errno.ENOENT, os.rmdir, path)
    assert os.listdir(work) == ["file"]
    assert mount.pids()["mover"] == movers


# Attributes


def test_mode_owner_and_times_are_kept(work: Path) -> None:
    path = work / "file"
    mask = os.umask(0o027)
    try:
        path.write_bytes(b"x")
        os.mkdir(work / "d", 0o777)
    finally:
        os.umask(mask)
    assert (stat.S_IMODE(os.stat(path).st_mode), stat.S_IMODE(os.stat(work / "d").st_mode)) == (0o640, 0o750)
    for target in (path, work / "d"):
        os.chmod(target, 0o4751)
        os.chown(target, 1234, 567)
        os.utime(target, ns=(1_000_000_001, 2_000_000_002))
        shown = os.stat(target)
        assert (shown.st_uid, shown.st_gid) == (1234, 567)
        assert (shown.st_atime_ns, shown.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
        os.utime(target)
        assert abs(os.stat(target).st_mtime - time.time()) < 60
    assert stat.S_IMODE(os.stat(work / "d").st_mode) == 0o4751


def test_attributes_of_objects_of_the_lake_are_changed(mount: LiveMount, work: Path) -> None:
    path = mount.directory / "lake/odd"
    os.chmod(path, 0o600)
    os.utime(path, ns=(5, 7_000_000_000))
    shown = os.stat(path)
    assert (stat.S_IMODE(shown.st_mode), shown.st_mtime_ns) == (0o600, 7_000_000_000)
    os.rename(path, work / "odd")
    assert os.stat(work / "odd").st_mtime_ns == 7_000_000_000


def test_writing_takes_the_set_user_id_bit_away(work: Path) -> None:
    (work / "file").write_bytes(b"x")
    os.chmod(work / "file", 0o4777)
    command = "import sys, os; os.setuid(1); open(sys.argv[1], 'r+b').write(b'y')"
    # The mount lets nobody else in: as root without its capabilities.
    drop = [
        *["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--reuid", "0", "--clear-groups"],
        sys.executable,
        "-c",
    ]
    done = subprocess.run([*drop, command.replace("os.setuid(1); ", ""), work / "file"], check=False)
    if done.returncode:
        pytest.skip("setpriv is not there, or may not drop capabilities")
    assert stat.S_IMODE(os.stat(work / "file").st_mode) == 0o777


def test_mtime_moves_with_each_write_and_stays_with_reads(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"one")
    before = os.stat(path).st_mtime_ns
    path.read_bytes()
    assert os.stat(path).st_mtime_ns == before
    with path.open("ab") as file:
        file.write(b"two")
    assert os.stat(path).st_mtime_ns > before


def test_extended_attributes_are_set_listed_and_removed(mount: LiveMount, work: Path) -> None:
    (work / "file").write_bytes(b"x")
    os.mkdir(work / "d")
    for path in (work / "file", work / "d", mount.directory / "lake/small"):
        assert os.listxattr(path) == []
        os.setxattr(path, "user.one", b"1")
        os.setxattr(path, "user.two", b"\0binary\xff" * 20, os.XATTR_CREATE)
        assert sorted(os.listxattr(path)) == ["user.one", "user.two"]
        assert (os.getxattr(path, "user.one"), os.getxattr(path, "user.two")) == (b"1", b"\0binary\xff" * 20)
        fails_with(errno.EEXIST, os.setxattr, path, "user.one", b"2", os.XATTR_CREATE)
        fails_with(errno.ENODATA, os.setxattr, path, "user.three", b"2", os.XATTR_REPLACE)
        os.setxattr(path, "user.one", b"", os.XATTR_REPLACE)
        assert os.getxattr(path, "user.one") == b""
        os.removexattr(path, "user.one")
        fails_with(errno.ENODATA, os.getxattr, path, "user.one")
        fails_with(errno.ENODATA, os.removexattr, path, "user.one")
        fails_with(errno.EOPNOTSUPP, os.setxattr, path, "trusted.x", b"")
        os.removexattr(path, "user.two")
    shown = os.stat(mount.directory / "lake/small")
    assert stat.S_IMODE(shown.st_mode) == 0o644
