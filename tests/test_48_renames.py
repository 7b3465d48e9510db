"""Renames: POSIX's rules, and that the lake ends up with what the mount showed at once."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from cache import messages
from cache.dispatching import UploadConfig
from cache.errors import (
    DirectoryNotEmpty,
    IsADirectory,
    NameExists,
    NameMissing,
    NameRefused,
    NotADirectory,
)
from cache.pending import Mark, Move, Put, Restate
from cache.tree import RENAME_EXCHANGE, RENAME_NOREPLACE
from tests.changing import Files, objects
from tests.wiring import WatchedDirectory, WatchedLake, open_cache

START = {"data/one": b"1", "data/two": b"22", "data/sub/three": b"333", "top": b"t", "other/x": b"x"}


@pytest.fixture
def lake() -> WatchedLake:
    lake = WatchedLake()
    lake.fill(START)
    return lake


@pytest.fixture
async def files(tmp_path: Path, lake: WatchedLake) -> AsyncIterator[Files]:
    """Nothing is sent."""
    async with open_cache(tmp_path, lake, writable=True) as cache:
        yield Files(cache)


@pytest.fixture
async def sending(tmp_path: Path, lake: WatchedLake) -> AsyncIterator[Files]:
    """Everything is sent as soon as somebody waits for it."""
    config = UploadConfig(delay_s=3600.0, open_delay_s=3600.0, threads=2, cache_id="test")
    async with open_cache(tmp_path, lake, writable=True, upload=config, lake_threads=12) as cache:
        yield Files(cache)


async def drained(files: Files) -> dict[str, bytes]:
    """Return the lake's objects, but markers, once it has everything."""
    assert files.cache.uploader is not None
    await files.cache.uploader.drain()
    assert not files.rows()
    return {key: body for key, body in objects(files.cache).items() if not key.endswith("/")}


# Files


async def test_a_checkpoint_that_replaces_the_last_one_is_sent_once_under_its_name(
    sending: Files, lake: WatchedLake
) -> None:
    for i in range(10):
        await sending.create("tmp", b"checkpoint %d" % i)
        await sending.rename("tmp", "top")
    etag = (row.base_etag for row in sending.rows() if isinstance(row, Put))
    assert list(etag) == [(lake.head("top")).version.etag]
    await sending.changes.forget_replaced(math.inf)
    await sending.swept()
    assert len(sending.staged()) == 1
    assert await drained(sending) == START | {"top": b"checkpoint 9"}
    assert lake.requests["put"] == 1 and lake.requests["delete"] == lake.requests["copy"] == 0


async def test_a_renamed_object_is_read_at_once_and_moved_once(sending: Files, lake: WatchedLake) -> None:
    inode = await sending.find("data/one")
    for old, new in (("data/one", "a"), ("a", "other/b"), ("other/b", "c")):
        await sending.rename(old, new)
        assert await sending.read(new) == b"1"
    assert await sending.find("c") == inode
    (row,) = [row for row in sending.rows() if isinstance(row, Move)]
    assert (row.source, row.path) == (b"data/one", b"c")
    expected = dict(START)
    expected["c"] = expected.pop("data/one")
    assert await drained(sending) == expected
    assert lake.requests["copy"] == 1
    assert (await sending.node("c")).origin == b""


async def test_an_object_that_goes_back_is_not_moved(files: Files) -> None:
    await files.rename("top", "a")
    await files.rename("a", "top")
    assert not files.rows() and not (await files.node("top")).origin


async def test_an_object_replaces_another(sending: Files) -> None:
    await sending.rename("top", "data/one")
    assert await sending.read("data/one") == b"t"
    assert await drained(sending) == {key: body for key, body in START.items() if key != "top"} | {
        "data/one": b"t"
    }


async def test_what_a_renamed_object_replaced_does_not_come_back_when_it_goes_on(sending: Files) -> None:
    await sending.rename("top", "data/one")
    await sending.rename("data/one", "new")
    await sending.mkdir("empty")
    await drained(sending)
    await sending.rename("data", "empty")
    await sending.rename("empty", "data")
    assert await drained(sending) == {
        "new": b"t",
        "data/two": b"22",
        "data/sub/three": b"333",
        "other/x": b"x",
    }
    assert not any(key.startswith("empty") for key in objects(sending.cache))


async def test_an_edited_object_that_is_renamed_leaves_nothing_behind(sending: Files) -> None:
    await sending.append("top", b"!")
    await sending.rename("top", "data/new")
    expected = {key: body for key, body in START.items() if key != "top"} | {"data/new": b"t!"}
    assert await drained(sending) == expected


async def test_a_renamed_object_that_is_edited_is_not_copied_in_the_lake(
    sending: Files, lake: WatchedLake
) -> None:
    await sending.rename("top", "new")
    await sending.append("new", b"!")
    put = [row for row in sending.rows() if isinstance(row, Put)]
    assert [(row.path, row.base_etag) for row in put] == [(b"new", "")]
    assert await drained(sending) == {key: body for key, body in START.items() if key != "top"} | {
        "new": b"t!"
    }
    assert lake.requests["copy"] == 0


async def test_a_name_that_was_freed_can_be_used_again_at_once(sending: Files) -> None:
    await sending.rename("top", "old")
    await sending.create("top", b"new")
    await sending.rename("old", "older")
    assert await drained(sending) == START | {"top": b"new", "older": b"t"}


async def test_a_backup_that_is_removed_takes_nothing_new_along(sending: Files) -> None:
    """mv f f.bak, write f anew, rm f.bak; the same with a directory."""
    await sending.rename("top", "top.bak")
    await sending.create("top", b"new")
    await sending.unlink("top.bak")
    await sending.rename("data", "data.bak")
    await sending.mkdir("data")
    await sending.create("data/one", b"new 1")
    for name in ("one", "two", "sub/three"):
        await sending.unlink(f"data.bak/{name}")
    await sending.rmdir("data.bak/sub")
    await sending.rmdir("data.bak")
    assert await drained(sending) == {"top": b"new", "data/one": b"new 1", "other/x": b"x"}


async def test_a_deleted_name_can_be_taken_by_what_is_renamed(sending: Files) -> None:
    await sending.create("new", b"n")
    await sending.unlink("top")
    await sending.rename("new", "top")
    await sending.unlink("data/one")
    await sending.rename("other/x", "data/one")
    assert await drained(sending) == {
        "data/one": b"x",
        "data/two": b"22",
        "data/sub/three": b"333",
        "top": b"n",
    }


async def test_a_file_renamed_while_it_is_sent_arrives_under_its_new_name_alone(
    sending: Files, lake: WatchedLake
) -> None:
    gate = lake.hold("put")
    await sending.create("first", b"content")
    uploader = sending.cache.uploader
    assert uploader is not None
    sending.cache.nursery.start_soon(uploader.drain)
    await lake.met("put")
    await sending.rename("first", "second")
    assert await sending.read("second") == b"content"
    gate.set()
    assert await drained(sending) == START | {"second": b"content"}


async def test_who_waits_for_a_file_that_is_renamed_meanwhile_does_not_wait_for_quiet_times(
    sending: Files, lake: WatchedLake
) -> None:
    """They are an hour here: what has to be done before the upload is in the same hurry."""
    gate, uploader = lake.hold("put"), sending.cache.uploader
    assert uploader is not None
    inode = await sending.create("first", b"content")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(uploader.wait_for, inode)
        await lake.met("put")
        await sending.rename("first", "second")
        gate.set()
    assert lake.head("second").version.size_bytes == 7
    assert await drained(sending) == START | {"second": b"content"}


async def test_a_file_unlinked_while_it_is_sent_does_not_stay_in_the_lake(
    sending: Files, lake: WatchedLake
) -> None:
    gate = lake.hold("put")
    await sending.create("first", b"content")
    uploader = sending.cache.uploader
    assert uploader is not None
    sending.cache.nursery.start_soon(uploader.drain)
    await lake.met("put")
    await sending.unlink("first")
    gate.set()
    assert await drained(sending) == START


async def test_attributes_follow_a_renamed_object(files: Files) -> None:
    inode = await files.find("top")
    await files.apply(messages.SetAttributes(inode, mode=0o600))
    await files.rename("top", "new")
    move, restate = files.rows()
    assert isinstance(move, Move) and isinstance(restate, Restate) and restate.path == b"new"
    attributes = (await files.node("new")).attributes
    assert attributes is not None and attributes.mode == 0o600


async def test_symlinks_are_renamed_with_the_ending_of_their_objects(sending: Files) -> None:
    await sending.symlink("link", b"to")
    assert (await drained(sending))["link.rclonelink"] == b"to"
    await sending.rename("link", "data/link")
    await sending.rename("data/one", "link")
    expected = dict(START) | {"data/link.rclonelink": b"to"}
    expected["link"] = expected.pop("data/one")
    assert await drained(sending) == expected


async def test_a_replaced_file_lives_while_it_is_open(files: Files) -> None:
    inode = await files.find("top")
    with files.opened(inode):
        await files.create("new", b"n")
        await files.rename("new", "top")
        await files.changes.forget_replaced(math.inf)
        assert files.cache.index.node(inode) is not None
        assert await files.read("top") == b"n"
    await files.changes.closed(inode)
    assert files.cache.index.node(inode) is None


async def test_a_replaced_file_can_be_opened_for_a_while_by_who_had_looked_it_up(files: Files) -> None:
    """The kernel looks a name up again when an open meets ESTALE, but only once."""
    inode = await files.find("top")
    await files.create("new", b"n")
    await files.rename("new", "top")
    await files.create("newer", b"nn")
    replaced = await files.find("top")
    await files.rename("newer", "top")
    with files.opened(inode):
        await files.changes.forget_replaced(time.monotonic())
        assert files.cache.index.node(inode) is not None and await files.read_inode(replaced) == b"n"
    await files.changes.closed(replaced)
    assert await files.read_inode(replaced) == b"n", "another one may be about to open it"
    await files.changes.forget_replaced(math.inf)
    assert files.cache.index.node(replaced) is None


# Directories


async def test_a_renamed_directory_is_there_at_once_with_one_row(sending: Files) -> None:
    await sending.rename("data", "moved")
    moves = [row for row in sending.rows() if isinstance(row, Move)]
    assert [(row.source, row.path) for row in moves] == [(b"data/", b"moved")]
    assert await sending.tree("moved") == {
        "moved/one": b"1",
        "moved/two": b"22",
        "moved/sub": None,
        "moved/sub/three": b"333",
    }
    with pytest.raises(KeyError):
        await sending.find("data")
    expected = {key.replace("data/", "moved/"): body for key, body in START.items()}
    assert await drained(sending) == expected
    assert await sending.tree("moved/sub") == {"moved/sub/three": b"333"}


async def test_a_new_directory_under_a_freed_name_is_empty(sending: Files) -> None:
    await sending.rename("data", "moved")
    await sending.mkdir("data")
    assert await sending.tree("data") == {}
    await sending.create("data/one", b"new")
    expected = {key.replace("data/", "moved/"): body for key, body in START.items()}
    assert await drained(sending) == expected | {"data/one": b"new"}


async def test_what_was_deleted_in_a_renamed_directory_never_comes_back(sending: Files) -> None:
    await sending.rename("data", "moved")
    await sending.unlink("moved/one")
    await sending.rename("moved", "again")
    await sending.write("again/two", b"new")
    assert await drained(sending) == {
        "again/two": b"new",
        "again/sub/three": b"333",
        "top": b"t",
        "other/x": b"x",
    }


async def test_what_was_moved_out_of_a_renamed_directory_stays_out(sending: Files) -> None:
    await sending.rename("data", "moved")
    await sending.rename("moved/one", "one")
    await sending.rename("moved/sub", "sub")
    assert await drained(sending) == {
        "one": b"1",
        "sub/three": b"333",
        "moved/two": b"22",
        "top": b"t",
        "other/x": b"x",
    }


async def test_what_goes_back_to_a_freed_name_is_not_moved_along(sending: Files) -> None:
    await sending.rename("data", "moved")
    await sending.mkdir("data")
    await sending.rename("moved/one", "data/one")
    assert await drained(sending) == {
        "data/one": b"1",
        "moved/two": b"22",
        "moved/sub/three": b"333",
        "top": b"t",
        "other/x": b"x",
    }


async def test_what_was_moved_out_first_is_not_moved_along(sending: Files) -> None:
    await sending.rename("data/one", "one")
    await sending.rename("data", "moved")
    assert await drained(sending) == {
        "one": b"1",
        "moved/two": b"22",
        "moved/sub/three": b"333",
        "top": b"t",
        "other/x": b"x",
    }


async def test_a_removed_tree_can_be_replaced_at_once(sending: Files) -> None:
    """cp, rm -r and mv, as installers do it."""
    await sending.mkdir("new")
    await sending.create("new/one", b"new 1")
    await sending.create("new/four", b"4")
    for name in ("one", "two", "sub/three"):
        await sending.unlink(f"data/{name}")
    await sending.rmdir("data/sub")
    await sending.rmdir("data")
    await sending.rename("new", "data")
    assert await drained(sending) == {
        "data/one": b"new 1",
        "data/four": b"4",
        "top": b"t",
        "other/x": b"x",
    }


async def test_a_directory_that_was_never_sent_is_renamed_without_the_lake(
    sending: Files, lake: WatchedLake
) -> None:
    await sending.mkdir("tmp")
    await sending.mkdir("tmp/sub")
    await sending.create("tmp/sub/f", b"f")
    await sending.rename("tmp", "final")
    assert all(isinstance(row, Put | Mark) for row in sending.rows())
    assert await drained(sending) == START | {"final/sub/f": b"f"}
    assert lake.requests["copy"] == lake.requests["delete"] == 0


async def test_a_directory_that_a_file_only_passed_through_does_not_stay(tmp_path: Path) -> None:
    """A directory lake makes the directories above what it gets: nobody need have sent their markers."""
    config = UploadConfig(delay_s=3600.0, open_delay_s=3600.0, threads=2, cache_id="test")
    lake = WatchedDirectory(tmp_path / "lake")
    async with open_cache(tmp_path, lake, writable=True, upload=config, lake_threads=12) as cache:
        files, uploader = Files(cache), cache.uploader
        assert uploader is not None
        inode = await files.create("file", b"content")
        gate = lake.hold("put")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(uploader.wait_for, inode)
            await lake.met("put")
            last = "file"
            for directory in ("renamed", "removed", "replaced"):
                await files.mkdir(directory)
                await files.rename(last, last := f"{directory}/file")
            await files.rename(last, "file")
            await files.rename("renamed", "new")
            await files.rmdir("removed")
            await files.rmdir("replaced")
            await files.create("replaced", b"other")
            gate.set()
        await uploader.drain()
        assert objects(cache) == {"file": b"content", "new/": b"", "replaced": b"other"}


async def test_a_directory_replaces_an_empty_one(sending: Files) -> None:
    await sending.mkdir("empty")
    await sending.rename("data", "empty")
    with pytest.raises(DirectoryNotEmpty):
        await sending.rename("other", "empty")
    expected = {key.replace("data/", "empty/"): body for key, body in START.items()}
    assert await drained(sending) == expected


async def test_a_directory_that_lost_its_last_entry_survives(sending: Files) -> None:
    await sending.rename("other/x", "x")
    assert Mark in {type(row) for row in sending.rows()}
    await drained(sending)
    assert "other/" in objects(sending.cache)


# Exchange


@pytest.mark.parametrize(
    ("one", "other"), [("top", "data/one"), ("data", "other"), ("top", "data"), ("data/sub", "other")]
)
async def test_two_change_places(sending: Files, one: str, other: str) -> None:
    before = await sending.tree()
    inodes = await sending.find(one), await sending.find(other)
    await sending.rename(one, other, RENAME_EXCHANGE)
    assert (await sending.find(other), await sending.find(one)) == inodes
    expected = {}
    for path, body in before.items():
        for old, new in ((one, other), (other, one)):
            if path == old or path.startswith(old + "/"):
                path = new + path[len(old) :]
                break
        expected[path] = body
    assert await sending.tree() == expected
    files = {path: body for path, body in expected.items() if body is not None}
    assert await drained(sending) == files


async def test_new_files_change_places(sending: Files) -> None:
    await sending.create("new", b"n")
    await sending.write("top", b"t2")
    await sending.rename("new", "top", RENAME_EXCHANGE)
    assert await drained(sending) == START | {"top": b"n", "new": b"t2"}


# Refusals


@pytest.mark.parametrize(
    ("old", "new", "flags", "error"),
    [
        ("nothing", "x", 0, NameMissing),
        ("top", "data/one", RENAME_NOREPLACE, NameExists),
        ("top", "top", RENAME_NOREPLACE, NameExists),
        ("top", "nothing", RENAME_EXCHANGE, NameMissing),
        ("top", "data", 0, IsADirectory),
        ("data", "top", 0, NotADirectory),
        ("other", "data", 0, DirectoryNotEmpty),
        ("data/sub", "data", 0, DirectoryNotEmpty),
        ("data", "data/sub/inner", 0, NameRefused),
        ("data", "data/inner", 0, NameRefused),
        ("data/sub", "data", RENAME_EXCHANGE, NameRefused),
        ("data", "data/sub", RENAME_EXCHANGE, NameRefused),
        ("top", "x", 4, NameRefused),
        ("top", "x", 3, NameRefused),
    ],
)
async def test_what_posix_refuses_changes_nothing(
    files: Files, old: str, new: str, flags: int, error: type[Exception]
) -> None:
    before = await files.tree()
    with pytest.raises(error):
        await files.rename(old, new, flags)
    assert await files.tree() == before and not files.rows()


async def test_a_rename_onto_itself_does_nothing(files: Files) -> None:
    await files.rename("top", "top")
    await files.rename("data", "data")
    assert not files.rows()


async def test_renames_in_a_large_directory_wait_for_nothing(tmp_path: Path) -> None:
    """One row for 5,000 objects, and the one that moves out of it afterwards needs one more."""
    lake = WatchedLake()
    lake.fill({f"big/{i:05}": b"" for i in range(5000)})
    async with open_cache(tmp_path, lake, writable=True, with_tiers=False) as cache:
        files = Files(cache)
        await files.rename("big", "small")
        await files.rename("small/04999", "x")
        requests = lake.requests["list"] + lake.requests["head"]
        assert [type(row) for row in files.rows()] == [Move, Move]
        assert requests <= 20
