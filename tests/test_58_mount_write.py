"""Files on writable mounts: their content, by ordinary calls and mappings.

What the lake has of it in the end is tested elsewhere: here is what a program sees.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounting import MIB, LiveMount, content
from tests.writable_mounts import KINDS, LARGE, SMALL, drop_pages, fails_with, mounted_writable


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


SEEK_DATA, SEEK_HOLE = os.SEEK_DATA, os.SEEK_HOLE

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


# Attributes of what is open


def test_files_that_are_made_agree_with_the_native_file_system_whatever_is_done_to_them(
    work: Path, tmp_path: Path
) -> None:
    """Each is made, and a few things are done to it while it is open, of which some are the mover's."""
    seed = 58
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
