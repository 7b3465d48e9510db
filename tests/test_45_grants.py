"""Opens that the channel extension answers itself, as the kernel sends them: over a socket, no mount."""

from __future__ import annotations

import errno
import json
import os
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from fusefs import channel
from tests.test_45_channel import KEEP_CACHE, OPEN, RESEND, STATFS, WAYS, Kernel, sanitized

READLINK, UNLINK, RELEASE = 5, 10, 18
GRANTED, NOFLUSH = 1 << 63, 1 << 5
BY_GRANT = KEEP_CACHE | NOFLUSH
OPENED_MAX = 8192  # As in channel.c.

__all__ = ["sanitized"]  # A fixture.

pytestmark = pytest.mark.skipif(channel.load() is not None, reason=str(channel.load()))


class Shown(NamedTuple):
    """*count*: how many have the inode open by a grant. The rest is what happened since the last time."""

    count: int
    requests: int
    opened: list[tuple[int, float]]
    released: list[int]


class Granting(Kernel):
    """Requests are numbered here."""

    unique = 100

    def next(self) -> int:
        self.unique += 2
        return self.unique

    def tell(self, verb: str, inode: int) -> int:
        """Call the method of `Grants`; return 0, or EBUSY where it said no."""
        return self.ask(UNLINK, self.next(), 1, f"{verb} {inode}\0".encode())[0]

    def shown(self, inode: int) -> Shown:
        error, text = self.ask(READLINK, self.next(), inode)
        assert error == 0
        return Shown(*json.loads(text))

    def opens(self, inode: int, flags: int = os.O_RDONLY) -> tuple[int, int]:
        """Return (handle, flags)."""
        return self.open(self.next(), inode, flags)[:2]

    def release(self, inode: int, handle: int, unique: int = 0) -> int:
        body = struct.pack("<QIIQ", handle, 0, 0, 0)
        return self.ask(RELEASE, unique or self.next(), inode, body)[0]


@pytest.fixture(params=WAYS, ids=" ".join)
def kernel(request: pytest.FixtureRequest) -> Iterator[Granting]:
    build, thread = request.param
    environment = request.getfixturevalue("sanitized") if build == "sanitized" else None
    made = Granting("passthrough", "grants", *filter(None, [thread]), environment=environment)
    made.shake_hands()
    yield made
    made.end()
    for word in ("Sanitizer", "runtime error"):
        assert word not in made.stderr, made.stderr


def test_what_has_no_grant_is_opened_and_released_by_python(kernel: Granting) -> None:
    assert kernel.opens(7) == (7, KEEP_CACHE)
    assert kernel.release(7, 7) == 0
    assert kernel.shown(7) == Shown(0, 0, [], [7])


def test_what_has_a_grant_is_opened_and_released_without_python(kernel: Granting) -> None:
    before_s = time.time()
    assert kernel.tell("give", 7) == 0
    assert kernel.opens(7) == kernel.opens(7) == (7 | GRANTED, BY_GRANT)
    count, requests, opened, released = kernel.shown(7)
    assert (count, requests, [inode for inode, _ in opened], released) == (2, 2, [7, 7], [])
    assert before_s - 1 <= opened[0][1] <= opened[1][1] <= time.time() + 1
    assert kernel.release(7, 7 | GRANTED) == 0
    assert kernel.shown(7) == Shown(1, 1, [], [])
    assert kernel.release(7, 7 | GRANTED) == 0
    assert kernel.shown(7) == Shown(0, 1, [], [])


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_DIRECT])
def test_other_ways_to_open_are_pythons(kernel: Granting, flags: int) -> None:
    kernel.tell("give", 7)
    if flags == os.O_WRONLY:  # The peer refuses it, so it has seen it.
        assert kernel.ask(OPEN, kernel.next(), 7, struct.pack("<II", flags, 0)) == (errno.EACCES, b"")
    else:
        assert kernel.opens(7, flags) == (7, KEEP_CACHE)
    assert kernel.shown(7)[:3] == (0, 0, [])


def test_python_gets_the_releases_of_a_grant_that_was_withdrawn(kernel: Granting) -> None:
    kernel.tell("give", 7)
    kernel.opens(7), kernel.opens(7)
    kernel.tell("withdraw", 7)
    assert kernel.opens(7) == (7, KEEP_CACHE)
    assert kernel.release(7, 7 | GRANTED) == 0
    assert kernel.shown(7)[0] == 2, "it is counted by whoever gets it"
    kernel.tell("closed", 7)
    kernel.tell("closed", 7)
    kernel.tell("closed", 7)  # One too many does no harm.
    count, _, _, released = kernel.shown(7)
    assert (count, released) == (0, [7 | GRANTED])
    assert kernel.tell("give", 7) == 0
    assert kernel.opens(7) == (7 | GRANTED, BY_GRANT)


def test_a_grant_may_be_given_again_while_some_of_the_old_are_open(kernel: Granting) -> None:
    kernel.tell("give", 7)
    kernel.opens(7)
    kernel.tell("withdraw", 7)
    assert kernel.tell("give", 7) == 0
    assert kernel.opens(7) == (7 | GRANTED, BY_GRANT)
    assert kernel.shown(7)[0] == 2
    kernel.release(7, 7 | GRANTED), kernel.release(7, 7 | GRANTED)
    assert kernel.shown(7)[0] == 0


def test_an_inode_that_is_open_keeps_its_place(kernel: Granting) -> None:
    """Of eight places."""
    kernel.tell("give", 1)
    kernel.opens(1)
    refused = [inode for inode in range(2, 100) if kernel.tell("give", inode) == errno.EBUSY]
    assert 0 < len(refused) < 40
    assert kernel.opens(refused[0]) == (refused[0], KEEP_CACHE)
    kernel.release(1, 1 | GRANTED)
    assert kernel.tell("give", refused[0]) == 0
    assert kernel.opens(refused[0]) == (refused[0] | GRANTED, BY_GRANT)
    assert kernel.opens(1) == (1, KEEP_CACHE), "the other has its place now"


@pytest.mark.parametrize("inode", [1 << 40, (1 << 64) - 1])
def test_inodes_that_no_word_holds_get_no_grant(kernel: Granting, inode: int) -> None:
    assert kernel.tell("give", inode) == errno.EBUSY
    assert kernel.shown(inode)[0] == 0


def test_what_is_sent_again_is_counted_once_or_once_too_often(kernel: Granting) -> None:
    """Whoever had it first may have counted it and died: never is an open file taken for closed."""
    kernel.tell("give", 7)
    assert kernel.open(kernel.next() | RESEND, 7)[0] == 7, "Python counts it"
    kernel.opens(7)
    assert kernel.release(7, 7 | GRANTED, kernel.next() | RESEND) == 0
    count, _, _, released = kernel.shown(7)
    assert (count, released) == (1, [])


def test_when_nobody_asks_what_was_opened_python_opens(kernel: Granting) -> None:
    kernel.tell("give", 7)
    for _ in range(OPENED_MAX):
        assert kernel.opens(7)[0] == 7 | GRANTED
        assert kernel.release(7, 7 | GRANTED) == 0
    assert kernel.opens(7) == (7, KEEP_CACHE)
    assert len(kernel.shown(7).opened) == OPENED_MAX
    assert kernel.opens(7) == (7 | GRANTED, BY_GRANT)


def test_many_at_a_time_keep_nobody_else_from_being_answered(kernel: Granting) -> None:
    kernel.tell("give", 7)
    sent = {kernel.next(): number % 10 for number in range(200)}
    for unique, kind in sent.items():
        if kind == 0:
            kernel.send(STATFS, unique)
        else:
            kernel.send(OPEN, unique, 7, struct.pack("<II", os.O_RDONLY, 0))
    while sent:
        unique, error, body = kernel.receive()
        assert error == 0
        if sent.pop(unique):
            assert struct.unpack("<QIi", body) == (7 | GRANTED, BY_GRANT, 0)
    assert kernel.shown(7)[:2] == (180, 180)


def test_a_table_of_a_wrong_size_is_refused() -> None:
    extension = channel.module()
    for table in (bytearray(0), bytearray(24), bytearray(7)):
        with pytest.raises(ValueError, match="power of two"):
            extension.give(table, 1)
        with pytest.raises(ValueError, match="power of two"):
            extension.answer_from(table)
    with pytest.raises((TypeError, BufferError)):
        extension.answer_from(b"read-only")
    with pytest.raises(TypeError):
        extension.answer_from()
