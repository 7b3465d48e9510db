"""Requests that are answered without pyfuse3: what the kernel is told is what pyfuse3 would tell it."""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cache import messages
from cache.counters import Counters
from cache.messages import Answer
from cache.model import CONTROL_NAME, ROOT_INODE
from cache.records import DirectoryState
from fusefs import channel

channel.load()  # Before pyfuse3 is imported, for tests of the channel in this process.

from fusefs import direct  # noqa: E402
from fusefs.control import CONTROL_BIT, ControlDirectory  # noqa: E402
from fusefs.direct import CREATE, GETATTR, LOOKUP, RELEASE, SETATTR, WRITE, DirectAnswers  # noqa: E402
from fusefs.filesystem import WRITING_BIT  # noqa: E402
from tests.test_46_writing import Setting  # noqa: E402
from tests.test_46_writing import setting as setting  # noqa: E402

LATER = -1
FOUND = struct.Struct("=QQQQIIQQQqqq10I")  # struct fuse_entry_out
STATED = struct.Struct("=QIIQQQqqq10I")  # struct fuse_attr_out


class Asking:
    """A mover's line that answers when `answer` is called."""

    def __init__(self) -> None:
        self.asked: list[tuple[messages.Request, int, Callable[[Answer], None]]] = []

    def ask_then(self, request: messages.Request, id: int, then: Callable[[Answer], None]) -> int:
        self.asked.append((request, id, then))
        return len(self.asked)


class Kernel:
    """What is answered directly, and what later."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.mover = setting, Asking()
        self.replies: list[tuple[int, Any]] = []
        self.is_heard = True
        self.unique = 100
        mover: Any = self.mover
        control = ControlDirectory(mover, read_only=False)
        self.counters = Counters(2)
        self.answers = DirectAnswers(
            setting.filesystem, setting.writing, control, mover, self.counters.row(1), (7, 8)
        )

    def reply(self, unique: int, result: Any) -> bool:
        self.replies.append((unique, result))
        return self.is_heard

    def ask(self, opcode: int, inode: int, body: bytes = b"") -> Any:
        self.unique += 2
        return self.answers.answer(opcode, self.unique, inode, 1000, 100, body)

    def create(self, name: bytes, flags: int = os.O_RDWR | os.O_CREAT) -> Any:
        return self.ask(CREATE, ROOT_INODE, struct.pack("=IIII", flags, 0o100640, 0, 0) + name + b"\0")

    async def made(self, name: bytes) -> tuple[int, int]:
        """Make a file; return its inode and handle."""
        assert self.create(name) == LATER
        request, id, then = self.mover.asked.pop()
        answer = await self.setting.mover.ask(request, id)
        then(answer)
        unique, reply = self.replies.pop()
        assert unique == self.unique and len(reply) == FOUND.size + 16
        return FOUND.unpack_from(reply)[0], struct.unpack_from("=Q", reply, FOUND.size)[0]


@pytest.fixture
def kernel(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel(setting)
    monkeypatch.setattr(direct.channel, "module", lambda: SimpleNamespace(reply=made.reply))
    yield made


def set_attributes(valid: int, *, mtime_s: int = 0, mode: int = 0, uid: int = 0, gid: int = 0) -> bytes:
    return struct.pack("=IIQQQqqqIIIIIIII", valid, 0, 0, 0, 0, 0, mtime_s, 0, 0, 5, 0, mode, 0, uid, gid, 0)


async def test_a_file_is_made_written_shown_and_closed(kernel: Kernel) -> None:
    inode, handle = await kernel.made(b"file")
    assert handle == inode | WRITING_BIT and kernel.setting.opens.state(inode).writers == 1
    body = struct.pack("=QQIIQII", handle, 3, 4, 0, 0, 0, 0) + b"1234"
    assert kernel.ask(WRITE, inode, body) == struct.pack("=II", 4, 0)
    assert kernel.setting.bytes_of(inode) == b"\0\0\0001234"
    fields = STATED.unpack(kernel.ask(GETATTR, inode))
    assert (fields[3], fields[4], fields[12]) == (inode, 7, stat.S_IFREG | 0o640)
    assert fields[14:16] == (1000, 100)
    assert kernel.ask(RELEASE, inode, struct.pack("=QIIQ", handle, 0, 0, 0)) == 0
    assert not kernel.setting.opens.state(inode).is_open
    assert kernel.setting.mover.told == [messages.Closed(inode)]
    assert kernel.counters.total("requests") == 4


async def test_a_name_is_found_or_known_to_be_absent_or_left_to_the_lake(kernel: Kernel) -> None:
    assert kernel.ask(LOOKUP, ROOT_INODE, b"none\0") is None  # Nobody has listed the directory.
    inode, _ = await kernel.made(b"file")
    assert FOUND.unpack(kernel.ask(LOOKUP, ROOT_INODE, b"file\0"))[0] == inode
    with kernel.setting.index.write() as w:
        w.set_directory(ROOT_INODE, DirectoryState(time.time(), 1, 1, 0.0))
    fields = FOUND.unpack(kernel.ask(LOOKUP, ROOT_INODE, b"none\0"))
    assert fields[0] == 0 and fields[2] > 0


async def test_what_is_not_simple_goes_the_usual_way(kernel: Kernel) -> None:
    inode, handle = await kernel.made(b"file")
    assert kernel.ask(LOOKUP, ROOT_INODE, CONTROL_NAME + b"\0") is None
    assert kernel.ask(LOOKUP, ROOT_INODE, b"..\0") is None
    assert kernel.ask(LOOKUP, ROOT_INODE, b"n" * 300 + b"\0") is None
    assert kernel.ask(GETATTR, CONTROL_BIT | 1) is None
    assert kernel.ask(GETATTR, 999) is None  # ESTALE is the usual way's.
    clean = kernel.setting.clean(b"clean", 10)
    body = struct.pack("=QQIIQII", clean | WRITING_BIT, 0, 1, 0, 0, 0, 0) + b"x"
    assert kernel.ask(WRITE, clean, body) is None  # It is to be staged.
    kernel.setting.budget.allowed_until = 0
    body = struct.pack("=QQIIQII", handle, 0, 1, 0, 0, 0, 0) + b"x"
    assert kernel.ask(WRITE, inode, body) is None  # It is to wait for room.
    assert kernel.ask(SETATTR, inode, set_attributes(1 << 3)) is None  # truncate
    assert kernel.ask(SETATTR, inode, set_attributes(1 << 4 | 1 << 5)) is None  # atime
    assert not kernel.mover.asked


async def test_what_the_mover_refuses_has_its_errno(kernel: Kernel) -> None:
    for error, flags, code in (
        ("NameExists", os.O_EXCL, errno.EEXIST),
        ("NameExists", 0, errno.ESTALE),
        ("StagingFull", 0, errno.ENOSPC),
        ("MoverUnavailable", 0, errno.EIO),
    ):
        assert kernel.create(b"file", flags) == LATER
        kernel.mover.asked.pop()[2](Answer(0, error=error, text="refused"))
        assert kernel.replies.pop() == (kernel.unique, code)
    assert kernel.counters.total("errors") == 2


async def test_a_creation_that_another_worker_answered_leaves_the_file_open(kernel: Kernel) -> None:
    """The kernel sent it again, and both counted the same open: it is the other one's to count off."""
    kernel.is_heard = False
    inode, _ = await kernel.made(b"file")
    assert kernel.setting.opens.state(inode).writers == 1
    assert not kernel.setting.mover.told


async def test_what_tar_sets_of_an_open_file_asks_nobody(kernel: Kernel) -> None:
    inode, handle = await kernel.made(b"file")
    assert STATED.unpack(kernel.ask(SETATTR, inode, set_attributes(1 << 5, mtime_s=77)))[7] == 77
    owned = STATED.unpack(kernel.ask(SETATTR, inode, set_attributes(1 << 1 | 1 << 2, uid=1000, gid=100)))
    assert owned[7] == 77
    moded = STATED.unpack(kernel.ask(SETATTR, inode, set_attributes(1 << 0, mode=0o100644)))
    assert (moded[7], moded[12]) == (77, stat.S_IFREG | 0o644)
    assert not kernel.mover.asked
    kernel.ask(RELEASE, inode, struct.pack("=QIIQ", handle, 0, 0, 0))
    assert kernel.ask(SETATTR, inode, set_attributes(1 << 0, mode=0o600)) == LATER  # It is closed.
    request, id, then = kernel.mover.asked.pop()
    assert (request, id) == (messages.SetAttributes(inode, mode=0o600), kernel.unique)
    then(Answer(0))
    assert kernel.replies.pop()[0] == kernel.unique


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o4755, 0o1777])
async def test_a_mode_that_a_staging_file_cant_have_is_the_movers(kernel: Kernel, mode: int) -> None:
    inode, _ = await kernel.made(b"file")
    kernel.ask(SETATTR, inode, set_attributes(1 << 0, mode=0o664))
    assert kernel.ask(SETATTR, inode, set_attributes(1 << 0, mode=mode)) == LATER
    assert kernel.mover.asked[0][0] == messages.SetAttributes(inode, mode=mode)


def test_the_wire_formats_have_the_kernels_sizes() -> None:
    """linux/fuse.h."""
    assert (FOUND.size, STATED.size) == (128, 104)
    assert direct._SETATTR_REQUEST.size == 88 and direct._WRITE_REQUEST.size == 40
