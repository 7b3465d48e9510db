"""A tier's files: landing, copying, punching, labels, and what disk errors become."""

from __future__ import annotations

import errno
import itertools
import os
import random
from functools import cache
from pathlib import Path

import pytest

from cache.errors import BlockCorrupt, CacheError, CacheFull
from cache.model import (
    BLOCK_BYTES,
    GROUP_BLOCKS,
    GROUP_BYTES,
    KIB,
    MIB,
    GroupIndex,
    ObjectVersion,
    block_count,
    blocks_in_group,
    group_count,
)
from cache.records import Group, VersionRow, block_checksums
from cache.tier import TierBudget, TierFiles

SMALL = ObjectVersion("dir/small \udcff", '"etag"', 3 * BLOCK_BYTES + 17)
LARGE = ObjectVersion("large", '"etag"', 2 * GROUP_BYTES + BLOCK_BYTES + 5)


@cache
def body_of(version: ObjectVersion) -> bytes:
    return random.Random(version.size_bytes).randbytes(version.size_bytes)


def row_of(version: ObjectVersion, *, whole: bool) -> VersionRow:
    key = version.key.encode("utf-8", "surrogateescape")
    return VersionRow(key, version.etag, version.size_bytes, 0, whole)


def groups_of(version: ObjectVersion, present: set[int] | None = None) -> list[tuple[GroupIndex, Group]]:
    """Return the group rows of a version of which the blocks in *present* (None: all) are there."""
    checksums, groups = block_checksums(body_of(version)), []
    for number in map(GroupIndex, range(group_count(version.size_bytes))):
        group = Group.empty(blocks_in_group(version.size_bytes, number))
        for i in range(len(group.checksums)):
            block = number * GROUP_BLOCKS + i
            if present is None or block in present:
                group = group.with_blocks(i, [checksums[block]])
        if group.present:
            groups.append((number, group))
    return groups


@pytest.fixture
def disk(tmp_path: Path) -> TierFiles:
    return prepared(TierFiles("nvme0", tmp_path / "nvme0", is_memory=False))


@pytest.fixture
def memory(tmp_path: Path) -> TierFiles:
    return prepared(TierFiles("dram", tmp_path / "dram", is_memory=True))


def prepared(files: TierFiles) -> TierFiles:
    files.prepare()
    return files


def disk_bytes(path: str) -> int:
    return os.stat(path).st_blocks * 512


def land_some(files: TierFiles, version: ObjectVersion, blocks: set[int]) -> None:
    body = body_of(version)
    for block in sorted(blocks):
        start = block * BLOCK_BYTES
        files.land_blocks(version.id, start, [body[start : start + BLOCK_BYTES]])


@pytest.mark.parametrize("seed", range(6))
def test_pieces_as_they_arrive_are_written_up_to_multiples_of_a_mib(
    disk: TierFiles, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Also where a write stops short; else the page cache keeps them in folios of one page."""
    roll, pwritev = random.Random(seed), os.pwritev
    unit, start, length = MIB, roll.choice([0, 3, 17]) * BLOCK_BYTES, 5 * MIB + 1234
    body, ends, short = roll.randbytes(length), [start], seed % 2

    def noted(fd: int, views: list[memoryview], offset: int) -> int:
        assert offset == ends[-1]
        joined = b"".join(views)
        ends.append(offset + pwritev(fd, [joined[: len(joined) // 2 + 1] if short else joined], offset))
        return ends[-1] - offset

    monkeypatch.setattr(os, "pwritev", noted)
    sizes = [(1, 900), (256 * KIB, 300 * KIB), (0, 2 * MIB)][seed // 2]
    cuts = [0]
    while cuts[-1] < length:
        cuts.append(cuts[-1] + roll.randint(*sizes))
    pieces = [body[a:b] for a, b in itertools.pairwise(cuts)]
    checksums = disk.land_blocks(LARGE.id, start, pieces)
    assert checksums == block_checksums(body)
    with open(disk.partial_path(LARGE.id), "rb") as file:
        file.seek(start)
        assert file.read() == body
    if not short and seed > 1:
        assert all(end % unit == 0 for end in ends[1:-1]), ends
        assert len(ends) <= length // unit + 3


def incoming(files: TierFiles) -> list[str]:
    return os.listdir(files.path / "incoming")


def test_a_whole_object_lands_with_its_bytes_checksums_and_label(disk: TierFiles) -> None:
    checksums = disk.land_whole(SMALL, SMALL.id, memoryview(body_of(SMALL)))
    assert checksums == block_checksums(body_of(SMALL))
    assert Path(disk.object_path(SMALL.id)).read_bytes() == body_of(SMALL)
    assert disk.read_label(SMALL.id) == (SMALL, checksums)
    assert incoming(disk) == []


def test_landing_again_replaces_the_file_at_once(disk: TierFiles) -> None:
    disk.land_whole(SMALL, SMALL.id, body_of(SMALL))
    with open(disk.object_path(SMALL.id), "rb") as reader:
        disk.land_whole(SMALL, SMALL.id, body_of(SMALL))
        assert reader.read() == body_of(SMALL)


def test_a_label_is_believed_only_with_every_byte_as_it_was(disk: TierFiles) -> None:
    disk.land_whole(SMALL, SMALL.id, body_of(SMALL))
    path = disk.object_path(SMALL.id)
    with open(path, "r+b") as file:
        file.seek(2 * BLOCK_BYTES + 5)
        file.write(b"rot")
    assert disk.read_label(SMALL.id) is None
    disk.land_whole(SMALL, SMALL.id, body_of(SMALL))
    assert disk.read_label(SMALL.id) is not None
    os.truncate(path, SMALL.size_bytes - 1)
    assert disk.read_label(SMALL.id) is None


def test_a_torn_file_of_the_right_length_is_not_believed(disk: TierFiles) -> None:
    """What a machine crash leaves of a file that was never synced: the length, and zeros."""
    disk.land_whole(SMALL, SMALL.id, body_of(SMALL))
    path = disk.object_path(SMALL.id)
    os.truncate(path, BLOCK_BYTES)
    os.truncate(path, SMALL.size_bytes)
    assert disk.read_label(SMALL.id) is None


def test_another_versions_label_is_not_believed(disk: TierFiles) -> None:
    disk.land_whole(SMALL, SMALL.id, body_of(SMALL))
    other = ObjectVersion(SMALL.key, '"other"', SMALL.size_bytes)
    os.rename(disk.object_path(SMALL.id), disk.object_path(other.id))
    assert disk.read_label(other.id) is None


@pytest.mark.parametrize("label", [None, b"", b"\x94\x01\x02\x03\x04", b"junk"])
def test_a_missing_or_strange_label_is_not_believed(disk: TierFiles, label: bytes | None) -> None:
    path = disk.object_path(SMALL.id)
    Path(path).write_bytes(body_of(SMALL))
    if label is not None:
        os.setxattr(path, "user.sluice.version", label)
    assert disk.read_label(SMALL.id) is None
    assert disk.read_label(LARGE.id) is None


def test_blocks_land_where_they_belong_and_the_rest_stays_a_hole(disk: TierFiles) -> None:
    blocks = {0, 70, block_count(LARGE.size_bytes) - 1}
    land_some(disk, LARGE, blocks)
    path = disk.partial_path(LARGE.id)
    content = Path(path).read_bytes()
    for block in blocks:
        piece = slice(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
        assert content[piece] == body_of(LARGE)[piece]
    assert disk_bytes(path) < 4 * BLOCK_BYTES


def test_a_sparse_file_becomes_whole_with_a_label(disk: TierFiles) -> None:
    body = body_of(LARGE)
    checksums = disk.land_blocks(LARGE.id, 0, [body])
    disk.make_whole(LARGE, LARGE.id, checksums)
    assert disk.read_label(LARGE.id) == (LARGE, checksums)
    assert not os.path.exists(disk.partial_path(LARGE.id))
    disk.make_sparse(LARGE.id)
    disk.make_sparse(LARGE.id)
    assert Path(disk.partial_path(LARGE.id)).read_bytes() == body


def test_a_file_made_sparse_again_takes_its_label_back(disk: TierFiles) -> None:
    version = ObjectVersion("dir/long enough for a block of its own" * 5, '"etag"', LARGE.size_bytes)
    checksums = disk.land_blocks(version.id, 0, [body_of(LARGE)])
    before = disk_bytes(disk.partial_path(version.id))
    disk.make_whole(version, version.id, checksums)
    assert disk_bytes(disk.object_path(version.id)) == before + disk.label_bytes
    disk.make_sparse(version.id)
    assert disk_bytes(disk.partial_path(version.id)) == before


@pytest.mark.parametrize("size_bytes", [1, 4096, 4097, 3 * BLOCK_BYTES + 17])
@pytest.mark.parametrize("key_bytes", [1, 30, 1024])
def test_a_whole_object_takes_no_more_of_the_disk_than_it_is_charged(
    disk: TierFiles, memory: TierFiles, size_bytes: int, key_bytes: int
) -> None:
    version = ObjectVersion("k" * key_bytes, '"etag"' * 5, size_bytes)
    body = random.Random(size_bytes).randbytes(size_bytes)
    for files in (disk, memory):
        files.land_whole(version, version.id, body)
        with open(files.object_path(version.id), "rb") as file:
            os.fsync(file.fileno())
        assert size_bytes <= disk_bytes(files.object_path(version.id)) <= files.whole_bytes(size_bytes)
    assert disk.whole_bytes(size_bytes) - memory.whole_bytes(size_bytes) == disk.label_bytes == 4096


def test_punching_gives_space_back_and_leaves_the_neighbours(disk: TierFiles) -> None:
    disk.land_blocks(LARGE.id, 0, [body_of(LARGE)])
    path = disk.partial_path(LARGE.id)
    before = disk_bytes(path)
    disk.punch(LARGE.id, range(GROUP_BLOCKS, 2 * GROUP_BLOCKS))
    content = Path(path).read_bytes()
    assert disk_bytes(path) <= before - GROUP_BYTES + 4096
    assert content[:GROUP_BYTES] == body_of(LARGE)[:GROUP_BYTES]
    assert content[2 * GROUP_BYTES :] == body_of(LARGE)[2 * GROUP_BYTES :]
    assert not any(content[GROUP_BYTES : 2 * GROUP_BYTES : 4096])


def test_punching_and_removing_what_is_not_there_is_no_error(disk: TierFiles) -> None:
    disk.punch(LARGE.id, range(0, 64))
    disk.remove(LARGE.id)
    assert not os.path.exists(disk.partial_path(LARGE.id))


def test_removing_takes_both_files(disk: TierFiles) -> None:
    disk.land_whole(SMALL, SMALL.id, body_of(SMALL))
    disk.land_blocks(SMALL.id, 0, [body_of(SMALL)])
    disk.remove(SMALL.id)
    assert list(disk.stored()) == []


def test_a_whole_object_moves_from_memory_with_bytes_and_label(memory: TierFiles, disk: TierFiles) -> None:
    checksums = memory.land_whole(SMALL, SMALL.id, body_of(SMALL))
    disk.copy_from(memory, row_of(SMALL, whole=True), SMALL.id, groups_of(SMALL))
    assert disk.read_label(SMALL.id) == (SMALL, checksums)
    assert incoming(disk) == []


def test_a_sparse_object_moves_with_just_its_blocks(memory: TierFiles, disk: TierFiles) -> None:
    blocks = {3, 64, block_count(LARGE.size_bytes) - 1}
    land_some(memory, LARGE, blocks)
    disk.copy_from(memory, row_of(LARGE, whole=False), LARGE.id, groups_of(LARGE, blocks))
    content = Path(disk.partial_path(LARGE.id)).read_bytes()
    for block in blocks:
        piece = slice(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
        assert content[piece] == body_of(LARGE)[piece]
    assert disk_bytes(disk.partial_path(LARGE.id)) < 4 * BLOCK_BYTES


@pytest.mark.parametrize("block", [0, 2, 3])
def test_corruption_is_found_on_the_way_and_leaves_nothing(
    memory: TierFiles, disk: TierFiles, block: int
) -> None:
    memory.land_whole(SMALL, SMALL.id, body_of(SMALL))
    with open(memory.object_path(SMALL.id), "r+b") as file:
        file.seek(block * BLOCK_BYTES + 3)
        file.write(b"rot")
    with pytest.raises(BlockCorrupt, match=f"block {block}"):
        disk.copy_from(memory, row_of(SMALL, whole=True), SMALL.id, groups_of(SMALL))
    assert list(disk.stored()) == [] and incoming(disk) == []


def test_a_shortened_file_is_found_on_the_way(memory: TierFiles, disk: TierFiles) -> None:
    memory.land_whole(SMALL, SMALL.id, body_of(SMALL))
    os.truncate(memory.object_path(SMALL.id), BLOCK_BYTES + 1)
    with pytest.raises(BlockCorrupt):
        disk.copy_from(memory, row_of(SMALL, whole=True), SMALL.id, groups_of(SMALL))


def test_copying_a_file_that_is_gone_is_a_cache_error(memory: TierFiles, disk: TierFiles) -> None:
    with pytest.raises(CacheError):
        disk.copy_from(memory, row_of(SMALL, whole=True), SMALL.id, groups_of(SMALL))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, CacheFull),
        (errno.EDQUOT, CacheFull),
        (errno.EIO, CacheError),
        (errno.EROFS, CacheError),
    ],
)
def test_disk_errors_become_cache_errors_and_leave_nothing(
    disk: TierFiles, memory: TierFiles, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[CacheError]
) -> None:
    memory.land_whole(SMALL, SMALL.id, body_of(SMALL))

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", fail)
    monkeypatch.setattr(os, "pwritev", fail)
    calls = (
        lambda: disk.land_whole(SMALL, SMALL.id, body_of(SMALL)),
        lambda: disk.land_blocks(LARGE.id, 0, [b"x" * BLOCK_BYTES]),
        lambda: disk.copy_from(memory, row_of(SMALL, whole=True), SMALL.id, groups_of(SMALL)),
    )
    for call in calls:
        with pytest.raises(CacheError) as caught:
            call()
        assert type(caught.value) is kind
    assert incoming(disk) == []
    assert not os.path.exists(disk.object_path(SMALL.id))


def test_a_write_that_falls_short_goes_on_where_it_stopped(
    disk: TierFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, body, offset: pwrite(fd, body[:1000], offset))
    disk.land_whole(SMALL, SMALL.id, body_of(SMALL))
    assert Path(disk.object_path(SMALL.id)).read_bytes() == body_of(SMALL)


def test_removing_and_asking_for_space_on_a_broken_disk_are_cache_errors(
    disk: TierFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run where nothing catches an OSError: the mover would end."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "unlink", fail)
    monkeypatch.setattr(os, "statvfs", fail)
    with pytest.raises(CacheError):
        disk.remove(SMALL.id)
    with pytest.raises(CacheError):
        disk.free_bytes()


def test_stored_tells_what_is_there_and_drops_strange_names(disk: TierFiles) -> None:
    disk.land_whole(SMALL, SMALL.id, body_of(SMALL))
    land_some(disk, LARGE, {5})
    strange = [disk.path / "objects" / "00" / "readme", disk.path / "partial" / "ff" / "abcd"]
    for path in strange:
        path.write_bytes(b"x")
    stored = {vid: (whole, size) for vid, whole, size in disk.stored()}
    assert stored.keys() == {SMALL.id, LARGE.id}
    assert stored[SMALL.id][0] and not stored[LARGE.id][0]
    assert BLOCK_BYTES <= stored[LARGE.id][1] <= BLOCK_BYTES + 8192
    assert not any(path.exists() for path in strange)


def test_preparing_empties_incoming_and_keeps_the_rest(disk: TierFiles) -> None:
    disk.land_whole(SMALL, SMALL.id, body_of(SMALL))
    (disk.path / "incoming" / "torn").write_bytes(b"x")
    disk.prepare()
    assert incoming(disk) == []
    assert disk.read_label(SMALL.id) is not None


def test_preparing_where_a_file_is_in_the_way_is_a_cache_error(tmp_path: Path) -> None:
    (tmp_path / "tier").write_bytes(b"")
    with pytest.raises(CacheError):
        TierFiles("t", tmp_path / "tier", is_memory=False).prepare()


def test_a_budget_is_never_overdrawn_and_never_gives_back_more_than_it_took() -> None:
    budget = TierBudget(100)
    budget.take(60)
    assert budget.room_bytes == 40
    with pytest.raises(AssertionError):
        budget.take(41)
    with pytest.raises(AssertionError):
        budget.give_back(61)
    budget.give_back(60)
    assert budget.used_bytes == 0
