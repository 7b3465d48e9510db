"""Changes of the namespace: making and removing, and what the lake hears of it."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from cache import messages
from cache.errors import (
    DirectoryNotEmpty,
    IsADirectory,
    NameExists,
    NameMissing,
    NameRefused,
    NameTooLong,
    NotADirectory,
    NotSupported,
    SluiceError,
)
from cache.model import ROOT_INODE
from cache.pending import OPEN, SEALED, Delete, Local, Mark, Orphan, Put
from cache.staging import mode_said
from tests.changing import GID, UID, Files
from tests.wiring import WatchedLake, open_cache


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


async def test_what_a_replaced_worker_asked_for_changes_nothing_any_more(files: Files) -> None:
    """The kernel has sent his requests again: what comes late would undo what was written since."""
    inode = await files.create("new", b"12345")
    directory = await files.mkdir("d")
    files.opens.opened(inode, writing=True)
    await files.changes.stage(inode, -1, 0)
    await files.changes.sync(inode, 5, False, 0)
    files.opens.note_resend()
    rows = files.rows()
    create = messages.Create(directory, b"late", 0o644, UID, GID)
    with pytest.raises(SluiceError, match="replaced"):
        await files.changes.stage(inode, 0, 0)
    with pytest.raises(SluiceError, match="replaced"):
        await files.changes.sync(inode, 3, False, 0)
    with pytest.raises(SluiceError, match="replaced"):
        await files.changes.apply(create, 100, 0)
    answers: list[messages.Answer] = []
    assert files.changes.apply_nowait(create, 102, answers.append, 0)
    files.cache.committer.flush_due()
    assert [answer.error for answer in answers] == ["SluiceError"]
    assert files.rows() == rows and len(files.staged()) == 1
    await files.changes.stage(inode, 0, 1)
    (row,) = (row for row in files.rows() if isinstance(row, Put))
    assert row.synced_bytes == -1


async def test_a_worker_that_is_replaced_while_his_file_is_copied_changes_nothing(files: Files) -> None:
    """What waits for the lake is late, too."""
    inode = await files.find("data/one")
    files.opens.opened(inode, writing=True)
    await files.changes.stage(inode, -1, 0)
    await files.changes.sync(inode, 1, False, 0)
    stage = files.changes._copy_up.stage

    async def copied_late(inode: int, keep_bytes: int) -> int:
        files.opens.note_resend()
        return await stage(inode, keep_bytes)

    files.changes._copy_up.stage = copied_late  # type: ignore[method-assign]
    with pytest.raises(SluiceError, match="replaced"):
        await files.changes.stage(inode, 0, 0)
    (row,) = (row for row in files.rows() if isinstance(row, Put))
    assert row.synced_bytes == 1


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
