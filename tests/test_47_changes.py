"""Changes of the namespace: POSIX's rules, the rows that stand for them, and that each happens once."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from cache import client, messages
from cache.config import CacheDirectory, LakeConfig, MountConfig
from cache.errors import (
    AttributeMissing,
    CacheError,
    DirectoryNotEmpty,
    IsADirectory,
    MountReadOnly,
    NameExists,
    NameMissing,
    NameRefused,
    NameTooLong,
    NotADirectory,
    NotSupported,
    StagingFull,
)
from cache.index import IndexWriter
from cache.journal import Journal
from cache.model import MIB, ROOT_INODE
from cache.mover import Mover, TierPlan, run_mover
from cache.pending import CONFLICT, OPEN, SEALED, Delete, Local, Mark, Orphan, Put, Restate
from cache.renaming import replace
from cache.staging import mode_said
from cache.store import open_store
from tests.changing import GID, UID, Files
from tests.wiring import Shared, WatchedLake, bodies, open_cache


@pytest.fixture
def lake() -> WatchedLake:
    lake = WatchedLake()
    lake.fill({"data/one": b"1", "data/two": b"22", "data/sub/three": b"333", "top": b"t"})
    return lake


@pytest.fixture
async def files(tmp_path: Path, lake: WatchedLake) -> AsyncIterator[Files]:
    async with open_cache(tmp_path, lake, writable=True) as cache:
        yield Files(cache)


# Making


async def test_a_new_file_is_there_at_once_and_waits_to_be_put(files: Files) -> None:
    inode = await files.create_open("new")
    node = await files.node("new")
    (row,) = files.rows()
    assert isinstance(row, Put)
    assert (row.path, row.inode, row.staged, row.base_etag, row.state) == (
        b"new",
        inode,
        node.staged,
        "",
        OPEN,
    )
    assert row.attributes == node.attributes
    assert node.attributes is not None and (node.attributes.mode, node.attributes.uid) == (0o644, UID)
    assert files.staging.stat(node.staged).st_size == 0


async def test_closing_seals_with_the_size_and_time_that_the_file_has(files: Files) -> None:
    await files.create("new", b"12345")
    (row,) = files.rows()
    assert isinstance(row, Put) and (row.state, row.size_bytes) == (SEALED, 5)
    node = await files.node("new")
    assert node.size_bytes == 5 and node.mtime_ns == files.staging.stat(node.staged).st_mtime_ns


async def test_a_file_stays_open_until_its_last_writer_closes(files: Files) -> None:
    inode = await files.create_open("new")
    files.opens.opened(inode, writing=True)
    files.opens.closed(inode, writing=True)
    await files.changes.closed(inode)
    (row,) = files.rows()
    assert isinstance(row, Put) and row.state == OPEN


async def test_a_mode_that_was_set_while_the_file_was_written_is_sealed_with_it(files: Files) -> None:
    inode = await files.create_open("new")
    files.staging.set_mode((await files.node("new")).staged, 0o664)
    await files.changes.sync(inode, 0, False)
    (row,) = files.rows()
    assert isinstance(row, Put) and row.attributes.mode == 0o664  # No power loss takes it back.
    await files.close(inode)
    (row,) = files.rows()
    own = (await files.node("new")).attributes
    assert isinstance(row, Put) and own is not None and row.attributes.mode == own.mode == 0o664


async def test_a_mode_that_the_mover_set_counts_though_the_seal_shares_its_transaction(files: Files) -> None:
    inode = await files.create_open("new")
    number = (await files.node("new")).staged
    files.staging.set_mode(number, 0o664)
    files.opens.closed(inode, writing=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.apply, messages.SetAttributes(inode, mode=0o600))
        nursery.start_soon(files.changes.closed, inode)
    own = (await files.node("new")).attributes
    (row,) = files.rows()
    assert own is not None and own.mode == 0o600 and mode_said(files.staging.stat(number)) is None
    assert isinstance(row, Put) and row.attributes.mode == 0o600


async def test_what_waits_for_a_commit_alone_is_done_at_once(files: Files) -> None:
    """And happens once, however often it is asked for; the lake is asked the other way."""
    answers: list[messages.Answer] = []
    root = messages.Create(ROOT_INODE, b"new", 0o644, UID, GID)
    assert not files.changes.apply_nowait(root, 2, answers.append)  # Nobody has listed the root.
    directory = await files.mkdir("d")
    request = messages.Create(directory, b"new", 0o644, UID, GID)
    for id in (4, 4, 6):
        assert files.changes.apply_nowait(request, id, answers.append)
        files.cache.committer.flush_due()
    made = await files.find("d/new")
    assert [answer.value for answer in answers] == [made, made, 0] and answers[2].error == "NameExists"
    assert len(files.staged()) == 1


@pytest.mark.parametrize("name", ["top", "data"])
async def test_a_name_that_only_the_lake_knows_is_taken(files: Files, name: str) -> None:
    """Nobody has listed the directory yet."""
    for verb in (files.create_open, files.mkdir):
        with pytest.raises(NameExists):
            await verb(name)
    with pytest.raises(NameExists):
        await files.symlink(name, b"x")
    assert not files.rows() and not files.staged()


async def test_a_new_directory_is_empty_without_asking_the_lake(files: Files, lake: WatchedLake) -> None:
    await files.mkdir("d", 0o700)
    listed = len(lake.listed)
    await files.create("d/f")
    assert await files.tree("d") == {"d/f": b""}
    assert len(lake.listed) == listed
    mark, put = files.rows()
    assert isinstance(mark, Mark) and mark.is_new and mark.path == b"d"
    assert isinstance(put, Put) and put.path == b"d/f"
    assert mark.attributes is not None and mark.attributes.mode == 0o700


async def test_symlinks_fifos_and_sockets(files: Files) -> None:
    await files.symlink("link", b"to/where")
    await files.mknod("fifo", 0o600 | stat.S_IFIFO)
    await files.mknod("sock", 0o600 | stat.S_IFSOCK)
    await files.mknod("plain", 0o600 | stat.S_IFREG)
    link, fifo, sock, plain = files.rows()
    assert isinstance(link, Put) and link.key == b"link.rclonelink" and link.state == SEALED
    assert link.attributes.target == b"to/where" and not link.staged
    assert isinstance(fifo, Local) and isinstance(sock, Local)
    assert isinstance(plain, Put) and (plain.state, plain.size_bytes) == (SEALED, 0)
    with pytest.raises(NotSupported):
        await files.mknod("device", 0o600 | stat.S_IFCHR)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("x" * 256, NameTooLong),
        ("x.rclonelink", NameRefused),
        (os.fsdecode(b"\xff"), NameRefused),
    ],
)
async def test_names_that_the_lake_cannot_hold_are_refused(
    files: Files, path: str, error: type[Exception]
) -> None:
    request = messages.Create(ROOT_INODE, os.fsencode(path), 0o644, UID, GID)
    with pytest.raises(error):
        await files.apply(request)
    await files.create("ok")
    with pytest.raises(error):
        await files.apply(messages.Rename(ROOT_INODE, b"ok", ROOT_INODE, os.fsencode(path), 0))
    assert files.paths() == [b"ok"]


async def test_a_key_longer_than_the_lake_takes_is_refused(files: Files) -> None:
    path = "d" * 200
    for _ in range(4):
        await files.mkdir(path)
        path += "/" + "d" * 200
    await files.create(path[: -200 + 20])
    with pytest.raises(NameTooLong):
        await files.create(path + "d" * 55)
    with pytest.raises(NameTooLong):  # The ending of a symlink's object counts.
        await files.symlink(path + "d" * 15, b"t")


async def test_nothing_is_made_in_what_is_no_directory_or_gone(files: Files) -> None:
    inode = await files.create("file")
    with pytest.raises(NotADirectory):
        await files.apply(messages.Create(inode, b"x", 0o644, UID, GID))
    directory = await files.mkdir("d")
    await files.rmdir("d")
    with pytest.raises(NameMissing):
        await files.apply(messages.Create(directory, b"x", 0o644, UID, GID))


async def test_a_directory_hands_down_its_group_and_the_bit_for_it(files: Files) -> None:
    inode = await files.mkdir("d", 0o2775)
    await files.apply(messages.SetAttributes(inode, gid=99))
    await files.create("d/f")
    await files.mkdir("d/e")
    for path, mode in (("d/f", 0o644), ("d/e", 0o2755)):
        attributes = (await files.node(path)).attributes
        assert attributes is not None and (attributes.gid, attributes.mode) == (99, mode)


# Removing


async def test_what_was_never_sent_leaves_nothing(files: Files) -> None:
    await files.mkdir("d")
    await files.create("d/f", b"1")
    await files.symlink("d/l", b"t")
    await files.mknod("d/p", stat.S_IFIFO | 0o600)
    for name in ("d/f", "d/l", "d/p"):
        await files.unlink(name)
    await files.rmdir("d")
    assert not files.rows()
    await files.swept()
    assert not files.staged()
    assert files.cache.index.entries()["nodes"] == 1 + 2  # The root; data and top were listed.


async def test_unlinking_an_object_deletes_its_key(files: Files) -> None:
    inode = await files.find("data/one")
    await files.unlink("data/one")
    assert files.rows() == [Delete(b"data/one", inode)]
    assert await files.tree("data") == {"data/two": b"22", "data/sub": None, "data/sub/three": b"333"}
    assert files.cache.index.node(inode) is None


async def test_unlinking_an_overwritten_object_deletes_it(files: Files) -> None:
    await files.write("top", b"new")
    await files.unlink("top")
    assert files.rows() == [Delete(b"top")]


async def test_an_unlinked_file_lives_while_it_is_open(files: Files) -> None:
    inode = await files.create_open("f")
    files.write_open(inode, b"still")
    await files.unlink("f")
    number = files.staged()[0]
    assert files.rows() == [Orphan(inode, number)]
    assert await files.read_inode(inode) == b"still"
    with pytest.raises(KeyError):
        await files.find("f")
    await files.close(inode)
    await files.swept()
    assert not files.rows() and not files.staged()
    assert files.cache.index.node(inode) is None


async def test_an_unlinked_object_lives_while_it_is_open(files: Files) -> None:
    inode = await files.find("top")
    with files.opened(inode):
        await files.unlink("top")
        await files.changes.closed(inode)  # Of another inode's bucket, or too early: nothing happens.
        assert await files.read_inode(inode) == b"t"
    await files.changes.closed(inode)
    assert files.cache.index.node(inode) is None
    assert files.rows() == [Delete(b"top", inode)]


async def test_an_unlinked_object_that_is_open_can_be_written(files: Files) -> None:
    inode = await files.find("top")
    files.opens.opened(inode, writing=True)
    await files.unlink("top")
    number = await files.changes.stage(inode, -1)
    assert await files.read_inode(inode) == b"t"
    assert Orphan(inode, number) in files.rows()
    await files.close(inode)
    await files.swept()
    assert not files.staged()


async def test_unlink_and_rmdir_know_each_others_business(files: Files) -> None:
    with pytest.raises(IsADirectory):
        await files.unlink("data")
    with pytest.raises(NotADirectory):
        await files.rmdir("top")
    with pytest.raises(NameMissing):
        await files.unlink("nothing")
    with pytest.raises(NameMissing):
        await files.rmdir("nothing")


async def test_a_directory_with_entries_in_the_lake_alone_is_not_empty(files: Files) -> None:
    with pytest.raises(DirectoryNotEmpty):
        await files.rmdir("data")


async def test_an_emptied_directory_survives_and_can_be_removed(files: Files) -> None:
    inode = await files.find("data/sub")
    await files.unlink("data/sub/three")
    assert [row for row in files.rows() if isinstance(row, Mark)] == [Mark(b"data/sub", inode)]
    await files.rmdir("data/sub")
    assert [row.key for row in files.rows()] == [b"data/sub/three", b"data/sub/"]


async def test_removing_a_tree_deletes_every_key(files: Files) -> None:
    for name in ("one", "two", "sub/three"):
        await files.unlink(f"data/{name}")
    await files.rmdir("data/sub")
    await files.rmdir("data")
    assert all(isinstance(row, Delete) for row in files.rows())
    deleted = {row.key for row in files.rows()}
    assert deleted == {b"data/one", b"data/two", b"data/sub/three", b"data/sub/", b"data/"}
    assert await files.tree() == {"top": b"t"}


async def test_parents_show_when_they_changed(files: Files) -> None:
    inode = await files.mkdir("d")
    times = [(await files.node("d")).mtime_ns]
    states = [files.cache.index.directory(inode)]

    async def look() -> None:
        times.append((await files.node("d")).mtime_ns)
        states.append(files.cache.index.directory(inode))

    await files.create("d/a")
    await look()
    await files.rename("d/a", "d/b")
    await look()
    await files.rename("d/b", "top2")
    await look()
    await files.rename("top2", "d/c")
    await look()
    await files.unlink("d/c")
    await look()
    assert times == sorted(set(times))
    changed = [state.changed_at_ns for state in states if state is not None]
    assert changed == sorted(set(changed)) and len(changed) == 6
    assert [state.entries for state in states if state is not None] == [0, 1, 1, 0, 1, 0]


# Writing to what is there


async def test_truncating_fetches_nothing(files: Files, lake: WatchedLake) -> None:
    etag = (await files.node("top")).etag
    inode = await files.write("top", b"new")
    (row,) = files.rows()
    assert isinstance(row, Put) and (row.base_etag, row.inode) == (etag, inode)
    assert lake.requests["get"] == 0
    assert await files.read("top") == b"new"


async def test_appending_copies_what_is_there(files: Files) -> None:
    inode = await files.find("data/two")
    await files.append("data/two", b"+")
    assert await files.read("data/two") == b"22+"
    assert await files.find("data/two") == inode


async def test_what_is_cached_is_copied_without_the_lake(tmp_path: Path) -> None:
    lake = WatchedLake()
    content = bodies({"big": 20 * MIB + 7, "small": 70_001})
    versions = lake.fill(content)
    async with open_cache(tmp_path, lake, writable=True) as cache:
        files = Files(cache)
        for key in content:
            await cache.fetch(versions[key])
        gets = lake.requests["get"]
        for key, body in content.items():
            await files.append(key, b"!")
            assert await files.read(key) == body + b"!"
        assert lake.requests["get"] == gets


def damage(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(200_000)
        file.write(b"\0" * 100)


async def test_a_corrupt_cached_block_is_fetched_again_for_the_copy(tmp_path: Path) -> None:
    lake = WatchedLake()
    content = bodies({"f": 300_000})
    versions = lake.fill(content)
    async with open_cache(tmp_path, lake, writable=True) as cache:
        await cache.fetch(versions["f"])
        tier = cache.residency.tiers[0].files
        damage(tier.object_path(versions["f"].id))
        files = Files(cache)
        await files.append("f", b"")
        assert await files.read("f") == content["f"]


async def test_a_large_file_is_copied_up_to_where_it_is_cut(tmp_path: Path) -> None:
    lake = WatchedLake()
    content = bodies({"big": 20 * MIB})
    lake.fill(content)
    async with open_cache(tmp_path, lake, writable=True) as cache:
        files = Files(cache)
        inode = await files.find("big")
        number = await files.changes.stage(inode, 9 * MIB + 5)
        assert files.staged() == [number]
        assert await files.read_inode(inode) == content["big"][: 9 * MIB + 5]
        assert lake.bytes_fetched == 9 * MIB + 5


async def test_many_who_write_at_once_share_one_copy(files: Files, lake: WatchedLake) -> None:
    inode = await files.find("data/two")
    numbers: list[int] = []

    async def stage() -> None:
        numbers.append(await files.changes.stage(inode, -1))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(stage)
    assert len(set(numbers)) == 1 and files.staged() == [numbers[0]]
    assert lake.requests["get"] == 1 and len(files.rows()) == 1


async def test_a_copy_that_fails_leaves_everything_as_it_was(files: Files, lake: WatchedLake) -> None:
    inode = await files.find("data/two")
    lake.fill({"data/two": b"another"})
    with pytest.raises(Exception, match="changed"):
        await files.changes.stage(inode, -1)
    assert not files.rows() and not files.staged()
    node = files.cache.index.node(inode)
    assert node is not None and not node.staged


async def test_a_sealed_file_is_written_again_in_its_staging_file(files: Files) -> None:
    inode = await files.create("f", b"1")
    files.opens.opened(inode, writing=True)
    number = await files.changes.stage(inode, -1)
    (row,) = files.rows()
    assert isinstance(row, Put) and (row.state, row.size_bytes, row.staged) == (OPEN, -1, number)
    await files.close(inode)


async def test_only_files_can_be_staged(files: Files) -> None:
    with pytest.raises(NameRefused):
        await files.changes.stage(await files.find("data"), -1)


# Attributes


async def test_attributes_of_an_object_become_one_restate(files: Files) -> None:
    inode = await files.find("top")
    await files.apply(messages.SetAttributes(inode, mode=0o100600))
    await files.apply(messages.SetAttributes(inode, uid=1, gid=2, atime_ns=3, mtime_ns=4))
    (row,) = files.rows()
    node = await files.node("top")
    assert isinstance(row, Restate) and row.path == b"top" and row.mtime_ns == 4
    assert row.attributes == node.attributes
    assert node.attributes is not None
    assert (node.attributes.mode, node.attributes.uid, node.attributes.gid) == (0o600, 1, 2)
    assert (node.attributes.atime_ns, node.mtime_ns, node.etag != "") == (3, 4, True)


async def test_attributes_go_with_a_row_that_is_there(files: Files) -> None:
    file, directory = await files.create("f"), await files.mkdir("d")
    fifo = await files.mknod("p", stat.S_IFIFO)
    for inode in (file, directory, fifo):
        await files.apply(messages.SetAttributes(inode, mode=0o111))
    assert len(files.rows()) == 3
    for row in files.rows():
        assert isinstance(row, Put | Mark | Local)
        assert row.attributes is not None and row.attributes.mode == 0o111


async def test_attributes_of_directories_and_the_root(files: Files) -> None:
    await files.apply(messages.SetAttributes(await files.find("data"), mode=0o700))
    await files.apply(messages.SetAttributes(ROOT_INODE, mode=0o711))
    (row,) = files.rows()  # The root has no object.
    assert isinstance(row, Restate) and row.key == b"data/"
    root = files.cache.index.node(ROOT_INODE)
    assert root is not None and root.attributes is not None and root.attributes.mode == 0o711


async def test_extended_attributes(files: Files) -> None:
    inode = await files.find("top")

    async def set_xattr(name: bytes, value: bytes | None, flags: int = 0) -> None:
        await files.apply(messages.SetXattr(inode, name, value, flags))

    await set_xattr(b"user.a", b"1", 1)
    with pytest.raises(NameExists):
        await set_xattr(b"user.a", b"2", 1)
    await set_xattr(b"user.a", b"2", 2)
    with pytest.raises(AttributeMissing):
        await set_xattr(b"user.b", b"2", 2)
    with pytest.raises(AttributeMissing):
        await set_xattr(b"user.b", None)
    await set_xattr(b"user.b", b"")
    with pytest.raises(StagingFull):
        await set_xattr(b"user.c", bytes(64 << 10))
    node = await files.node("top")
    assert node.attributes is not None and node.attributes.xattrs == {b"user.a": b"2", b"user.b": b""}
    await set_xattr(b"user.a", None)
    node = await files.node("top")
    assert node.attributes is not None and node.attributes.xattrs == {b"user.b": b""}
    assert len(files.rows()) == 1


async def test_attributes_too_large_for_metadata_are_told_once(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    inode = await files.find("top")
    for name in (b"user.a", b"user.b"):
        await files.apply(messages.SetXattr(inode, name, bytes(3000)))
    assert [record.message for record in caplog.records if "extended" in record.message] == [
        "top: its extended attributes are more than an object's metadata has room for: they are kept in"
        " this cache directory only, as are those of other such files"
    ]


async def test_attributes_survive_writing(files: Files) -> None:
    inode = await files.find("top")
    await files.apply(messages.SetAttributes(inode, mode=0o600))
    await files.append("top", b"!")
    (row,) = files.rows()
    assert isinstance(row, Put) and row.attributes.mode == 0o600


# Once


async def test_a_change_that_comes_twice_happens_once(files: Files) -> None:
    request = messages.Create(ROOT_INODE, b"f", 0o644, UID, GID)
    first = await files.changes.apply(request, 1000)
    again = await files.changes.apply(request, 1000)
    assert first.value == again.value and len(files.rows()) == 1
    await files.changes.apply(messages.Unlink(ROOT_INODE, b"f"), 1002)
    await files.changes.apply(messages.Unlink(ROOT_INODE, b"f"), 1002)
    with pytest.raises(NameMissing):
        await files.changes.apply(messages.Unlink(ROOT_INODE, b"f"), 1004)


async def test_a_change_that_comes_twice_at_one_time_happens_once(files: Files) -> None:
    request, values = messages.Create(ROOT_INODE, b"f", 0o644, UID, GID), []

    async def ask() -> None:
        values.append((await files.changes.apply(request, 1000)).value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        nursery.start_soon(ask)
    assert len(set(values)) == 1 and len(files.rows()) == 1


async def test_the_next_mover_remembers_and_the_next_mount_does_not(
    tmp_path: Path, lake: WatchedLake
) -> None:
    request = messages.Create(ROOT_INODE, b"f", 0o644, UID, GID)
    async with open_cache(tmp_path, lake, writable=True) as cache:
        inode = (await Files(cache).changes.apply(request, 1000)).value
        shared = cache.shared
    async with open_cache(tmp_path, lake, writable=True, first=False, shared=shared) as cache:
        assert (await Files(cache).changes.apply(request, 1000)).value == inode
    async with open_cache(tmp_path, lake, writable=True) as cache:
        with pytest.raises(NameExists):
            await Files(cache).changes.apply(request, 1000)


async def test_answers_are_remembered_up_to_a_number(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.changes._ANSWERS_MAX", 3)
    inode = await files.create_open("f")
    for number in range(100, 110, 2):
        await files.changes.apply(messages.SetAttributes(inode, mode=number), number)
    assert files.cache.index.answer_ids() == [104, 106, 108]


# Durability and refusals


async def test_sync_notes_the_length_and_waits_for_the_journal(files: Files) -> None:
    inode = await files.create_open("f")
    await files.changes.sync(inode, 5, remote=False)
    writing = files.cache.writing
    assert writing is not None
    (row,) = writing.ledger.journal.rows().values()
    assert isinstance(row, Put) and row.synced_bytes == 5


@pytest.mark.parametrize(("keep_bytes", "synced_bytes"), [(0, -1), (3, 3), (5, 5), (9, 5), (-1, 5)])
async def test_what_is_cut_off_is_not_durable_any_more_before_it_is_written_again(
    files: Files, keep_bytes: int, synced_bytes: int
) -> None:
    inode = await files.create_open("f")
    files.write_open(inode, b"12345")
    await files.changes.sync(inode, 5, remote=False)
    await files.changes.stage(inode, keep_bytes)
    writing = files.cache.writing
    assert writing is not None
    (row,) = writing.ledger.journal.rows().values()
    assert isinstance(row, Put) and row.synced_bytes == synced_bytes


async def test_a_file_that_is_opened_while_it_is_to_be_sealed_stays_open(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    inode = await files.create_open("f")
    files.write_open(inode, b"12345")
    commit = files.cache.committer.commit

    async def open_first(change: Callable[[IndexWriter], object], *, patient: bool) -> object:
        monkeypatch.undo()
        files.opens.opened(inode, writing=True)
        await files.changes.stage(inode, -1)
        return await commit(change)

    monkeypatch.setattr(files.cache.committer, "commit", open_first)
    await files.close(inode)
    (row,) = files.rows()
    assert isinstance(row, Put) and (row.state, row.size_bytes) == (OPEN, -1)
    files.write_open(inode, b"1234567")
    await files.close(inode)
    (row,) = files.rows()
    assert isinstance(row, Put) and (row.state, row.size_bytes) == (SEALED, 7)


@pytest.mark.parametrize("state", [SEALED, CONFLICT])
async def test_closing_gives_a_sealed_file_the_size_that_it_has(files: Files, state: str) -> None:
    inode = await files.create("f", b"12345")
    table = files.cache.table
    (seq,) = table.rows

    def change(w: IndexWriter) -> None:
        row = table.rows[seq]
        assert isinstance(row, Put)
        table.replace(w, seq, replace(row, state=state))

    await files.cache.committer.commit(change)
    files.write_open(inode, b"1234567")
    await files.changes.closed(inode)
    (row,) = files.rows()
    assert isinstance(row, Put) and (row.state, row.size_bytes) == (state, 7)
    assert (await files.node("f")).size_bytes == 7
    await files.changes.closed(inode)
    assert files.rows() == [row]


async def test_who_waits_for_room_is_told_to_ask_again_after_a_while(
    tmp_path: Path, lake: WatchedLake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker gives up a request that nobody answers."""
    monkeypatch.setattr("cache.changes._ASK_AGAIN_S", 0.001)
    async with open_cache(tmp_path, lake, writable=True, dirty_max=0) as cache:
        with trio.fail_after(30):
            await Files(cache).changes.await_room()
    assert client._ANSWER_S_MAX > 2 * 300.0


async def test_at_the_end_the_journal_knows_what_is_whole(tmp_path: Path, lake: WatchedLake) -> None:
    async with open_cache(tmp_path, lake, writable=True) as cache:
        writing = cache.writing
        assert writing is not None
        await Files(cache).create("f", b"12345")
        await writing.settle()
        cache.nursery.cancel_scope.cancel()
        writing.finish()
        (row,) = writing.ledger.journal.rows().values()
        assert isinstance(row, Put) and (row.state, row.size_bytes) == (SEALED, 5)


async def test_the_mover_finishes_the_journal_when_nothing_runs_any_more(
    tmp_path: Path, lake: WatchedLake, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_directory = tmp_path / "cache"
    plans = [TierPlan("nvme0", cache_directory, False, 64 * MIB)]
    config = MountConfig(LakeConfig("s3://bucket"), tmp_path, (CacheDirectory(cache_directory),))
    store = open_store(config)
    monkeypatch.setattr("cache.mover.open_lake", lambda config: lake)
    shared = Shared.make()

    async def serve(mover: Mover, changes: object) -> None:
        request = messages.Create(ROOT_INODE, b"f", 0o644, UID, GID)
        answer = await mover.handle(request, 2)
        await mover.handle(messages.Closed(answer.value))

    await run_mover(config, plans, shared, serve, first=True)  # type: ignore[arg-type]
    journal = Journal(cache_directory, store.id)
    rows = list(journal.rows().values())
    journal.close()
    store.release()
    assert [(row.path, row.state) for row in rows if isinstance(row, Put)] == [(b"f", SEALED)]


async def test_a_journal_that_failed_refuses_changes(files: Files) -> None:
    inode = await files.create_open("f")
    assert files.cache.writing is not None
    files.cache.writing.keeper.read_only_because = "the disk"
    for refused in (
        lambda: files.create_open("g"),
        lambda: files.changes.stage(inode, -1),
        lambda: files.changes.sync(inode, 0, False),
    ):
        with pytest.raises(MountReadOnly, match="the disk"):
            await refused()


async def test_a_failed_transaction_takes_everything_back(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    await files.create("before")
    whole = IndexWriter.finish

    def fail(w: IndexWriter) -> None:
        raise CacheError("the disk is full")

    monkeypatch.setattr(IndexWriter, "finish", fail)
    with pytest.raises(CacheError, match="full"):
        await files.create_open("f")
    monkeypatch.setattr(IndexWriter, "finish", whole)
    assert files.paths() == [b"before"]
    assert len(files.staged()) == 1
    noted = files.cache.table.unjournaled.values()
    assert all(row is None or row in files.rows() for row in noted)
    await files.create("f")
    assert files.paths() == [b"before", b"f"]


async def test_a_refused_change_leaves_the_others_of_its_transaction(files: Files) -> None:
    await files.find("top")
    results: list[str] = []

    async def make(name: str) -> None:
        try:
            await files.apply(messages.Create(ROOT_INODE, name.encode(), 0o644, UID, GID))
            results.append(name)
        except NameExists:
            results.append("refused")

    async with trio.open_nursery() as nursery:
        for name in ("a", "top", "b"):
            nursery.start_soon(make, name)
    assert sorted(results) == ["a", "b", "refused"]
    assert sorted(files.paths()) == [b"a", b"b"]


# Dirty bytes


class FullSender:
    dirty_bytes = 100

    def wake(self) -> None:
        pass

    async def wait_for(self, inode: int) -> None:
        pass


async def test_writers_wait_while_there_are_too_many_dirty_bytes(
    tmp_path: Path, lake: WatchedLake, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_cache(tmp_path, lake, writable=True, dirty_max=100) as cache:
        changes, sender = Files(cache).changes, FullSender()
        changes._sender = sender
        assert cache.shared is not None
        cache.shared.counters.row(1).add("bytes_written", 1000)
        changes.set_budget()
        assert cache.shared.budget.allowed_until == 1000
        waited = trio.Event()

        async def wait() -> None:
            await changes.await_room()
            waited.set()

        cache.nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not waited.is_set()
        sender.dirty_bytes = 40
        await waited.wait()
        changes.set_budget()
        assert cache.shared.budget.allowed_until == 1060
    assert "writers wait" in caplog.text
