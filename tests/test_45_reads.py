"""Reads of cached files by the channel extension, as the kernel sends them: over a socket, no mount."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.model import BLOCK_BYTES, KIB
from fusefs import channel
from tests.test_45_channel import READ, WAYS, Kernel, sanitized

BLOCKS_MAX = 80  # As in reads.c.
SIZES = {1: 3 * BLOCK_BYTES + 100, 2: 110_000, 3: 1, 4: 90 * BLOCK_BYTES}

__all__ = ["sanitized"]  # A fixture.

pytestmark = pytest.mark.skipif(channel.load() is not None, reason=str(channel.load()))


class Reading(Kernel):
    def __init__(self, directory: Path, *arguments: str, environment: dict[str, str] | None) -> None:
        super().__init__(f"reads={directory}", *arguments, environment=environment)
        self.directory = directory
        self.unique = 100

    def send_read(self, inode: int, offset: int, length: int) -> int:
        self.unique += 2
        self.send(READ, self.unique, inode, struct.pack("<QQIIQII", 7, offset, length, 0, 0, 0, 0))
        return self.unique

    def read(self, inode: int, offset: int, length: int) -> bytes:
        unique = self.send_read(inode, offset, length)
        answered, error, body = self.receive()
        assert (answered, error) == (unique, 0)
        return body

    def good(self, inode: int) -> bytes:
        return (self.directory / f"{inode}.good").read_bytes()

    def is_on_disk_alone(self, inode: int) -> None:
        """Have the kernel forget the file's pages, so that a thread reads it."""
        fd = os.open(self.directory / str(inode), os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@pytest.fixture(params=WAYS, ids=" ".join)
def kernel(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Reading]:
    build, thread = request.param
    environment = request.getfixturevalue("sanitized") if build == "sanitized" else None
    for inode, size in SIZES.items():
        content = random.Random(inode).randbytes(size)
        (tmp_path / str(inode)).write_bytes(content)
        (tmp_path / f"{inode}.good").write_bytes(content)
    made = Reading(tmp_path, *filter(None, [thread]), environment=environment)
    made.shake_hands()
    yield made
    made.end()
    for word in ("Sanitizer", "runtime error"):
        assert word not in made.stderr, made.stderr


@pytest.mark.parametrize("from_disk", [False, True])
def test_any_part_of_a_file_is_read(kernel: Reading, from_disk: bool) -> None:
    for inode, size in SIZES.items():
        for offset, length in ((0, 128 * KIB), (size // 2, 4 * KIB), (BLOCK_BYTES, 1), (size - 1, 4 * KIB)):
            if offset < size:
                if from_disk:
                    kernel.is_on_disk_alone(inode)
                assert kernel.read(inode, offset, length) == kernel.good(inode)[offset : offset + length]


def test_many_reads_at_once_are_all_answered(kernel: Reading) -> None:
    """More than threads, and more than are kept for them: the others go the usual way."""
    for inode in SIZES:
        kernel.is_on_disk_alone(inode)
    wanted, roll = {}, random.Random(4)
    for _ in range(100):
        inode = roll.choice([2, 4])
        offset = roll.randrange(SIZES[inode])
        wanted[kernel.send_read(inode, offset, 99)] = kernel.good(inode)[offset : offset + 99]
    for _ in range(len(wanted)):
        unique, error, body = kernel.receive()
        assert error == 0 and body in (wanted.pop(unique), b"7")


@pytest.mark.parametrize("from_disk", [False, True])
@pytest.mark.parametrize("what", ["gone", "short", "other bytes", "a directory"])
def test_what_is_not_as_it_should_be_is_left_to_python(kernel: Reading, what: str, from_disk: bool) -> None:
    path = kernel.directory / "2"
    if what == "short":
        os.truncate(path, 50_000)
    elif what == "other bytes":
        with path.open("r+b") as file:
            file.seek(70_000)
            file.write(b"other")
    else:
        path.unlink()
        if what == "a directory":
            path.mkdir()
    if from_disk and path.is_file():
        kernel.is_on_disk_alone(2)
    assert kernel.read(2, 60_000, 30_000) in (b"7", b"failed 7 60000 30000")
    assert kernel.read(4, 0, 5) == kernel.good(4)[:5]


def test_other_blocks_do_not_matter(kernel: Reading) -> None:
    with (kernel.directory / "2").open("r+b") as file:
        file.write(b"other")
    assert kernel.read(2, BLOCK_BYTES, 30_000) == kernel.good(2)[BLOCK_BYTES : BLOCK_BYTES + 30_000]


def test_what_is_longer_than_its_buffers_goes_the_usual_way(kernel: Reading) -> None:
    assert kernel.read(4, 0, (BLOCKS_MAX + 1) * BLOCK_BYTES) == b"7"
