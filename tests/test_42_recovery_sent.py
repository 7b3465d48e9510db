"""What reached the lake before the index was lost, of which the journal knows nothing yet."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cache import messages
from cache.index import remove_index
from cache.metadata import SentId
from cache.model import KIND_DIRECTORY
from cache.pending import Move, Pending, Put, touched_keys
from cache.store import boot_id
from tests.uploads import QUICK, Mount, content, keys, mounted
from tests.wiring import WatchedLake

BODY = b"some bytes"
LATER = replace(QUICK, delay_s=3600.0, open_delay_s=3600.0)  # Until somebody waits for it.


class Journal:
    """That of a cache directory, to be put back as it was: the state from which a lost index is made anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        (path / "boot").write_text(boot_id())  # The machine goes on: all bytes written are there.

    async def keep(self, mount: Mount) -> None:
        """Copy it, once it has all that was changed."""
        assert mount.cache.writing is not None
        await mount.cache.writing.keeper.settled()
        shutil.copytree(self._path / "journal.lmdb", self._path / "kept")

    def put_back(self) -> None:
        """Lose the index too. The cache must be closed."""
        remove_index(self._path)
        shutil.rmtree(self._path / "journal.lmdb")
        (self._path / "kept").rename(self._path / "journal.lmdb")


async def nothing(mount: Mount) -> None:
    pass


async def unlink(mount: Mount) -> None:
    await mount.unlink("file")


async def rename(mount: Mount) -> None:
    await mount.rename("file", "new")


async def overwrite(mount: Mount) -> None:
    await mount.replace("file", BODY.upper())


@pytest.mark.parametrize(
    ("change", "after"),
    [(nothing, {"file": BODY}), (unlink, {}), (rename, {"new": BODY}), (overwrite, {"file": BODY.upper()})],
)
async def test_a_file_that_was_sent(
    tmp_path: Path, change: Callable[[Mount], Awaitable[None]], after: dict[str, bytes]
) -> None:
    """Whatever comes next, the lake gets no second one, and keeps none that is gone."""
    lake, journal = WatchedLake(), Journal(tmp_path)
    async with mounted(tmp_path, lake, LATER) as mount:
        inode = await mount.create("file")
        mount.write(inode, BODY)
        await journal.keep(mount)
        # What is open keeps its staging file: as one does whose upload has not heard its answer yet.
        await mount.drain()
        assert content(lake, "file") == BODY
    journal.put_back()
    async with mounted(tmp_path, lake, LATER) as mount:
        assert await mount.read("file") == BODY
        await change(mount)
        await mount.drain()
        assert {key: content(lake, key) for key in keys(lake)} == after
        assert mount.uploader.queue() == []
        assert lake.requests["put"] == (2 if change is overwrite else 1)


@pytest.mark.parametrize("change", [nothing, unlink, rename])
async def test_a_symlink_that_was_sent(tmp_path: Path, change: Callable[[Mount], Awaitable[None]]) -> None:
    lake, journal = WatchedLake(), Journal(tmp_path)
    async with mounted(tmp_path, lake, LATER) as mount:
        await mount.create("earlier")  # The link's inode is another one after the loss.
        await mount.unlink("earlier")
        await mount.apply(messages.MakeSymlink(await mount.inode(""), b"file", b"target", 7, 8))
        await journal.keep(mount)
        await mount.drain()
        assert keys(lake) == ["file.rclonelink"]
    journal.put_back()
    async with mounted(tmp_path, lake, LATER) as mount:
        await change(mount)
        await mount.drain()
        after = {nothing: ["file.rclonelink"], unlink: [], rename: ["new.rclonelink"]}
        assert keys(lake) == after[change] and mount.uploader.queue() == []


async def test_a_new_directory_that_got_its_marker(tmp_path: Path) -> None:
    lake, journal = WatchedLake(), Journal(tmp_path)
    async with mounted(tmp_path, lake, LATER) as mount:
        await mount.mkdir("d")
        await journal.keep(mount)
        await mount.drain()
        assert keys(lake) == ["d/"]
    journal.put_back()
    async with mounted(tmp_path, lake, LATER) as mount:
        await mount.rmdir("d")
        await mount.drain()
        assert keys(lake) == []


async def test_a_later_state_with_the_same_times_is_not_taken_for_what_is_there(tmp_path: Path) -> None:
    """A power loss may leave a file the size and times of its last write, and not its bytes."""
    lake, journal = WatchedLake(), Journal(tmp_path)
    async with mounted(tmp_path, lake, LATER) as mount:
        inode = await mount.put("file", BODY)
        row = next(row for row in mount.cache.table.rows.values() if isinstance(row, Put))
        assert row.inode == inode and mount.cache.writing is not None
        status = mount.cache.writing.ledger.staging.stat(row.staged)
        await journal.keep(mount)
    sent = SentId(f"{LATER.cache_id}-{row.staged:x}", f"{status.st_ctime_ns:x}")
    metadata = {"sluice-id": str(sent), "sluice-checksum": "xxh3-128k:00"}
    lake.put("file", BODY.upper(), metadata=metadata)
    journal.put_back()
    async with mounted(tmp_path, lake, LATER) as mount:
        await mount.drain()
        assert content(lake, "file") == BODY == await mount.read("file")
        assert mount.uploader.queue() == []


async def test_the_lake_sees_nothing_that_the_journal_does_not_know_of(tmp_path: Path) -> None:
    """Else a power loss would leave what no row is about: the copy of a rename that never was."""
    lake, missing = WatchedLake(), list[str]()
    lake.fill({"file": BODY, "gone": b"1", "old/one": b"2"})
    async with mounted(tmp_path, lake) as mount:
        assert mount.cache.writing is not None
        journal = mount.cache.writing.ledger.journal

        def note(verb: str, key: str) -> None:
            changes = verb in ("put", "copy", "delete")
            if changes and not any(is_about(row, key.encode()) for row in journal.rows().values()):
                missing.append(f"{verb} {key}")

        lake.fault = note
        for number in range(10):
            await mount.put(f"new{number}", BODY)
            await mount.mkdir(f"d{number}")
            await mount.rename("old", "other")
            await mount.rename("file", "renamed")
            await mount.unlink("gone")
            await mount.put("gone", BODY)
            await mount.drain()
            await mount.rename("other", "old")
            await mount.rename("renamed", "file")
            await mount.drain()
        assert missing == []


def is_about(row: Pending, key: bytes) -> bool:
    key = bare(key)
    return any(key == touched or key.startswith(touched + b"/") for touched in map(bare, touched_keys(row)))


def bare(key: bytes) -> bytes:
    return key.removesuffix(b"/")


async def test_of_several_moves_the_last_knows_what_the_first_made_of_its_object(tmp_path: Path) -> None:
    """A directory's lies in between: made of the last one, the node is where the first one brought it."""
    lake, journal = WatchedLake(), Journal(tmp_path)
    lake.fill({"a/one": BODY, "a/two": b"2"})
    async with mounted(tmp_path, lake, lake_threads=12) as mount:
        first = lake.hold("copy")
        await mount.rename("a/one", "a/file")
        await lake.met("copy")
        await mount.rename("a", "b")
        await mount.rename("b/file", "b/last")
        second = lake.hold("copy")
        first.set()
        await lake.met("copy", 3)  # Both objects below the directory are to be copied.
        await journal.keep(mount)
        directory, last = (row for row in mount.cache.table.rows.values() if isinstance(row, Move))
        assert directory.kind == KIND_DIRECTORY and not directory.copied
        assert last.etag == lake.head("a/file").version.etag
        lake.gates.clear()
    second.set()
    journal.put_back()
    async with mounted(tmp_path, lake, LATER) as mount:
        assert await mount.read("b/last") == BODY and await mount.read("b/two") == b"2"
        await mount.drain()
        assert {key: content(lake, key) for key in keys(lake)} == {"b/last": BODY, "b/two": b"2"}


async def test_a_move_knows_of_the_attributes_that_its_object_just_got(tmp_path: Path) -> None:
    lake, journal = WatchedLake(), Journal(tmp_path)
    lake.fill({"file": BODY})
    async with mounted(tmp_path, lake, lake_threads=12) as mount:
        first = lake.hold("copy")
        await mount.apply(messages.SetAttributes(await mount.inode("file"), mode=0o600))
        await lake.met("copy")
        await mount.rename("file", "new")
        second = lake.hold("copy")
        first.set()
        await lake.met("copy", 2)
        await journal.keep(mount)
        (move,) = (row for row in mount.cache.table.rows.values() if isinstance(row, Move))
        assert move.etag == lake.head("file").version.etag and lake.head("file").metadata["mode"] == "600"
        lake.gates.clear()
    second.set()
    journal.put_back()
    async with mounted(tmp_path, lake, LATER) as mount:
        assert await mount.read("new") == BODY
        await mount.drain()
        assert keys(lake) == ["new"] and content(lake, "new") == BODY
