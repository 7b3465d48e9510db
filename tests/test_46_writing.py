"""The verbs that change something, over a mover that keeps an index and does as it is told."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import trio

from cache import errors, messages
from cache.counters import Counters, WriteBudget
from cache.errors import (
    AttributeMissing,
    CacheError,
    FileTooLarge,
    NameExists,
    NameTooLong,
    NotSupported,
    ObjectChanged,
    ObjectMissing,
    StagingFull,
)
from cache.index import Index
from cache.messages import Answer
from cache.model import KIND_DIRECTORY, KIND_FILE, KIND_SYMLINK, OBJECT_BYTES_MAX, ROOT_INODE, Inode
from cache.opens import OpenTable
from cache.policy.freshness import Freshness
from cache.records import Attributes, Node
from cache.staging import StagingFiles
from fusefs import channel

channel.load()  # Before pyfuse3 is imported, for tests of the channel in this process.

from fusefs import writing  # noqa: E402
from fusefs.durability import Durability  # noqa: E402
from fusefs.filesystem import WRITING_BIT, Filesystem  # noqa: E402
from fusefs.guarding import ERRNO_OF, errno_of  # noqa: E402
from fusefs.namespace import Namespace  # noqa: E402
from fusefs.write_gate import WriteGate  # noqa: E402
from fusefs.writing import Owner, Writing  # noqa: E402

KIB = 1 << 10
ME = Owner(1000, 100)


class FakeMover:
    """Makes and stages files in the index at once; notes what it was asked and told."""

    def __init__(self, index: Index, staging: StagingFiles) -> None:
        self.index, self.staging = index, staging
        self.asked: list[tuple[messages.Request, int]] = []
        self.told: list[messages.Request] = []
        self.next_number = 1
        self.on_ask: Callable[[messages.Request], None] = lambda request: None

    async def ask(self, request: messages.Request, id: int = 0) -> Answer:
        await trio.lowlevel.checkpoint()
        self.asked.append((request, id))
        self.on_ask(request)
        match request:
            case messages.Create(parent, name, mode, uid, gid):
                own = Attributes(mode, uid, gid, 1)
                return Answer(
                    0, value=self.add(Node(parent, name, KIND_FILE, staged=self.stage(), attributes=own))
                )
            case messages.MakeDirectory(parent, name, mode, uid, gid):
                own = Attributes(mode, uid, gid, 1)
                return Answer(0, value=self.add(Node(parent, name, KIND_DIRECTORY, attributes=own)))
            case messages.Stage(inode):
                node = self.index.node(inode)
                assert node is not None
                if not node.staged:
                    node = msgspec.structs.replace(node, staged=self.stage())
                    self.put(inode, node)
                return Answer(0, value=node.staged)
        return Answer(0)

    def tell(self, request: messages.Request) -> None:
        self.told.append(request)

    def stage(self) -> int:
        number, self.next_number = self.next_number, self.next_number + 1
        self.staging.create(number)
        return number

    def add(self, node: Node) -> Inode:
        with self.index.write() as w:
            if self.index.child(node.parent, node.name):
                raise NameExists("taken")
            return w.attach(node)

    def put(self, inode: int, node: Node) -> None:
        with self.index.write() as w:
            w.put_node(inode, node)

    def requests(self, kind: type) -> list[messages.Request]:
        return [request for request, _ in self.asked if isinstance(request, kind)]


@dataclass
class Setting:
    index: Index
    staging: StagingFiles
    mover: FakeMover
    opens: OpenTable
    counters: Counters
    budget: WriteBudget
    filesystem: Filesystem
    writing: Writing = field(init=False)

    def __post_init__(self) -> None:
        self.use(Durability((), "local"))

    def use(self, durability: Durability, opens: OpenTable | None = None) -> Writing:
        gate = WriteGate(self.counters, self.counters.row(1), self.budget, self.mover)
        self.writing = Writing(
            self.index, self.mover, self.filesystem, self.staging, opens or self.opens, gate, durability
        )
        return self.writing

    async def create(self, name: bytes = b"file", id: int = 2) -> tuple[int, Inode]:
        return await self.writing.create(ROOT_INODE, name, 0o640, ME, os.O_RDWR, id)

    def bytes_of(self, inode: int) -> bytes:
        node = self.index.node(inode)
        assert node is not None and node.staged
        return Path(self.staging.path(node.staged)).read_bytes()

    def clean(self, name: bytes, size_bytes: int) -> Inode:
        return self.mover.add(Node(ROOT_INODE, name, KIND_FILE, size_bytes, 7, "etag", b"v" * 16))


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    index, staging = Index(tmp_path), StagingFiles(tmp_path)
    staging.prepare()
    with index.write() as w:
        w.add_root()
    mover, counters = FakeMover(index, staging), Counters(3)
    namespace = Namespace(index, mover, Freshness(60.0, False))
    filesystem = Filesystem(index, [], mover, namespace, counters.row(1), staging)
    yield Setting(index, staging, mover, OpenTable(), counters, WriteBudget(), filesystem)
    staging.close()
    index.close()


# Handles


async def test_what_is_created_is_written_where_it_is_staged_and_read_from_there(setting: Setting) -> None:
    handle, inode = await setting.create(id=40)
    assert handle == inode | WRITING_BIT
    assert await setting.writing.write(handle, 0, b"first") == 5
    assert await setting.writing.write(handle, 10, b"second") == 6
    assert setting.bytes_of(inode) == b"first\0\0\0\0\0second"
    assert bytes(await setting.filesystem.read(handle, 3, 100)) == b"st\0\0\0\0\0second"
    assert bytes(await setting.filesystem.read(inode, 16, 10)) == b""
    assert setting.mover.asked == [(messages.Create(ROOT_INODE, b"file", 0o640, 1000, 100), 40)]
    assert setting.counters.total("bytes_written") == 11


async def test_the_mover_hears_of_the_last_writers_close_and_of_no_other(setting: Setting) -> None:
    handle, inode = await setting.create()
    again = await setting.writing.open_file(inode, os.O_WRONLY, 4)
    reading = await setting.writing.open_file(inode, os.O_RDONLY, 6)
    assert (again, reading) == (handle, inode)
    assert setting.opens.state(inode)[:2] == (1, 2)
    setting.writing.release(handle, 8)
    setting.writing.release(reading, 10)
    assert setting.mover.told == []
    setting.writing.release(again, 12)
    assert setting.mover.told == [messages.Closed(inode)]
    assert not setting.opens.state(inode).is_open


async def test_the_mover_hears_of_the_last_close_of_an_unlinked_file(setting: Setting) -> None:
    inode = setting.clean(b"file", 0)
    handle = await setting.writing.open_file(inode, os.O_RDONLY, 2)
    with setting.index.write() as w:
        w.detach(ROOT_INODE, b"file")
    setting.writing.release(handle, 4)
    assert setting.mover.told == [messages.Closed(inode)]


async def test_the_mover_hears_of_a_close_while_it_takes_the_files_name(setting: Setting) -> None:
    """It found the file open, so the node stays until the last close, which the old index does not tell."""
    inode = setting.clean(b"file", 0)
    handle = await setting.writing.open_file(inode, os.O_RDONLY, 0)
    with setting.index.write() as w:
        w.detach(ROOT_INODE, b"file")
        assert not setting.opens.leave_unless_open(inode)
        setting.writing.release(handle, 0)
    assert setting.mover.told == [messages.Closed(inode)]


async def test_an_open_that_fails_is_not_counted(setting: Setting) -> None:
    inode = setting.clean(b"file", 100)

    def refuse(request: messages.Request) -> None:
        raise ObjectChanged("another version")

    setting.mover.on_ask = refuse
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        with pytest.raises(ObjectChanged):
            await setting.writing.open_file(inode, flags, 2)
        assert not setting.opens.state(inode).is_open


@pytest.mark.parametrize("is_gone", [False, True], ids=["stays", "gone"])
async def test_who_opens_what_may_leave_waits_until_that_is_known(setting: Setting, is_gone: bool) -> None:
    """The mover looks who has it open before its transaction; who opens it is counted after that."""
    inode = setting.clean(b"file", 0)

    def end_transaction(request: messages.Request) -> None:
        if isinstance(request, messages.Settle):
            assert setting.opens.state(inode).is_open
            if is_gone:
                with setting.index.write() as w:
                    w.detach(ROOT_INODE, b"file")
                    w.forget(inode)
            setting.opens.left()

    setting.mover.on_ask = end_transaction
    for access in (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_TRUNC, None):
        assert setting.opens.leave_unless_open(inode)

        async def use(access: int | None = access) -> None:
            if access is None:
                await setting.writing.set_size(inode, 0, 0)
            else:
                setting.writing.release(await setting.writing.open_file(inode, access, 0), 0)

        if is_gone:
            with pytest.raises(ObjectMissing):
                await use()
        else:
            await use()
        assert not setting.opens.state(inode).is_open
    assert len(setting.mover.requests(messages.Settle)) == 4


async def test_a_request_that_is_sent_again_is_counted_once(setting: Setting) -> None:
    """The worker that had it died after it counted, before or after it answered."""
    _, inode = await setting.create(id=2)
    setting.writing._counts.opened(inode, writing=True, id=2)
    assert setting.opens.state(inode).writers == 1
    for _ in range(2):
        await setting.writing.set_size(inode, 5, 4)
        assert setting.opens.state(inode).writers == 1
    setting.writing._counts.opened(inode, writing=True, id=6)  # Died within set_size.
    await setting.writing.set_size(inode, 6, 6)
    assert setting.opens.state(inode).writers == 1


async def test_without_a_requests_number_each_truncation_is_counted_off(setting: Setting) -> None:
    """The channel extension tells the numbers."""
    _, inode = await setting.create(id=2)
    for length in (5, 6, 7):
        await setting.writing.set_size(inode, length, 0)
        assert setting.opens.state(inode).writers == 1


async def test_a_name_that_the_kernel_did_not_know_is_looked_up_again(setting: Setting) -> None:
    setting.clean(b"file", 3)
    with pytest.raises(ObjectChanged):
        await setting.create()
    with pytest.raises(NameExists):
        await setting.writing.create(ROOT_INODE, b"file", 0o600, ME, os.O_RDWR | os.O_EXCL, 2)


async def test_names_are_as_long_as_statfs_says(setting: Setting) -> None:
    await setting.create(b"n" * 255)
    with pytest.raises(NameTooLong):
        await setting.create(b"n" * 256)


async def test_in_a_set_group_id_directory_the_group_is_handed_down(setting: Setting) -> None:
    own = Attributes(0o2770, 1, 555, 1)
    parent = setting.mover.add(Node(ROOT_INODE, b"d", KIND_DIRECTORY, attributes=own))
    _, inode = await setting.writing.create(parent, b"f", 0o600, ME, os.O_RDWR, 2)
    below = await setting.writing.make_directory(parent, b"below", 0o700, ME, 4)
    made, directory = setting.index.node(inode), setting.index.node(below)
    assert made is not None and made.attributes is not None and made.attributes.gid == 555
    assert directory is not None and directory.attributes is not None
    assert directory.attributes.mode == stat.S_ISGID | 0o700


async def test_device_nodes_are_refused(setting: Setting) -> None:
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        with pytest.raises(NotSupported):
            await setting.writing.make_node(ROOT_INODE, b"node", kind | 0o600, 5, ME, 2)
    assert setting.mover.asked == []


# Bytes


async def test_a_clean_file_is_staged_at_its_first_write_and_not_before(setting: Setting) -> None:
    inode = setting.clean(b"file", 9 << 20)
    handle = await setting.writing.open_file(inode, os.O_RDWR, 2)
    assert setting.mover.asked == []
    for offset in (0, 4):
        await setting.writing.write(handle, offset, b"abcd")
    assert setting.mover.requests(messages.Stage) == [messages.Stage(inode, -1)]


async def test_truncation_stages_no_more_than_stays(setting: Setting) -> None:
    cut, grown, emptied, same = (setting.clean(name, 1000) for name in (b"a", b"b", b"c", b"d"))
    await setting.writing.set_size(cut, 300, 2)
    await setting.writing.set_size(grown, 5000, 4)
    handle = await setting.writing.open_file(emptied, os.O_RDWR | os.O_TRUNC, 6)
    await setting.writing.set_size(same, 1000, 8)
    staged = [(request.inode, request.keep_bytes) for request in setting.mover.requests(messages.Stage)]  # type: ignore[union-attr]
    assert staged == [(cut, 300), (grown, 1000), (emptied, 0)]
    assert [len(setting.bytes_of(inode)) for inode in (cut, grown, emptied)] == [300, 5000, 0]
    assert setting.mover.told == [messages.Closed(inode) for inode in (cut, grown, same)]
    assert setting.opens.state(emptied).writers == 1 and handle & WRITING_BIT


async def test_a_staged_file_that_grows_is_not_said_to_be_cut(setting: Setting) -> None:
    """Its size in the index is the one that it was sealed with, or none."""
    handle, inode = await setting.create()
    await setting.writing.write(handle, 0, b"x" * 100)
    for id, size_bytes in ((4, 150), (6, 120), (8, 0)):
        await setting.writing.set_size(inode, size_bytes, id)
    requests = setting.mover.requests(messages.Stage)
    assert requests == [messages.Stage(inode, size_bytes) for size_bytes in (150, 120, 0)]


async def test_what_was_cut_off_reads_as_zeroes_when_the_file_grows_again(setting: Setting) -> None:
    handle, inode = await setting.create()
    await setting.writing.write(handle, 0, b"x" * 100)
    await setting.writing.set_size(inode, 10, 4)
    await setting.writing.set_size(inode, 20, 6)
    assert bytes(await setting.filesystem.read(handle, 0, 100)) == b"x" * 10 + b"\0" * 10


@pytest.mark.parametrize("size_bytes", [1, 64 * KIB - 1, 64 * KIB, 1 << 20])
async def test_small_and_large_writes_land_alike(setting: Setting, size_bytes: int) -> None:
    handle, inode = await setting.create()
    body = os.urandom(size_bytes)
    assert await setting.writing.write(handle, 3, body) == size_bytes
    assert setting.bytes_of(inode) == b"\0\0\0" + body


async def test_no_file_grows_above_what_an_object_may_have(setting: Setting) -> None:
    handle, inode = await setting.create()
    with pytest.raises(FileTooLarge):
        await setting.writing.write(handle, OBJECT_BYTES_MAX - 1, b"ab")
    with pytest.raises(FileTooLarge):
        await setting.writing.set_size(inode, OBJECT_BYTES_MAX + 1, 4)
    assert setting.bytes_of(inode) == b""


@pytest.mark.parametrize(
    ("code", "kind", "shown"),
    [
        (errno.ENOSPC, StagingFull, errno.ENOSPC),
        (errno.EDQUOT, StagingFull, errno.ENOSPC),
        (errno.EFBIG, FileTooLarge, errno.EFBIG),
        (errno.EIO, CacheError, errno.EIO),
    ],
)
async def test_a_disk_that_refuses_fails_the_write(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception], shown: int
) -> None:
    handle, _ = await setting.create()

    def refuse(fd: int, body: bytes, offset: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writing.os, "pwrite", refuse)  # type: ignore[attr-defined]
    for size_bytes in (10, 1 << 20):
        with pytest.raises(kind) as caught:
            await setting.writing.write(handle, 0, bytes(size_bytes))
        assert errno_of(caught.value) == shown
    assert setting.counters.total("bytes_written") == 0


async def test_a_disk_that_fills_up_takes_what_fits_and_says_how_much(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, inode = await setting.create()
    pwrite, room = os.pwrite, [1000]

    def fill(fd: int, body: bytes, offset: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "full")
        count = pwrite(fd, body[: min(room[0], 600)], offset)
        room[0] -= count
        return count

    monkeypatch.setattr(writing.os, "pwrite", fill)  # type: ignore[attr-defined]
    assert await setting.writing.write(handle, 5, b"y" * 2000) == 1000
    with pytest.raises(StagingFull):
        await setting.writing.write(handle, 1005, b"y" * 1000)
    assert setting.bytes_of(inode) == b"\0" * 5 + b"y" * 1000


# The budget


async def test_writers_wait_for_room_and_the_log_says_so_once(
    setting: Setting, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    caplog.set_level("INFO", "fusefs.write_gate")
    handle, _ = await setting.create()
    setting.budget.allowed_until = 10

    def make_room(request: messages.Request) -> None:
        if isinstance(request, messages.AwaitRoom) and len(setting.mover.requests(messages.AwaitRoom)) == 3:
            setting.budget.allowed_until = 30

    setting.mover.on_ask = make_room
    await setting.writing.write(handle, 0, bytes(10))
    assert setting.mover.requests(messages.AwaitRoom) == []
    await setting.writing.write(handle, 0, bytes(10))
    assert len(setting.mover.requests(messages.AwaitRoom)) == 3
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert setting.writing.room().free_bytes == 10


async def test_room_is_what_disk_and_budget_both_have(setting: Setting) -> None:
    room = setting.writing.room()
    assert 0 < room.free_bytes <= room.total_bytes and room.free_files <= room.files
    setting.budget.allowed_until = 0
    assert setting.writing.room().free_bytes == 0


# From staged to clean, while it is read


async def test_a_file_that_the_lake_gets_meanwhile_is_found_where_it_is(setting: Setting) -> None:
    handle, inode = await setting.create()
    await setting.writing.write(handle, 0, b"content")
    node = setting.index.node(inode)
    assert node is not None
    stale = node
    setting.mover.put(inode, msgspec.structs.replace(node, staged=0, size_bytes=0, mtime_ns=5))
    setting.staging.remove(node.staged)
    now, staged = setting.filesystem.settled(inode, stale)
    assert (now.staged, now.mtime_ns, staged) == (0, 5, None)
    assert bytes(await setting.filesystem.read(inode, 0, 100)) == b""


async def test_a_staging_file_that_is_missing_is_an_error_and_no_endless_search(setting: Setting) -> None:
    _, inode = await setting.create()
    node = setting.index.node(inode)
    assert node is not None
    setting.staging.remove(node.staged)
    with pytest.raises(CacheError):
        setting.filesystem.settled(inode, node)
    with pytest.raises(CacheError):
        await setting.filesystem.read(inode, 0, 1)
    with pytest.raises(CacheError):
        await setting.writing.sync(inode)


# Durability


async def test_fsync_tells_the_mover_how_much_is_on_the_disk(setting: Setting) -> None:
    handle, inode = await setting.create()
    await setting.writing.write(handle, 0, bytes(77))
    await setting.writing.sync(handle)
    clean = setting.clean(b"clean", 5)
    await setting.writing.sync(clean)
    await setting.writing.sync_directory(ROOT_INODE)
    assert setting.mover.requests(messages.Sync) == [
        messages.Sync(inode, 77, False),
        messages.Sync(clean, -1, False),
        messages.Sync(ROOT_INODE, -1, False),
    ]


async def test_where_the_lake_must_have_it_fsync_and_close_wait_for_the_lake(setting: Setting) -> None:
    verbs = setting.use(Durability([("*.tmp", "local"), ("ckpt/*", "remote")], "local"))
    parent = setting.mover.add(Node(ROOT_INODE, b"ckpt", KIND_DIRECTORY))
    handles = [
        (await verbs.create(directory, name, 0o600, ME, os.O_WRONLY, id))[0]
        for id, (directory, name) in enumerate([(parent, b"a.pt"), (parent, b"a.tmp"), (ROOT_INODE, b"b")])
    ]
    for handle in handles:
        await verbs.sync(handle)
        await verbs.flush(handle)
        await verbs.flush(handle & ~WRITING_BIT)
    remote = [request.remote for request in setting.mover.requests(messages.Sync)]  # type: ignore[union-attr]
    assert remote == [True, True, False, False]


def test_the_first_pattern_that_fits_decides() -> None:
    rules = Durability([("/a/*.pt", "local"), ("*.pt", "remote")], "local")
    assert rules.may_be_remote
    assert [rules.is_remote(path) for path in (b"a/x.pt", b"b/x.pt", b"deep/a/x.pt", b"x.txt")] == [
        False,
        True,
        True,
        False,
    ]
    assert rules.is_remote(b"\xff.pt"), "a name that is no UTF-8"
    assert Durability([], "remote").is_remote(b"any")
    assert not Durability([("x", "local")], "local").may_be_remote


# Attributes


async def test_times_of_a_staged_file_are_set_there_and_told(setting: Setting) -> None:
    handle, inode = await setting.create()
    setting.writing.release(handle, 12)
    await setting.writing.set_attributes(messages.SetAttributes(inode, mtime_ns=5_000_000_000), 4)
    _, staged = setting.filesystem.settled(inode, setting.writing._node(inode))
    assert staged is not None and staged.st_mtime_ns == 5_000_000_000
    before_ns = staged.st_atime_ns
    await setting.writing.set_attributes(messages.SetAttributes(inode, mode=0o600), 6)
    await setting.writing.set_attributes(messages.SetAttributes(inode, mtime_ns=6), 8)
    _, staged = setting.filesystem.settled(inode, setting.writing._node(inode))
    assert staged is not None and (staged.st_atime_ns, staged.st_mtime_ns) == (before_ns, 6)
    assert [id for _, id in setting.mover.asked[1:]] == [4, 6, 8]


async def test_who_sets_the_mtime_of_a_file_that_is_written_asks_nobody(setting: Setting) -> None:
    handle, inode = await setting.create()
    own = setting.writing._node(inode).attributes
    before = setting.filesystem.settled(inode, setting.writing._node(inode))[1]
    assert own is not None and before is not None
    await setting.writing.set_attributes(messages.SetAttributes(inode, mtime_ns=5_000_000_000), 4)
    await setting.writing.set_attributes(messages.SetAttributes(inode, own.mode, own.uid, own.gid), 6)
    after = setting.filesystem.settled(inode, setting.writing._node(inode))[1]
    assert after is not None and after.st_mtime_ns == 5_000_000_000
    assert after.st_ctime_ns >= before.st_ctime_ns and after.st_atime_ns == before.st_atime_ns
    assert len(setting.mover.asked) == 1  # The create.
    assert setting.opens.state(inode).writers == 1
    setting.writing.release(handle, 8)
    assert not setting.opens.state(inode).is_open


@pytest.mark.parametrize("change", [{"mode": 0o600}, {"uid": 77}, {"gid": 77}, {"atime_ns": 5}])
async def test_what_the_staging_file_does_not_say_is_told_also_while_it_is_written(
    setting: Setting, change: dict[str, int]
) -> None:
    _, inode = await setting.create()
    await setting.writing.set_attributes(messages.SetAttributes(inode, mtime_ns=5, **change), 4)
    assert [id for _, id in setting.mover.asked[1:]] == [4]
    assert setting.opens.state(inode).writers == 1


async def test_extended_attributes_come_from_the_node_and_only_those_of_users_are_set(
    setting: Setting,
) -> None:
    own = Attributes(0o644, 0, 0, 0, xattrs={b"user.b": b"2", b"user.a": b""})
    inode = setting.mover.add(Node(ROOT_INODE, b"f", KIND_FILE, attributes=own))
    bare = setting.clean(b"bare", 1)
    assert setting.writing.xattrs(inode) == [b"user.a", b"user.b"]
    assert (setting.writing.xattr(inode, b"user.a"), setting.writing.xattr(inode, b"user.b")) == (b"", b"2")
    assert setting.writing.xattrs(bare) == []
    for missing in (inode, bare):
        with pytest.raises(AttributeMissing):
            setting.writing.xattr(missing, b"user.c")
    for name in (b"trusted.x", b"security.capability", b"system.posix_acl_access"):
        with pytest.raises(NotSupported):
            await setting.writing.set_xattr(inode, name, b"", 2)
    await setting.writing.set_xattr(inode, b"user.c", None, 4)
    assert setting.mover.asked == [(messages.SetXattr(inode, b"user.c", None), 4)]


async def test_a_link_is_read_from_its_attributes(setting: Setting) -> None:
    own = Attributes(0o777, 0, 0, 0, target=b"../where")
    inode = setting.mover.add(Node(ROOT_INODE, b"link", KIND_SYMLINK, attributes=own))
    assert await setting.filesystem.read_link(inode) == b"../where"


def test_every_refusal_has_an_errno_of_its_own() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    refusals = [
        kind for kind in kinds if issubclass(kind, errors.NamespaceError) and kind.__subclasses__() == []
    ]
    refusals.remove(
        errors.TextRefused
    )  # Of control files, which the names of a lake have nothing to do with.
    codes = [errno_of(kind("text")) for kind in refusals]
    assert len(codes) == len(set(codes)) and errno.EIO not in codes
    assert errno_of(errors.MountReadOnly("text")) == errno.EROFS
    assert errno_of(ValueError("text")) == errno.EIO
    assert [kind for kind, _ in ERRNO_OF][-1] is errors.SluiceError
