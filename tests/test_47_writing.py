"""Files that get a staging file, and attributes that are set."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from cache import messages
from cache.errors import (
    AttributeMissing,
    NameExists,
    NameRefused,
    StagingFull,
)
from cache.model import MIB, ROOT_INODE
from cache.pending import OPEN, Local, Mark, Put, Restate
from tests.changing import Files
from tests.wiring import WatchedLake, bodies, open_cache


@pytest.fixture
def lake() -> WatchedLake:
    lake = WatchedLake()
    lake.fill({"data/one": b"1", "data/two": b"22", "data/sub/three": b"333", "top": b"t"})
    return lake


@pytest.fixture
async def files(tmp_path: Path, lake: WatchedLake) -> AsyncIterator[Files]:
    async with open_cache(tmp_path, lake, writable=True) as cache:
        yield Files(cache)


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
