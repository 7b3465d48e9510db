"""Names: symlinks of the lake, and what the lake can't hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache.errors import NameRefused, NameTooLong
from cache.model import (
    KEY_BYTES_MAX,
    KIND_DIRECTORY,
    KIND_FILE,
    KIND_SYMLINK,
    NAME_BYTES_MAX,
    ROOT_INODE,
)
from cache.pending import Delete, Mark, Pending, Put
from cache.policy.names import SHADOWED, check_key, why_no_key
from tests.overlaid import (
    ATTRIBUTES,
    Mount,
    looked_up,
    open_cache,
)
from tests.test_36_lister import expire, hidden, lake_with
from tests.wiring import WatchedLake

# Symlinks of the lake


async def test_an_object_with_the_ending_is_a_symlink_without_it(tmp_path: Path) -> None:
    lake = lake_with(["d/link.rclonelink"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()
        parent = mount.node("d")[0]
        assert await mount.listed(parent) == ["link"]
        inode, node = mount.node("link", parent)
        version = lake.head("d/link.rclonelink").version
        assert (node.kind, node.etag, node.size_bytes, node.vid) == (
            KIND_SYMLINK,
            version.etag,
            4,
            version.id,
        )
        assert node.attributes is None
        assert cache.index.key_of(inode) == b"d/link.rclonelink"
        assert cache.index.path_of(inode) == b"d/link"
        assert await cache.lister.refresh_entry(parent, b"link")
        assert mount.node("link", parent)[0] == inode
        lake.delete_many(["d/link.rclonelink"])
        assert not await cache.lister.refresh_entry(parent, b"link")


async def test_a_symlink_that_somebody_else_changed_is_another_inode(tmp_path: Path) -> None:
    lake = lake_with(["link.rclonelink"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        await mount.listed()
        inode = mount.node("link")[0]
        lake.fill({"link.rclonelink": b"elsewhere"})
        assert await mount.listed() == ["link"]
        assert mount.node("link")[0] != inode and mount.node("link")[1].size_bytes == 9


@pytest.mark.parametrize("page_keys", [1, 2, 1000])
@pytest.mark.parametrize(
    ("keys", "kind", "shadowed"),
    [
        (["n", "n.rclonelink"], KIND_FILE, {"n.rclonelink"}),
        (["n.rclonelink", "n/x"], KIND_DIRECTORY, {"n.rclonelink"}),
        (["n", "n.rclonelink", "n/x"], KIND_DIRECTORY, {"n", "n.rclonelink"}),
    ],
)
async def test_a_file_or_directory_shadows_a_symlink_of_its_name(
    tmp_path: Path, page_keys: int, keys: list[str], kind: int, shadowed: set[str]
) -> None:
    lake = lake_with([*keys, "z"], page_keys=page_keys)
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        seen = set()
        for _ in range(3):
            assert await mount.listed() == ["n", "z"]
            inode, node = mount.node("n")
            assert node.kind == kind
            seen.add(inode)
            assert hidden(cache) == dict.fromkeys(shadowed, SHADOWED)
            state = cache.index.directory(ROOT_INODE)
            assert state is not None and state.entries == 2
        if kind == KIND_FILE:
            assert len(seen) == 1
        assert await looked_up(mount, b"n") and mount.node("n")[1].kind == kind
        lake.delete_many([key for key in keys if not key.endswith(".rclonelink")])
        assert await mount.listed() == ["n", "z"]
        assert mount.node("n")[1].kind == KIND_SYMLINK and hidden(cache) == {}


async def test_a_symlink_becomes_a_file_and_a_symlink_again(tmp_path: Path) -> None:
    lake = lake_with(["n.rclonelink", "z"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        for add, gone, kind in [
            ("n.rclonelink", "n", KIND_SYMLINK),
            ("n", "n.rclonelink", KIND_FILE),
            ("n.rclonelink", "n", KIND_SYMLINK),
        ]:
            lake.delete_many([gone])
            lake.fill({add: b"1"})
            assert await mount.listed() == ["n", "z"]
            assert mount.node("n")[1].kind == kind and hidden(cache) == {}


async def test_an_ending_alone_is_no_name(tmp_path: Path) -> None:
    lake = lake_with([".rclonelink", "d/.rclonelink", "...rclonelink", "x" * 255 + ".rclonelink"])
    async with open_cache(tmp_path, lake) as cache:
        mount = Mount(cache)
        assert await mount.listed() == ["d"]
        assert await mount.listed(mount.node("d")[0]) == []
        assert hidden(cache).keys() == {
            ".rclonelink",
            "d/.rclonelink",
            "...rclonelink",
            "x" * 255 + ".rclonelink",
        }


# Names the lake can't hold


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (b"a/b.txt", KIND_FILE),
        (b"x" * NAME_BYTES_MAX, KIND_FILE),
        (b"/".join([b"x" * 127] * 8), KIND_FILE),
        ("größe/日本".encode(), KIND_FILE),
        (b"d.rclonelink", KIND_DIRECTORY),
        (b"a.rclonelink/b", KIND_FILE),
        (b"link", KIND_SYMLINK),
    ],
)
def test_a_name_that_the_lake_can_hold_is_fine(path: bytes, kind: int) -> None:
    check_key(path, kind)


@pytest.mark.parametrize(
    ("path", "kind", "error"),
    [
        (b"x" * (NAME_BYTES_MAX + 1), KIND_FILE, NameTooLong),
        (b"/".join([b"x" * 127] * 8) + b"/y", KIND_FILE, NameTooLong),
        (b"/".join([b"x" * 127] * 8) + b"y", KIND_DIRECTORY, NameTooLong),
        (b"/".join([b"x" * 126] * 8), KIND_SYMLINK, NameTooLong),
        (b"\xff/a", KIND_FILE, NameRefused),
        (b"a/\xed\xa0\x80", KIND_FILE, NameRefused),
        (b"d/x.rclonelink", KIND_FILE, NameRefused),
        (b"d/x.rclonelink", KIND_SYMLINK, NameRefused),
    ],
)
def test_a_name_that_the_lake_cannot_hold_is_refused(path: bytes, kind: int, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        check_key(path, kind)
    assert "\n" not in str(caught.value)
    assert KEY_BYTES_MAX == 1024 and why_no_key(b"fine") is None


def test_a_pending_row_knows_its_own_kind_of_key() -> None:
    rows: list[Pending] = [Mark(b"d", 1), Delete(b"k"), Put(b"l", 1, KIND_SYMLINK, 0, "", ATTRIBUTES)]
    assert [row.key for row in rows] == [b"d/", b"k", b"l.rclonelink"]


async def test_what_was_asked_for_by_name_shows_the_mode_and_time_of_its_metadata(tmp_path: Path) -> None:
    """A listing does not tell them, and does not undo them."""
    lake = WatchedLake()
    metadata = {"mode": "0750", "uid": "7", "gid": "8", "mtime": "1700000000.5"}
    lake.put("script", b"x", metadata=metadata)
    async with open_cache(tmp_path, lake) as cache:
        await cache.lister.list_directory(ROOT_INODE)
        assert cache.names()["script"][1].attributes is None
        for again in range(2):
            await cache.lister.refresh_entry(ROOT_INODE, b"script")
            expire(cache)
            if again:
                await cache.lister.list_directory(ROOT_INODE)
            node = cache.names()["script"][1]
            assert node.attributes is not None and node.mtime_ns == 1_700_000_000_500_000_000
            assert (node.attributes.mode, node.attributes.uid, node.attributes.gid) == (0o750, 7, 8)
