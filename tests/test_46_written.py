"""Files that were made here and are written to: what the channel answers for them, and what Python does."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cache.model import Inode
from cache.opens import OpenTable
from cache.records import Attributes
from fusefs import channel

channel.load()  # Before pyfuse3 is imported, for tests of the channel in this process.

from fusefs.direct import GETATTR, RELEASE, SETATTR, WRITE  # noqa: E402
from fusefs.filesystem import WRITING_BIT  # noqa: E402
from fusefs.replies import pack_attributes, pack_entry, plain_attributes_of  # noqa: E402
from fusefs.written import WrittenFiles  # noqa: E402
from tests.disks import frozen, small_disk  # noqa: E402
from tests.test_46_direct import set_attributes  # noqa: E402
from tests.test_46_writing import Setting  # noqa: E402
from tests.test_46_writing import setting as setting  # noqa: E402

pytestmark = pytest.mark.skipif(channel.load() is not None, reason=str(channel.load()))

HEADER = struct.Struct("=IIQQIIIHH")  # struct fuse_in_header
REPLY = struct.Struct("=IiQ")  # struct fuse_out_header
MODE, UID, GID, SIZE, ATIME, MTIME = 1, 2, 4, 8, 16, 32
MADE = 100  # The number of the CREATE.


class Written:
    """A file that was just made, and the kernel that asks for it."""

    def __init__(self, setting: Setting, inode: Inode, *, answers_cached: bool = True) -> None:
        self.setting, self.inode, self.handle = setting, inode, inode | WRITING_BIT
        self.closed: list[int] = []
        self.files = WrittenFiles(
            setting.filesystem.namespace,
            setting.staging,
            setting.opens,
            setting.counters,
            1,
            setting.budget,
            self.closed.append,
            answers_cached=answers_cached,
        )
        self.reply = self.files.made(inode, MADE)
        self.unique = MADE

    def ask(self, opcode: int, body: bytes = b"", unique: int = 0) -> bytes | None:
        """Return the body of the reply; None where Python is to answer."""
        self.unique += 2
        unique = unique or self.unique
        request = HEADER.pack(HEADER.size + len(body), opcode, unique, self.inode, 0, 0, 0, 0, 0)
        reader, writer = os.pipe()
        with open(reader, "rb") as replies:
            with open(writer, "wb") as device:
                is_answered = channel.module().answer_written(device.fileno(), request + body)
            reply = replies.read()
        assert is_answered == bool(reply)
        if not is_answered:
            return None
        assert REPLY.unpack_from(reply) == (len(reply), 0, unique)
        return reply[REPLY.size :]

    def write(self, offset: int, content: bytes, handle: int = 0) -> bytes | None:
        body = struct.pack("=QQIIQII", handle or self.handle, offset, len(content), 0, 0, 0, 0)
        return self.ask(WRITE, body + content)

    def release(self, unique: int = 0) -> bytes | None:
        return self.ask(RELEASE, struct.pack("=QIIQ", self.handle, 0, 0, 0), unique)

    def change(self, **changes: Any) -> None:
        """Have the mover change the file's node."""
        node = self.setting.index.node(self.inode)
        assert node is not None
        self.setting.mover.put(self.inode, msgspec.structs.replace(node, **changes))
        self.setting.opens.generations.changed({self.inode})

    def status(self) -> os.stat_result:
        node = self.setting.index.node(self.inode)
        assert node is not None
        return self.setting.staging.stat(node.staged)

    def shown_by_python(self) -> Any:
        entry = self.setting.filesystem.namespace.own_entry(self.inode)
        assert entry is not None
        return plain_attributes_of(entry, self.status(), 7, 8)


@pytest.fixture
async def file(setting: Setting) -> Written:
    _, inode = await setting.create()
    setting.opens.closed(inode, writing=True)  # Counted by whoever answers.
    return Written(setting, inode)


def cells(table: OpenTable) -> list[tuple[int, int]]:
    return [(place, value) for place, value in enumerate(table.cells.tolist()) if value]


@pytest.mark.parametrize("answers_cached", [False, True])
async def test_it_is_counted_as_python_counts_it(setting: Setting, answers_cached: bool) -> None:
    _, inode = await setting.create(id=0)
    setting.opens.closed(inode, writing=True)
    theirs = OpenTable()
    for table in (theirs, setting.opens):
        with table.held(inode) as held:  # So that both had the same change last.
            held.opened(), held.closed()
    file = Written(setting, inode, answers_cached=answers_cached)
    with theirs.held(inode) as held:
        held.opened(writing=True, request=MADE)
        if answers_cached:
            held.answered_cached()
    counted = (setting.opens.state(inode), [value for _, value in cells(setting.opens)])
    if not answers_cached:
        assert cells(setting.opens) == cells(theirs)
    assert counted[0] == theirs.state(inode) and counted[0].writers == 1
    assert file.release(unique=300) == b"" and file.closed == [inode]
    theirs.closed(inode, writing=True, request=300)
    assert setting.opens.state(inode) == theirs.state(inode) and not theirs.state(inode).is_open
    setting.opens.closed(inode, writing=True, request=300), setting.opens.opened(inode, request=MADE)
    assert not setting.opens.state(inode).is_open  # It knows both requests.


async def test_its_create_is_answered_as_python_answers_it(file: Written) -> None:
    shown = file.shown_by_python()
    assert file.reply is not None
    # All but how long the name is good for, which is counted from now.
    expected = pack_entry(shown) + struct.pack("=QII", file.handle, 2, 0)
    assert file.reply[:16] == expected[:16] and file.reply[40:] == expected[40:]
    assert struct.unpack_from("=QQI", file.reply, 16)[1] == struct.unpack_from("=QQI", expected, 16)[1]


async def test_it_is_written_and_shown(file: Written) -> None:
    assert file.write(3, b"1234") == struct.pack("=II", 4, 0)
    assert file.setting.bytes_of(file.inode) == b"\0\0\0001234"
    assert file.ask(GETATTR, bytes(16)) == pack_attributes(file.shown_by_python())
    counters = file.setting.counters.totals()
    assert (counters["requests"], counters["bytes_written"]) == (2, 4)


@pytest.mark.parametrize("valid", [MODE, UID | GID, MTIME, MODE | MTIME, UID])
async def test_what_tar_sets_is_set_on_the_staging_file(file: Written, valid: int) -> None:
    file.write(0, b"x")
    before = file.status()
    body = set_attributes(valid, mtime_s=1_600_000_000, mode=stat.S_IFREG | 0o755, uid=1000, gid=100)
    assert file.ask(SETATTR, body) == pack_attributes(file.shown_by_python())
    after = file.status()
    assert after.st_ctime_ns > before.st_ctime_ns
    assert stat.S_IMODE(after.st_mode) == (0o755 if valid & MODE else 0o600)
    wanted_ns = 1_600_000_000 * 10**9 + 5 if valid & MTIME else before.st_mtime_ns
    assert after.st_mtime_ns == wanted_ns and after.st_atime_ns == before.st_atime_ns


@pytest.mark.parametrize(
    ("valid", "more"),
    [
        (SIZE, {}),
        (ATIME | MTIME, {}),
        (UID, {"uid": 5}),
        (GID, {"gid": 5}),
        (MODE, {"mode": 0o4755}),
        (MODE, {"mode": 0o600}),
        (MODE, {"mode": 0o077}),
        (1 << 11 | MODE, {"mode": 0o644}),
        (0, {}),
    ],
)
async def test_what_is_for_the_mover_is_pythons(file: Written, valid: int, more: dict[str, int]) -> None:
    before = file.status()
    assert file.ask(SETATTR, set_attributes(valid, **more)) is None
    assert file.status() == before


async def test_of_a_node_that_changed_python_is_asked(file: Written) -> None:
    file.write(0, b"1")
    file.change(attributes=Attributes(0o640, 5, 6, 1))
    assert file.write(1, b"2") is None and file.ask(GETATTR, bytes(16)) is None
    assert file.ask(SETATTR, set_attributes(MODE, mode=0o644)) is None and file.release() is None
    assert file.setting.opens.state(file.inode).writers == 1 and not file.closed


async def test_a_new_movers_epoch_ends_all_that_is_believed(file: Written) -> None:
    file.setting.opens.generations.begin()
    assert file.ask(GETATTR, bytes(16)) is None


async def test_a_node_that_changes_while_it_is_noted_is_not_believed(setting: Setting) -> None:
    _, inode = await setting.create()
    setting.opens.closed(inode, writing=True)
    namespace: Any = setting.filesystem.namespace
    read = namespace.own_entry

    def changing(inode: Inode) -> Any:
        entry = read(inode)
        setting.opens.generations.changed({inode})
        return entry

    namespace.own_entry = changing
    file = Written(setting, inode)
    assert file.reply is not None and file.ask(GETATTR, bytes(16)) is None


async def test_bytes_that_have_to_wait_or_are_no_writers_are_pythons(file: Written) -> None:
    assert file.write(0, b"x", handle=file.inode) is None  # Of who reads.
    assert file.write(0, b"x" * ((1 << 20) + 1)) is None
    assert file.write(5 << 40, b"x") is None
    cut = struct.pack("=QQIIQII", file.handle, 0, 100, 0, 0, 0, 0) + b"x"
    assert file.ask(WRITE, cut) is None and file.ask(WRITE, cut[:20]) is None
    file.setting.budget.allowed_until = 0
    assert file.write(0, b"x") is None
    assert file.status().st_size == 0


async def test_as_much_as_the_kernel_sends_is_written(file: Written) -> None:
    body = os.urandom(1 << 20)
    for number in range(4):
        assert file.write(number << 20, body) == struct.pack("=II", 1 << 20, 0)
    assert file.setting.bytes_of(file.inode) == body * 4
    assert file.setting.counters.totals()["bytes_written"] == 4 << 20


async def test_where_writers_wait_for_the_disk_python_has_threads_do_it(
    setting: Setting, tmp_path: Path
) -> None:
    _, inode = await setting.create()
    setting.opens.closed(inode, writing=True)
    node = setting.index.node(inode)
    assert node is not None
    body, staged = os.urandom(1 << 20), setting.staging.path(node.staged)
    with small_disk(tmp_path, 64 << 20) as disk:
        os.unlink(staged)
        (disk / "staged").touch()
        os.symlink(disk / "staged", staged)
        file = Written(setting, inode)
        assert file.write(0, body) is not None
        with frozen(disk, for_s=0.05):
            assert file.write(1 << 20, body) is not None
        assert file.write(2 << 20, body) is None
        assert file.write(2 << 20, b"few") is not None
        assert (disk / "staged").read_bytes() == body * 2 + b"few"
        assert file.release() is not None


async def test_of_files_that_were_opened_elsewhere_the_writes_are_answered(setting: Setting) -> None:
    handle, inode = await setting.create()
    file, body = Written(setting, inode), os.urandom(1 << 20)  # Counted by Python: it is not noted.
    assert file.reply is None and file.write(0, body) is None
    setting.writing.written = file.files
    assert await setting.writing.write(handle, 0, body) == len(body)
    assert file.write(1 << 20, body) is not None and file.write(2 << 20, b"few") is not None
    assert setting.bytes_of(inode) == body * 2 + b"few"
    assert setting.counters.totals()["bytes_written"] == (2 << 20) + 3
    assert file.ask(GETATTR, bytes(16)) is None and file.release() is None
    file.change(mtime_ns=1)
    assert file.write(0, b"x") is None
    assert await setting.writing.write(handle, 0, body) == len(body)
    assert file.write(0, b"x") is not None
    setting.opens.closed(inode, writing=True)
    file.files.drop_closed()
    assert file.write(0, b"x") is None


async def test_a_file_that_was_made_here_stays_one_when_python_writes_to_it(file: Written) -> None:
    file.setting.writing.written = file.files
    await file.setting.writing.write(file.handle, 0, bytes(1 << 20))
    assert file.ask(GETATTR, bytes(16)) is not None and file.release() == b""


async def test_a_close_among_others_is_pythons(file: Written) -> None:
    opens = file.setting.opens
    opens.opened(file.inode)
    assert file.release() is None and opens.state(file.inode)[:2] == (1, 1)
    opens.closed(file.inode)
    opens.opened(file.inode, writing=True)
    assert file.release() is None and opens.state(file.inode)[:2] == (0, 2)
    opens.closed(file.inode, writing=True)
    assert file.release() == b"" and not opens.state(file.inode).is_open
    assert file.release() is None and file.closed == [file.inode]


async def test_a_close_that_was_counted_before_is_pythons(file: Written) -> None:
    opens = file.setting.opens
    opens.opened(file.inode, writing=True)
    opens.closed(file.inode, writing=True, request=400)
    assert file.release(unique=400) is None and opens.state(file.inode).writers == 1


async def test_nothing_is_set_once_nobody_writes(file: Written) -> None:
    """The seal may have come meanwhile: another worker closed it."""
    file.setting.opens.closed(file.inode, writing=True)
    assert file.ask(SETATTR, set_attributes(MODE, mode=0o644)) is None
    assert stat.S_IMODE(file.status().st_mode) == 0o600


async def test_what_others_have_open_already_is_counted_by_python(setting: Setting) -> None:
    _, inode = await setting.create()
    file = Written(setting, inode)
    assert file.reply is None and setting.opens.state(inode).writers == 1
    assert file.ask(GETATTR, bytes(16)) is None


async def test_nobody_waits_for_a_lock(file: Written) -> None:
    """Held by a thread of this process, or by another process, which may be dead in a moment."""
    with file.setting.opens.held(file.inode):
        assert file.release() is None
    locked, done = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        fcntl.lockf(file.setting.opens.fd, fcntl.LOCK_EX)
        os.write(locked[1], b".")
        os.close(done[1])
        os.read(done[0], 1)
        os._exit(0)
    os.read(locked[0], 1)
    assert file.release() is None
    assert file.ask(SETATTR, set_attributes(MODE, mode=0o644)) is None
    os.close(done[1])
    os.waitpid(child, 0)  # noqa: ASYNC222  # It ends at once.
    assert file.release() == b""
    for fd in (*locked, done[0]):
        os.close(fd)


async def test_a_change_that_a_dead_process_began_is_finished_by_python(file: Written) -> None:
    opens, base = file.setting.opens, file.setting.opens._base(file.inode)
    slot = opens._slot(base, 0)
    assert slot is not None
    opens.cells[base + 1], opens.cells[base + 2] = 1, 999  # Its value and inode; then its place.
    opens.cells[base] = 8 + 28 + slot
    assert file.release() is None
    assert opens.closed(file.inode, writing=True).is_open is False
    assert opens.cells[base] == 0 and opens.cells[base + 8 + slot] == 999


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_descriptors_end_with_the_file(setting: Setting) -> None:
    made = [await setting.create(b"%d" % number, 0) for number in range(300)]
    for _, inode in made:
        setting.opens.closed(inode, writing=True)
    setting.staging.release_idle(), setting.staging.release_idle()
    file = Written(setting, made[0][1])
    before = descriptors()
    assert all(file.files.made(inode, 0) for _, inode in made[1:])
    assert descriptors() - before == 255  # Others' places were taken: those are Python's.
    for _, inode in made:
        setting.opens.closed(inode, writing=True)  # By another worker.
    file.files.drop_closed()
    assert descriptors() == before - 1


def test_generations_are_of_all_processes() -> None:
    generations = OpenTable().generations
    first, other = generations.of(7), generations.of(8)
    if (child := os.fork()) == 0:
        generations.changed([7])
        os._exit(0)
    os.waitpid(child, 0)
    assert generations.of(7) != first and generations.of(8) == other
    generations.begin()
    assert generations.of(8) != other
