"""A disk that power can be cut from, at any write: ext4 on a loop device over a recording filesystem.

`RecordedDisk` mounts one. Its image is a file that `tests.recording_disk` serves, so each write and each
flush that reaches the disk is in `records`, in order. `image_after(cut, seed)` makes the image that a power
loss leaves when the first *cut* records had reached the disk: all that came before the last flush among
them, and of what came after it any subset, by *seed*. `mounted` attaches such an image, whereby ext4
replays its journal. Writes are whole or lost in units of ATOM_BYTES, as on disks with sectors of 4 KiB:
ext4 itself does not outlive a superblock of which only a half was written.
"""

from __future__ import annotations

import os
import random
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.mounting import MIB, detach, guardian, until
from tests.recording_disk import FLUSH, HEAD, WRITE

ATOM_BYTES = 4096
SIZE_BYTES = 256 * MIB
ENDS_WITHIN_S = 20.0
# Without auto_da_alloc, ext4 does not write out a file that a rename puts over another one: what relies
# on that is found. commit=1: metadata goes to the disk more often than every 5 s, ahead of unsynced content.
_OPTIONS = "noauto_da_alloc,nodiscard,noinit_itable,commit=1"


@dataclass(frozen=True, slots=True)
class Record:
    """*at_ns*: CLOCK_MONOTONIC when it had not been answered yet. A flush has no content."""

    kind: bytes
    at_ns: int
    offset: int
    content: bytes


def read_records(path: Path) -> list[Record]:
    """Return all records that are complete."""
    raw, place, found = path.read_bytes(), 0, []
    while place + HEAD.size <= len(raw):
        kind, at_ns, offset, length = HEAD.unpack_from(raw, place)
        place += HEAD.size + length
        if place > len(raw):
            break
        found.append(Record(kind, at_ns, offset, raw[place - length : place]))
    return found


def surviving(records: Sequence[Record], cut: int, roll: random.Random) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of what a power loss leaves of the first *cut* records, in order.

    Of the atoms written after the last flush none, all or a random half survive.
    """
    flushed = max((n + 1 for n in range(cut) if records[n].kind == FLUSH), default=0)
    share = roll.choice((0.0, 0.5, 0.5, 1.0))
    for number, record in enumerate(records[:cut]):
        if record.kind == WRITE and number < flushed:
            yield record.offset, record.content
        elif record.kind == WRITE:
            for start in range(0, len(record.content), ATOM_BYTES):
                if roll.random() < share:
                    yield record.offset + start, record.content[start : start + ATOM_BYTES]


def make_image(image: Path, size_bytes: int = SIZE_BYTES) -> None:
    """Make a sparse file with an empty ext4 in it."""
    with image.open("wb") as file:
        file.truncate(size_bytes)
    options = ["-m", "0", "-J", "size=8", "-E", "lazy_itable_init=1,nodiscard"]
    subprocess.run(["mkfs.ext4", "-q", *options, image], check=True)


@contextmanager
def mounted(image: Path, mountpoint: Path, *, direct: bool = False) -> Iterator[Path]:
    """Mount the image through a loop device; whoever still uses it, it is unmounted at the end."""
    mountpoint.mkdir(exist_ok=True)
    attach = ["losetup", "--find", "--show", *(["--direct-io=on"] if direct else []), str(image)]
    device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        subprocess.run(["mount", "-o", _OPTIONS, device, mountpoint], check=True)
    finally:
        # While it is mounted this only marks it: it goes by itself with the last user, should we be killed.
        subprocess.run(["losetup", "-d", device], check=True)
    try:
        yield mountpoint
    finally:
        if subprocess.run(["umount", mountpoint], capture_output=True, check=False).returncode:
            detach(mountpoint)
        until(lambda: not _is_attached(device, image), f"{device} is free again", ENDS_WITHIN_S)


def attached_images() -> dict[str, str]:
    """Return loop devices that are in use, and the files behind them."""
    listing = subprocess.run(
        ["losetup", "-l", "-n", "-O", "NAME,BACK-FILE"], check=True, capture_output=True, text=True
    )
    return dict(line.split(None, 1) for line in listing.stdout.splitlines() if " " in line.strip())


def _is_attached(device: str, image: Path) -> bool:
    return attached_images().get(device, "").startswith(str(image))


class RecordedDisk:
    """A mounted disk at *home*/disk with a record of all that reaches it. Gone when the block ends.

    *image* is what it starts from (it is not changed); an empty filesystem without it.
    """

    def __init__(self, home: Path, image: Path | None = None) -> None:
        self.home, self.mountpoint = home, home / "disk"
        self._start, self._served = home / "start.img", home / "served"
        self._records = home / "records"
        self._exits = ExitStack()
        home.mkdir(exist_ok=True)
        if image is None:
            make_image(self._start)
        else:
            _copy(image, self._start)

    def __enter__(self) -> Self:
        with ExitStack() as exits:
            exits.enter_context(guardian(self.home))
            self._process = exits.enter_context(self._serving())
            exits.enter_context(mounted(self._served / "image", self.mountpoint, direct=True))
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave nothing, not even the images."""
        self.thaw()
        self._exits.close()
        for image in [*self.home.glob("*.img"), self._records]:
            image.unlink(missing_ok=True)

    @property
    def records(self) -> list[Record]:
        return read_records(self._records)

    @property
    def flushes(self) -> int:
        """Return how many flushes there were so far."""
        return sum(record.kind == FLUSH for record in self.records)

    def freeze_at(self, flush: int) -> None:
        """Let nothing reach the disk any more from that flush on (they count from 1)."""
        self._tell(f"freeze {flush}")

    def wait_frozen(self) -> int:
        """Wait until it is frozen; return how many records there were before."""
        until(self.is_frozen, "the disk is frozen")
        assert self._process.stdout is not None
        line = self._process.stdout.readline().split()
        assert line[:1] == ["frozen"], line
        return int(line[1])

    def is_frozen(self) -> bool:
        """Return whether `wait_frozen` would not wait."""
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def thaw(self) -> None:
        self._tell("thaw")

    def image_after(self, cut: int, seed: int) -> Path:
        """Return a new image: what a power loss leaves once the first *cut* records had arrived."""
        image = self.home / f"after-{cut}-{seed}.img"
        _copy(self._start, image)
        with image.open("r+b", buffering=0) as file:
            for offset, content in surviving(self.records, cut, random.Random(f"{cut}/{seed}")):
                os.pwrite(file.fileno(), content, offset)
        return image

    @contextmanager
    def power_lost(self, cut: int, seed: int) -> Iterator[Path]:
        """Mount what `image_after` leaves, beside the disk itself; unmounted and removed at the end."""
        image = self.image_after(cut, seed)
        try:
            with mounted(image, self.home / "after") as mountpoint:
                yield mountpoint
        finally:
            image.unlink()

    def _tell(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    @contextmanager
    def _serving(self) -> Iterator[subprocess.Popen[str]]:
        """Serve a copy of the image, until the block ends."""
        backing = self.home / "backing.img"
        _copy(self._start, backing)
        self._served.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.recording_disk", self._served, backing, self._records],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", "the recording disk does not start"
            yield process
        finally:
            if subprocess.run(["umount", self._served], capture_output=True, check=False).returncode:
                detach(self._served)
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Wait for the server's end, which follows its mount's; make it end if it does not."""
    try:
        process.communicate(timeout=ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _copy(source: Path, target: Path) -> None:
    """Copy with the holes kept."""
    subprocess.run(["cp", "--sparse=always", source, target], check=True)
