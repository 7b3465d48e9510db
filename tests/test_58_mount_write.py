"""Every call that changes something, on a real mount, over a directory and over S3.

What the lake has of it in the end is tested elsewhere: here is what a program sees.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mounting import MIB, Folder, Lake, LiveMount, Mounting, Prefix, content, mounting_below, until
from tools.servers import SeaweedServer

WRITABLE = ("-o", "rw")
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
AT_FDCWD = -100
SEEK_DATA, SEEK_HOLE = os.SEEK_DATA, os.SEEK_HOLE
SMALL, LARGE = content(300_000, seed=58), content(9 * MIB + 7, seed=58)
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module", params=["directory", "S3", "no passthrough"])
def mount(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveMount]:
    """One writable mount for all tests; what is closed is sent after a moment, while they go on."""
    home = tmp_path_factory.mktemp("write")
    lake: Lake
    environment: dict[str, str] = {}
    if request.param != "S3":
        lake = Folder(home / "lake")
    else:
        server: SeaweedServer = request.getfixturevalue("s3_server")
        lake = Prefix(server, request.getfixturevalue("shared_bucket"), f"write-{os.getpid()}")
        environment = {k: v for k, v in server.environment().items() if k != "AWS_ENDPOINT_URL"}
    for name in ("small", "again", "cut", "grown", "emptied", "appended", "moved", "gone", "mapped", "odd"):
        lake.put(f"lake/{name}", SMALL)
    for name in ("large", "large-cut", "large-mapped"):
        lake.put(f"lake/{name}", LARGE)
    lake.put("lake/tree/a/leaf", b"leaf")
    with mounting_below(home) as mounting:
        options = (*lake.options, *WRITABLE, "--ttl=600", "--upload-delay=0.3", "--workers=2")
        if request.param == "no passthrough":
            options += ("--passthrough=off",)
        yield mounting.mount(lake.url, *options, environment=environment)


@pytest.fixture
def work(mount: LiveMount, request: pytest.FixtureRequest) -> Path:
    """A directory of the test's own."""
    made = mount.directory / "".join(c if c.isalnum() else "-" for c in request.node.name)
    made.mkdir()
    return made


def fails_with(code: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == code, f"{errno.errorcode[caught.value.errno]}, not {errno.errorcode[code]}"


def renameat2(old: Path, new: Path, flags: int) -> None:
    if _libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def drop_pages(fd: int) -> None:
    """Have the next read come to us."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


# Content


@pytest.mark.parametrize("size_bytes", [0, 1, 4095, 4097, 131_072, 3 * MIB + 1])
def test_what_is_written_is_read(work: Path, size_bytes: int) -> None:
    path, body = work / f"{size_bytes}", content(size_bytes, seed=1)
    path.write_bytes(body)
    assert path.read_bytes() == body
    assert os.stat(path).st_size == size_bytes
    with path.open("rb") as file:
        drop_pages(file.fileno())
        assert file.read() == body


@pytest.fixture
def body_file(work: Path) -> Iterator[tuple[Path, int]]:
    fd = os.open(work / "file", os.O_RDWR | os.O_CREAT)
    yield work / "file", fd
    os.close(fd)


def test_random_writes_truncations_and_reads_agree_with_a_model(body_file: tuple[Path, int]) -> None:
    path, fd = body_file
    seed = random.randrange(1 << 32)
    roll, model = random.Random(seed), bytearray()
    print("seed", seed)
    for _ in range(400):
        choice = roll.random()
        if choice < 0.5:
            offset, piece = (
                roll.randrange(2 * MIB),
                roll.randbytes(roll.choice([1, 100, 4096, 70_000, 300_000])),
            )
            assert os.pwrite(fd, piece, offset) == len(piece)
            model.extend(bytes(max(0, offset - len(model))))
            model[offset : offset + len(piece)] = piece
        elif choice < 0.6:
            size = roll.randrange(2 * MIB)
            os.ftruncate(fd, size) if roll.random() < 0.5 else os.truncate(path, size)
            del model[size:]
            model.extend(bytes(size - len(model)))
        elif choice < 0.65:
            drop_pages(fd)
        else:
            offset, length = roll.randrange(2 * MIB), roll.choice([1, 5000, 200_000])
            assert os.pread(fd, length, offset) == bytes(model[offset : offset + length])
        assert os.fstat(fd).st_size == len(model)
    drop_pages(fd)
    assert path.read_bytes() == bytes(model)


def test_holes_read_as_zeroes_and_take_no_room(work: Path) -> None:
    with (work / "file").open("w+b", buffering=0) as file:
        file.seek(50 * MIB)
        file.write(b"end")
        drop_pages(file.fileno())
        assert os.pread(file.fileno(), MIB, 20 * MIB) == bytes(MIB)
        assert os.fstat(file.fileno()).st_size == 50 * MIB + 3
        assert os.fstat(file.fileno()).st_blocks * 512 < MIB
        assert os.lseek(file.fileno(), 0, SEEK_DATA) in (0, 50 * MIB)
        assert os.lseek(file.fileno(), 50 * MIB, SEEK_HOLE) == 50 * MIB + 3


def test_a_part_of_an_object_is_overwritten_and_the_rest_stays(mount: LiveMount) -> None:
    for name, body in (("small", SMALL), ("large", LARGE)):
        path = mount.directory / "lake" / name
        with path.open("r+b", buffering=0) as file:
            assert os.pwrite(file.fileno(), b"new bytes", 100_000) == 9
            expected = body[:100_000] + b"new bytes" + body[100_009:]
            drop_pages(file.fileno())
            assert os.pread(file.fileno(), len(body) + 1, 0) == expected
        assert path.read_bytes() == expected
        assert os.stat(path).st_size == len(body)


def test_an_object_is_replaced_truncated_grown_and_appended_to(mount: LiveMount) -> None:
    lake = mount.directory / "lake"
    (lake / "again").write_bytes(b"other")
    os.truncate(lake / "cut", 1234)
    os.truncate(lake / "large-cut", 5 * MIB)
    os.truncate(lake / "grown", len(SMALL) + 10)
    os.truncate(lake / "emptied", 0)
    with (lake / "appended").open("ab") as file:
        file.write(b"tail")
    expected = {
        "again": b"other",
        "cut": SMALL[:1234],
        "large-cut": LARGE[: 5 * MIB],
        "grown": SMALL + bytes(10),
        "emptied": b"",
        "appended": SMALL + b"tail",
    }
    for name, body in expected.items():
        assert (lake / name).read_bytes() == body, name
        assert os.stat(lake / name).st_size == len(body), name


def test_an_inode_stays_what_it_is_from_lake_to_staged_and_back(mount: LiveMount) -> None:
    path = mount.directory / "lake/odd"
    before = os.stat(path).st_ino
    with path.open("ab") as file:
        file.write(b"more")
    assert os.stat(path).st_ino == before


def test_a_handle_for_reading_sees_what_another_writes(work: Path) -> None:
    (work / "file").write_bytes(b"one")
    with (work / "file").open("rb", buffering=0) as reading, (work / "file").open("r+b", buffering=0) as file:
        assert reading.read() == b"one"
        file.seek(0, os.SEEK_END)
        file.write(b" two")
        assert reading.read() == b" two"
        os.ftruncate(file.fileno(), 2)
        assert os.pread(reading.fileno(), 10, 0) == b"on"
        assert os.fstat(reading.fileno()).st_size == 2


@pytest.mark.parametrize("name", ["mapped", "large-mapped"])
def test_writes_through_a_mapping_reach_the_file(mount: LiveMount, name: str) -> None:
    path, body = mount.directory / "lake" / name, SMALL if name == "mapped" else LARGE
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        assert mapped[:100] == body[:100]
        mapped[5000:5003] = b"abc"
        mapped[len(body) - 1 :] = b"z"
    expected = body[:5000] + b"abc" + body[5003:-1] + b"z"
    with path.open("rb") as reading:
        drop_pages(reading.fileno())
        assert reading.read() == expected


def test_a_mapping_outlives_its_handle_and_its_name(work: Path) -> None:
    fd = os.open(work / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, MIB)
    mapped = mmap.mmap(fd, MIB)
    other = os.open(work / "file", os.O_RDONLY)
    os.close(fd)
    os.unlink(work / "file")
    mapped[MIB // 2] = 7
    mapped.flush()
    drop_pages(other)
    assert os.pread(other, 1, MIB // 2) == b"\7"
    mapped.close()
    os.close(other)
    assert os.listdir(work) == []


_APPEND = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for number in range(int(sys.argv[3])):
    os.write(fd, (sys.argv[2] + f"{number:06d}" + "." * (number % 50) + "\\n").encode())
"""


def test_two_processes_append_without_losing_a_line(work: Path) -> None:
    command = [sys.executable, "-c", _APPEND, str(work / "file")]
    running = [subprocess.Popen([*command, who, "300"]) for who in "ab"]
    assert [process.wait(60) for process in running] == [0, 0]
    lines = (work / "file").read_text().splitlines()
    assert sorted(lines) == sorted(f"{who}{n:06d}" + "." * (n % 50) for who in "ab" for n in range(300))


def test_writes_beyond_what_an_object_may_have_are_refused(body_file: tuple[Path, int]) -> None:
    path, fd = body_file
    fails_with(errno.EFBIG, os.pwrite, fd, b"x", 5 << 40)
    fails_with(errno.EFBIG, os.truncate, path, (5 << 40) + 1)
    assert os.fstat(fd).st_size == 0


def test_space_is_reserved_where_that_is_asked_for(body_file: tuple[Path, int]) -> None:
    """glibc writes it itself where the file system can't."""
    path, fd = body_file
    os.posix_fallocate(fd, 0, 100_000)
    assert os.stat(path).st_size == 100_000


# Names


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
    (work / ("n" * 255)).write_bytes(b"as long as it may be")
    assert (work / ("n" * 255)).read_bytes() == b"as long as it may be"


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


def test_files_that_are_made_agree_with_the_native_file_system_whatever_is_done_to_them(
    work: Path, tmp_path: Path
) -> None:
    """Each is made, and a few things are done to it while it is open, of which some are the mover's."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    for number in range(150):
        steps = random.Random(seed + number).choices(
            list(_STEPS), k=random.Random(seed - number).randrange(9)
        )
        ours, theirs = _done(work, number, steps), _done(tmp_path, number, steps)
        assert ours == theirs, (number, steps)


_STEPS: dict[str, Callable[[int, Path], object]] = {
    "write": lambda fd, path: os.write(fd, b"x" * 1000),
    "pwrite": lambda fd, path: os.pwrite(fd, b"y" * 10, 5000),
    "fchmod": lambda fd, path: os.fchmod(fd, 0o711),
    "fchmod as it is": lambda fd, path: os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode)),
    "fchmod away": lambda fd, path: os.fchmod(fd, 0o444),
    "chown": lambda fd, path: os.chown(path, 5, 6),
    "fchown as it is": lambda fd, path: os.fchown(fd, os.fstat(fd).st_uid, os.fstat(fd).st_gid),
    "utime": lambda fd, path: os.utime(fd, ns=(os.fstat(fd).st_atime_ns, 1_600_000_000_000_000_005)),
    "utime by path": lambda fd, path: os.utime(path, ns=(1_500_000_000 * 10**9, 1_500_000_000 * 10**9)),
    "truncate": lambda fd, path: os.truncate(path, 700),
    "fsync": lambda fd, path: os.fsync(fd),
    "open again": lambda fd, path: os.close(os.open(path, os.O_RDWR)),
    "setxattr": lambda fd, path: os.setxattr(path, "user.a", b"1"),
    "rename": lambda fd, path: (path.rename(f"{path}-"), Path(f"{path}-").rename(path)),
}


def _done(directory: Path, number: int, steps: list[str]) -> list[object]:
    """Make a file and do *steps*; return what fstat(2) says in between, and its content after the close."""
    path, said = directory / f"file{number}", list[object]()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
    for step in ("write", *steps):
        before = os.fstat(fd)
        _STEPS[step](fd, path)
        now = os.fstat(fd)
        mtime_ns = now.st_mtime_ns if now.st_mtime_ns < 1_650_000_000 * 10**9 else 0
        assert now.st_ctime_ns >= before.st_ctime_ns, step
        said.append((step, now.st_size, now.st_mode, now.st_uid, now.st_gid, now.st_nlink, mtime_ns))
    os.close(fd)
    said.append(path.read_bytes())
    if number % 3 == 0:
        path.unlink()
    return said


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


# Durability, space, the mount


def test_fsync_of_files_and_directories_returns(mount: LiveMount, work: Path) -> None:
    with (work / "file").open("wb") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
        os.rename(work / "file", work / "renamed")
    for path in (work, mount.directory, mount.directory / "lake/large"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def test_statfs_tells_the_room_there_is(mount: LiveMount) -> None:
    room, disk = os.statvfs(mount.directory), os.statvfs(mount.cache)
    assert 0 < room.f_bavail * room.f_frsize <= disk.f_bavail * disk.f_frsize + 64 * MIB
    assert room.f_blocks * room.f_frsize == disk.f_blocks * disk.f_frsize
    assert room.f_namemax == 255 and room.f_favail > 0
    assert subprocess.run(["df", mount.directory], capture_output=True, check=False).returncode == 0


def test_a_small_write_costs_one_request(mounting: Mounting, folder: Folder) -> None:
    """The kernel's question about security.capability, before each of them, is answered in C."""
    mount = mounting.mount(folder.url, *WRITABLE, "--passthrough=off")
    with (mount.directory / "file").open("wb", buffering=0) as file:
        file.write(b"first")
        before = mount.reads()["requests"]["requests"]
        for number in range(200):
            os.pwrite(file.fileno(), b"x" * 100, number * 100)
        assert 200 <= mount.reads()["requests"]["requests"] - before <= 210
        fails_with(errno.ENODATA, os.getxattr, file.fileno(), "security.capability")


def test_what_was_written_is_read_from_the_page_cache(mounting: Mounting, folder: Folder) -> None:
    """Its mtime has changed, but nobody but the kernel wrote it."""
    mount = mounting.mount(folder.url, *WRITABLE)
    body = content(3 * MIB, seed=9)

    def write_and_read() -> None:
        (mount.directory / "file").write_bytes(body)
        os.stat(mount.directory / "file")
        assert mount.read("file") == body

    assert mount.asks_nothing(write_and_read)


def test_all_of_it_is_there_after_a_remount(mounting: Mounting, folder: Folder) -> None:
    folder.put("lake/file", SMALL)
    mount = mounting.mount(folder.url, *WRITABLE, "--upload-delay=600")
    root = mount.directory
    os.makedirs(root / "d/empty")
    (root / "d/new").write_bytes(LARGE)
    os.setxattr(root / "d/new", "user.x", b"kept")
    os.chmod(root / "d/new", 0o604)
    os.utime(root / "d/new", ns=(3, 4_000_000_000))
    os.rename(root / "lake/file", root / "d/moved")
    os.symlink("new", root / "d/link")
    os.mkfifo(root / "d/fifo")
    mount.remount()
    assert sorted(os.listdir(root / "d")) == ["empty", "fifo", "link", "moved", "new"]
    assert (root / "d/link").read_bytes() == LARGE and (root / "d/moved").read_bytes() == SMALL
    shown = os.stat(root / "d/new")
    assert (stat.S_IMODE(shown.st_mode), shown.st_mtime_ns) == (0o604, 4_000_000_000)
    assert os.getxattr(root / "d/new", "user.x") == b"kept"
    assert os.listdir(root / "d/empty") == [] and not (root / "lake/file").exists()


@pytest.mark.parametrize("workers", ["0", "1", "3"])
def test_it_works_with_any_number_of_workers(mounting: Mounting, folder: Folder, workers: str) -> None:
    mount = mounting.mount(folder.url, *WRITABLE, f"--workers={workers}", "--upload-delay=0.1")
    root = mount.directory
    for number in range(40):
        path = root / f"d{number % 4}" / f"{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content(10_000 + number, seed=number))
        os.rename(path, f"{path}.done")
    for number in range(40):
        body = (root / f"d{number % 4}" / f"{number}.done").read_bytes()
        assert body == content(10_000 + number, seed=number)
        assert len(os.listdir(root / f"d{number % 4}")) == 10


def test_past_dirty_max_writers_wait_and_go_on(mounting: Mounting, folder: Folder) -> None:
    mount = mounting.mount(folder.url, *WRITABLE, "--dirty-max=64M", "--upload-delay=0")
    room = os.statvfs(mount.directory)
    assert room.f_bavail * room.f_frsize <= 64 * MIB
    body = content(20 * MIB, seed=3)
    for number in range(6):
        (mount.directory / f"{number}").write_bytes(body)
    for number in range(6):
        assert mount.read(f"{number}") == body
    until(lambda: all((folder.path / f"{number}").exists() for number in range(6)), "all was sent")
    assert "writers wait" in mount.log()


@pytest.mark.parametrize("how", ["close", "fsync"])
def test_where_that_is_asked_for_the_lake_has_it_when_close_and_fsync_return(
    mounting: Mounting, folder: Folder, how: str
) -> None:
    options = ("--durability=local", "--durability=ckpt/*.pt=remote", "--upload-delay=600")
    mount = mounting.mount(folder.url, *WRITABLE, *options)
    os.mkdir(mount.directory / "ckpt")
    for number in range(3):
        fd = os.open(mount.directory / f"ckpt/{number}.pt", os.O_WRONLY | os.O_CREAT)
        os.write(fd, SMALL)
        if how == "fsync":
            os.fsync(fd)
            assert (folder.path / f"ckpt/{number}.pt").read_bytes() == SMALL
        os.close(fd)
        assert (folder.path / f"ckpt/{number}.pt").read_bytes() == SMALL
    (mount.directory / "ckpt/other").write_bytes(SMALL)
    assert not (folder.path / "ckpt/other").exists()


def test_files_that_are_written_while_they_are_sent_end_as_they_were_left(
    mounting: Mounting, folder: Folder
) -> None:
    """Everything is sent at once, so each step meets uploads at another point of theirs."""
    mount = mounting.mount(folder.url, *WRITABLE, "--upload-delay=0")
    seed = random.randrange(1 << 32)
    print("seed", seed)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            models[number] = churn(mount.directory, number, random.Random(seed + number))
        except BaseException as error:
            failures.append(error)

    models: dict[int, dict[str, bytes]] = {}
    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(80)
    assert failures == []
    model = {name: body for found in models.values() for name, body in found.items()}
    assert sorted(os.listdir(mount.directory)) == sorted(model)
    assert {name: mount.read(name) for name in model} == model
    mount.unmount()
    assert {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()} == model


def churn(root: Path, number: int, roll: random.Random) -> dict[str, bytes]:
    """Change files at random, checking each before; return what they hold in the end."""
    model: dict[str, bytes] = {}
    for _ in range(150):
        name = f"{number}-{roll.randrange(4)}"
        path, body = root / name, model.get(name)
        if body is not None:
            assert path.read_bytes() == body, name
        piece, offset = roll.randbytes(roll.choice([10, 5000, 200_000])), roll.randrange(1000)
        match roll.randrange(6):
            case 0 | 1:
                path.write_bytes(piece)
                model[name] = piece
            case 2 if body is not None:
                with path.open("ab") as file:
                    file.write(piece)
                model[name] = body + piece
            case 3 if body is not None and len(body) > offset:
                with path.open("r+b") as file:
                    file.seek(offset)
                    file.write(piece)
                    file.truncate(offset + len(piece))
                model[name] = body[:offset] + piece
            case 4 if body is not None:
                other = f"{number}-{roll.randrange(4)}"
                os.rename(path, root / other)
                model[other] = model.pop(name)
            case 5 if body is not None:
                path.unlink()
                del model[name]
    return model


def test_a_read_only_mount_refuses_every_change(mounting: Mounting, folder: Folder) -> None:
    folder.put("d/file", b"content")
    mount = mounting.mount(folder.url, "--read-only")
    d = mount.directory / "d"
    for call in (
        lambda: (d / "new").write_bytes(b""),
        lambda: (d / "file").open("r+b"),
        lambda: os.truncate(d / "file", 0),
        lambda: os.unlink(d / "file"),
        lambda: os.mkdir(d / "x"),
        lambda: os.rmdir(d),
        lambda: os.rename(d / "file", d / "x"),
        lambda: os.symlink("x", d / "x"),
        lambda: os.chmod(d / "file", 0o600),
        lambda: os.utime(d / "file"),
        lambda: os.setxattr(d / "file", "user.x", b""),
    ):
        fails_with(errno.EROFS, call)
    assert (d / "file").read_bytes() == b"content"
