"""Uploads: what reaches the lake, when, under which conditions, and what the mount has of it then."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from cache import messages
from cache.config import LakeConfig
from cache.errors import AccessDenied, BodyBroken, LakeError, LakeUnavailable, NameMissing, SlowDown
from cache.index_writer import IndexWriter
from cache.lake.directory import DirectoryLake
from cache.model import MIB
from cache.pending import ANY_ETAG, CONFLICT, FAILED, Delete, Put
from cache.tree import TreeChange
from cache.uploading import Puts
from tests.uploads import QUICK, Faults, content, is_missing, keys, mounted
from tests.wiring import WatchedLake

SMALL = b"some bytes"
replace_row = msgspec.structs.replace


def body_of(size_bytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


async def test_a_closed_file_is_sent_and_stays_as_clean_cache(tmp_path: Path) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        inode = await mount.put("file", SMALL)
        await mount.drain()
        assert content(lake, "file") == SMALL
        node = mount.cache.index.node(inode)
        assert node is not None and not node.staged and node.etag == lake.head("file").version.etag
        assert mount.cache.resident_bytes(lake.head("file").version) == SMALL
        assert await mount.read("file") == SMALL
        await mount.until(lambda: mount.staged_numbers() == [])
        assert mount.uploader.queue() == [] and mount.uploader.dirty_bytes == 0
        assert lake.requests["get"] == 1  # The test's own.


async def test_the_time_of_the_last_change_stays_as_it_was_shown(tmp_path: Path) -> None:
    """A staged file's is that of its staging file, which the link that keeps it as a cached one changes."""
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        inode = await mount.create("file")
        mount.write(inode, SMALL)
        node = mount.cache.index.node(inode)
        assert node is not None and node.attributes is not None and mount.cache.writing is not None
        shown_ns = mount.cache.writing.ledger.staging.stat(node.staged).st_ctime_ns
        assert shown_ns > node.attributes.ctime_ns
        await mount.close(inode)
        await mount.drain()
        node = mount.cache.index.node(inode)
        assert node is not None and not node.staged and node.attributes is not None
        assert node.attributes.ctime_ns == shown_ns


async def test_metadata_says_mode_owner_time_checksum_and_whose_it_is(tmp_path: Path) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        inode = await mount.create("file")
        mount.write(inode, SMALL)
        await mount.apply(messages.SetXattr(inode, b"user.a", b"b"))
        await mount.close(inode)
        await mount.drain()
        metadata = lake.head("file").metadata
        assert (metadata["mode"], metadata["uid"], metadata["gid"]) == ("644", "7", "8")
        node = mount.cache.index.node(inode)
        assert node is not None
        assert metadata["mtime"] == f"{node.mtime_ns // 10**9}.{node.mtime_ns % 10**9:09}"
        assert metadata["sluice-id"].startswith("c1-")
        assert metadata["sluice-checksum"].startswith("xxh3-128k:")
        assert metadata["sluice-xattrs"]


async def test_receipts_tell_what_the_lake_acknowledged(tmp_path: Path) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        await mount.mkdir("d")
        await mount.put("d/a", SMALL)
        await mount.put("b", b"")
        await mount.drain()
        (receipt,) = await mount.uploader.receipts([b"d"])
        info = lake.head("d/a")
        assert (receipt["path"], receipt["key"], receipt["etag"]) == ("d/a", "d/a", info.version.etag)
        assert (receipt["size"], receipt["checksum"]) == (len(SMALL), info.metadata["sluice-checksum"])
        assert {receipt["path"] for receipt in await mount.uploader.receipts()} == {"d/a", "b"}


async def test_receipts_are_of_what_is_there_under_its_name_of_now(tmp_path: Path) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        for name in ("stays", "goes", "moves", "replaced"):
            await mount.put(name, name.encode())
        await mount.mkdir("d")
        await mount.drain()
        await mount.unlink("goes")
        await mount.rename("moves", "d/moved")
        await mount.rename("stays", "replaced")
        await mount.drain()
        found = {str(receipt["path"]): receipt for receipt in await mount.uploader.receipts()}
        assert set(found) == {"d/moved", "replaced"}
        for path, receipt in found.items():
            info = lake.head(path)
            assert (receipt["key"], receipt["etag"]) == (path, info.version.etag)
            assert receipt["size"] == info.version.size_bytes
        assert await mount.uploader.receipts([b"moves", b"stay"]) == []
        assert len(await mount.uploader.receipts([b"d"])) == 1
        assert len(await mount.uploader.receipts([b"d/moved", b"replaced", b"d"])) == 2


async def test_what_is_deleted_or_renamed_before_its_upload_is_sent_once_or_never(tmp_path: Path) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake, replace(QUICK, delay_s=3600.0)) as mount:
        await mount.put("gone", SMALL)
        await mount.unlink("gone")
        for number in range(10):
            await mount.put("new.tmp", b"%d" % number)
            await mount.rename("new.tmp", "last")
        await mount.drain()
        assert keys(lake) == ["last"] and content(lake, "last") == b"9"
        assert lake.requests["put"] == 1
        assert mount.cache.lake_io.bytes_sent == 1 and mount.cache.lake_io.requests["put"] == 1


async def test_overwriting_replaces_the_version_that_the_file_was_based_on(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fill({"file": b"old"})
    async with mounted(tmp_path, lake) as mount:
        await mount.replace("file", b"new one")
        await mount.drain()
        assert content(lake, "file") == b"new one"


@pytest.mark.parametrize("size_mib", [1, 40])
async def test_a_foreign_change_is_a_conflict_and_both_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size_mib: int
) -> None:
    lake = WatchedLake()
    lake.fill({"file": b"old"})
    body = body_of(size_mib * MIB)
    async with mounted(tmp_path, lake) as mount:
        await mount.inode("file")
        lake.fill({"file": b"foreign"})
        await mount.replace("file", body)
        await mount.drain()
        assert content(lake, "file") == b"foreign" and await mount.read("file") == body
        (shown,) = mount.uploader.queue()
        assert (shown["path"], shown["state"]) == ("file", CONFLICT) and "changed" in str(shown["error"])
        assert sum("conflict" in record.message for record in caplog.records) == 1
        with pytest.raises(LakeError, match="conflict"):
            await mount.uploader.wait_for(await mount.inode("file"))
        assert not lake._uploads
        with pytest.raises(NameMissing):
            await mount.uploader.resolve(b"other", "ours")
        await mount.uploader.resolve(b"file", "ours")
        await mount.drain()
        assert content(lake, "file") == body and mount.uploader.queue() == []


async def test_resolving_for_theirs_shows_the_lakes_object_and_keeps_ours_aside(tmp_path: Path) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        lake.fill({"file": b"foreign"})
        await mount.cache.lister.list_directory(await mount.inode(""))  # type: ignore[arg-type]
        lake.delete_many(["file"])
        await mount.cache.lister.refresh_entry(1, b"file")  # type: ignore[arg-type]
        inode = await mount.put("file", SMALL)
        lake.fill({"file": b"foreign"})
        await mount.until(lambda: [row["state"] for row in mount.uploader.queue()] in ([], [CONFLICT]))
        await mount.uploader.resolve(b"file", "theirs")
        assert await mount.inode("file") != inode
        assert await mount.read("file") == b"foreign"
        (kept,) = (tmp_path / "lost+found").iterdir()
        assert kept.read_bytes() == SMALL
        await mount.drain()
        assert content(lake, "file") == b"foreign"


async def test_an_unavailable_lake_is_asked_for_as_long_as_it_takes(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fault = lambda verb, key: SlowDown("busy") if verb == "put" else None
    async with mounted(tmp_path, lake, retry=writeback_retry()) as mount:
        await mount.put("file", SMALL)
        await mount.until(lambda: any(row["state"] == "retrying" for row in mount.uploader.queue()))
        (shown,) = mount.uploader.queue()
        assert shown["error"] == "busy" and shown["bytes"] == len(SMALL)
        lake.fault = None
        await mount.drain()
        assert content(lake, "file") == SMALL


def writeback_retry() -> object:
    from tests.wiring import NO_RETRY

    return NO_RETRY


async def test_a_refusal_is_shown_and_tried_again_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lake = WatchedLake()
    lake.fault = lambda verb, key: AccessDenied("no") if verb == "put" else None
    async with mounted(tmp_path, lake) as mount:
        inode = await mount.put("file", SMALL)
        await mount.drain()
        (shown,) = mount.uploader.queue()
        assert (shown["state"], shown["error"]) == (FAILED, "no")
        assert sum("`sluice queue`" in record.message for record in caplog.records) == 1
        with pytest.raises(LakeError, match="no"):
            await mount.uploader.wait_for(inode)
        lake.fault = None
        assert await mount.uploader.retry(b"other") == 0
        assert await mount.uploader.retry() == 1
        await mount.drain()
        assert content(lake, "file") == SMALL and mount.uploader.queue() == []


@pytest.mark.parametrize("verb", ["put", "complete_multipart"])
async def test_a_lost_answer_is_no_conflict(tmp_path: Path, verb: str) -> None:
    lake = LosingLake(verb)
    body = body_of(40 * MIB if verb != "put" else MIB)
    async with mounted(tmp_path, lake) as mount:
        await mount.put("file", body)
        await mount.drain()
        assert mount.uploader.queue() == [] and content(lake, "file") == body
        assert lake.lost == 0


class LosingLake(WatchedLake):
    """Does what it is asked and says that it failed, once."""

    def __init__(self, verb: str, times: int = 1) -> None:
        super().__init__()
        self.verb, self.lost = verb, times

    def _lose(self, verb: str, info: object) -> object:
        if verb == self.verb and self.lost:
            self.lost -= 1
            raise LakeUnavailable("reset")
        return info

    def put(self, *args: object, **options: object) -> object:  # type: ignore[override]
        return self._lose("put", super().put(*args, **options))  # type: ignore[arg-type]

    def complete_multipart(self, *args: object, **options: object) -> object:  # type: ignore[override]
        return self._lose("complete_multipart", super().complete_multipart(*args, **options))  # type: ignore[arg-type]


async def test_a_large_file_goes_in_parts_and_is_taken_over(tmp_path: Path) -> None:
    lake = WatchedLake()
    body = body_of(50 * MIB + 3)
    async with mounted(tmp_path, lake) as mount:
        inode = await mount.put("big", body)
        await mount.drain()
        assert content(lake, "big") == body
        assert lake.requests["put_part"] == 4 and mount.cache.lake_io.bytes_sent == len(body)
        node = mount.cache.index.node(inode)
        assert node is not None and not node.staged
        assert mount.cache.resident_bytes(lake.head("big").version) == body
        residency = mount.cache.residency.tiers[0]
        assert residency.budget.used_bytes == residency.files.whole_bytes(len(body))


async def test_parts_that_failed_are_sent_again_and_no_others(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fault = Faults(put_part=3)
    lake.fault.error = LakeUnavailable
    body = body_of(80 * MIB)
    async with mounted(tmp_path, lake, retry=writeback_retry()) as mount:
        await mount.put("big", body)
        await mount.drain()
        assert content(lake, "big") == body
        assert lake.requests["start_multipart"] == 1
        assert mount.cache.lake_io.bytes_sent <= 1.5 * len(body)


async def test_an_upload_that_the_lake_forgot_starts_anew(tmp_path: Path) -> None:
    lake = WatchedLake()
    gate = lake.hold("complete_multipart")
    body = body_of(40 * MIB)
    async with mounted(tmp_path, lake) as mount:
        await mount.put("big", body)
        await lake.met("complete_multipart")
        lake._uploads.clear()
        gate.set()
        await mount.drain()
        assert content(lake, "big") == body and lake.requests["start_multipart"] == 2


async def test_a_file_that_is_written_to_while_it_is_sent_is_sent_again(tmp_path: Path) -> None:
    lake = WatchedLake()
    gate = lake.hold("put_part")
    async with mounted(tmp_path, lake) as mount:
        await mount.put("big", body_of(40 * MIB))
        await lake.met("put_part")
        inode = await mount.open("big")
        mount.write(inode, b"changed", 20 * MIB)
        await mount.close(inode)
        expected = await mount.read("big")
        gate.set()
        await mount.drain()
        assert content(lake, "big") == expected and not lake._uploads


async def test_an_open_file_is_sent_when_it_is_quiet_and_stays_staged(tmp_path: Path) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        inode = await mount.create("log")
        mount.write(inode, b"one")
        await mount.uploader.wait_for(inode)
        assert content(lake, "log") == b"one"
        node = mount.cache.index.node(inode)
        assert node is not None and node.staged
        await mount.drain()
        mount.write(inode, b"two", 3)
        await mount.uploader.wait_for(inode)
        assert content(lake, "log") == b"onetwo"
        sent = lake.requests["put"]
        await mount.close(inode)
        await mount.drain()
        node = mount.cache.index.node(inode)
        assert node is not None and not node.staged and lake.requests["put"] == sent
        assert mount.cache.resident_bytes(lake.head("log").version) == b"onetwo"


async def test_waiting_for_one_file_ends_its_quiet_time_only(tmp_path: Path) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake, replace(QUICK, delay_s=3600.0)) as mount:
        inode = await mount.put("now", SMALL)
        await mount.put("later", SMALL)
        with trio.fail_after(30):
            await mount.uploader.wait_for(inode)
        assert keys(lake) == ["now"]
        assert mount.uploader.dirty_bytes == len(SMALL)
        await mount.drain()
        assert keys(lake) == ["later", "now"]


async def test_a_file_renamed_while_it_is_sent_ends_under_its_new_name(tmp_path: Path) -> None:
    lake = WatchedLake()
    gate = lake.hold("put")
    async with mounted(tmp_path, lake) as mount:
        await mount.put("old", SMALL)
        await lake.met("put")
        await mount.rename("old", "new")
        gate.set()
        await mount.drain()
        assert keys(lake) == ["new"] and content(lake, "new") == SMALL
        assert await mount.read("new") == SMALL and not await mount.shows("old")
        assert lake.requests["put"] == 1


async def test_a_file_removed_while_it_is_sent_does_not_come_back(tmp_path: Path) -> None:
    lake = WatchedLake()
    gate = lake.hold("put")
    async with mounted(tmp_path, lake) as mount:
        await mount.put("file", SMALL)
        await lake.met("put")
        await mount.unlink("file")
        await mount.put("file", b"another")
        gate.set()
        await mount.drain()
        assert keys(lake) == ["file"] and content(lake, "file") == b"another"


@pytest.mark.parametrize("is_link", [False, True])
async def test_a_file_removed_at_the_moment_that_it_would_be_clean_does_not_come_back(
    tmp_path: Path, is_link: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The removal waits for the next transaction, which is the one that would say that it is clean."""
    lake, commit_clean = WatchedLake(), Puts._commit_clean
    async with mounted(tmp_path, lake) as mount:
        writing = mount.cache.writing
        assert writing is not None

        def unlink(w: IndexWriter) -> int:
            change = TreeChange(w, mount.cache.table, writing.ledger.staging, None, (7, 8), 0)
            return change.apply(messages.Unlink(1, b"file"))

        def removed_before(puts: Puts, *args: Any) -> bool:
            mount.cache.committer.commit_nowait(unlink)
            return commit_clean(puts, *args)

        monkeypatch.setattr(Puts, "_commit_clean", removed_before)
        if is_link:
            await mount.apply(messages.MakeSymlink(1, b"file", b"to/there", 7, 8))
        else:
            await mount.put("file", SMALL)
        await mount.drain()
        assert keys(lake) == [] and mount.uploader.queue() == [] and not await mount.shows("file")
        assert [record.message for record in caplog.records] == []


async def test_a_file_removed_while_it_is_sent_is_worth_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lake = WatchedLake()
    gate = lake.hold("put")
    async with mounted(tmp_path, lake) as mount:
        await mount.put("file", SMALL)
        await lake.met("put")
        await mount.unlink("file")
        await mount.until(lambda: mount.staged_numbers() == [])
        gate.set()
        await mount.drain()
        assert keys(lake) == [] and [record.message for record in caplog.records] == []


async def test_a_warning_that_a_file_leaves_the_cache_names_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        (tmp_path / "nvme0" / "incoming").rmdir()
        inode = await mount.put("file", SMALL)
        node = mount.cache.index.node(inode)
        assert node is not None and mount.cache.writing is not None
        await mount.drain()
        (told,) = [record.message for record in caplog.records]
        assert told.startswith(f"{mount.cache.writing.ledger.staging.path(node.staged)}: can't be kept")
        assert content(lake, "file") == SMALL and mount.uploader.queue() == []


async def test_what_became_known_of_the_lake_while_a_file_is_sent_is_no_conflict(tmp_path: Path) -> None:
    """What is in the way is ours, and the change that gives it up comes after the request was made."""
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        await mount.inode("")
        gate = lake.hold("put")
        await mount.put("file", SMALL)
        await lake.met("put")
        lake.fill({"file": b"given up"})
        ((seq, row),) = mount.cache.table.at(b"file")
        assert isinstance(row, Put) and row.base_etag == ""
        known = replace_row(row, base_etag=ANY_ETAG)
        await mount.cache.committer.commit(lambda w: mount.cache.table.replace(w, seq, known))
        gate.set()
        await mount.drain()
        assert mount.uploader.queue() == [] and content(lake, "file") == SMALL


async def test_what_waits_for_a_conflict_keeps_no_drain_waiting(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fill({"d/file": b"old", "d/other": b"other"})
    async with mounted(tmp_path, lake) as mount:
        await mount.inode("d/other")
        await mount.inode("d/file")
        lake.fill({"d/file": b"foreign"})
        await mount.replace("d/file", SMALL)
        await mount.drain()
        await mount.rename("d", "e")
        await mount.drain()
        states = {row["operation"]: row["state"] for row in mount.uploader.queue()}
        assert states["put"] == CONFLICT
        await mount.uploader.resolve(b"e/file", "ours")
        await mount.drain()
        assert mount.uploader.queue() == [] and content(lake, "e/file") == SMALL


async def test_a_drain_waits_for_what_nothing_but_a_fault_of_ours_holds_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        running = mount.cache.table.running
        running.begin(10**6, Delete(b"d/"))  # Nobody carries it out.
        await mount.mkdir("d")
        await mount.put("d/file", SMALL)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.drain)
            await mount.until(lambda: any("wait for each other" in one.message for one in caplog.records))
            assert nursery.child_tasks and len(mount.uploader.queue()) == 2
            running.end(10**6)
        assert mount.uploader.queue() == [] and content(lake, "d/file") == SMALL


async def test_an_unlinked_file_of_several_parts_leaves_no_upload_behind(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fault = Faults(put_part=10**6)
    lake.fault.error = LakeUnavailable
    async with mounted(tmp_path, lake, retry=writeback_retry()) as mount:
        await mount.put("big", body_of(40 * MIB))
        await mount.until(lambda: bool(lake._uploads))
        await mount.until(lambda: mount.uploader.queue()[0]["state"] == "retrying")
        await mount.unlink("big")
        await mount.drain()
        await mount.until(lambda: not lake._uploads)
        assert keys(lake) == [] and mount.uploader.queue() == []


async def test_a_file_unlinked_during_its_upload_leaves_none_behind(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fault = Faults(put_part=10**6)
    lake.fault.error = LakeUnavailable
    async with mounted(tmp_path, lake) as mount:
        await mount.put("big", body_of(40 * MIB))
        await mount.until(lambda: bool(lake._uploads))
        assert mount.uploader.queue()[0]["state"] == "running"
        await mount.unlink("big")
        lake.fault = None
        await mount.drain()
        await mount.until(lambda: not lake._uploads)
        assert keys(lake) == [] and mount.uploader.queue() == []


async def test_bytes_that_break_on_their_way_again_and_again_are_refused_and_kept(tmp_path: Path) -> None:
    """Who waits for them hears of it: neither lake nor program will mend it."""
    lake = WatchedLake()
    lake.fault = Faults(put=10**6)
    lake.fault.error = BodyBroken
    async with mounted(tmp_path, lake, retry=writeback_retry()) as mount:
        await mount.put("file", SMALL)
        await mount.drain()
        (shown,) = mount.uploader.queue()
        assert shown["state"] == FAILED
        lake.fault = None
        await mount.uploader.retry()
        await mount.drain()
        assert content(lake, "file") == SMALL


async def test_a_symlink_is_an_object_that_holds_its_target(tmp_path: Path) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        await mount.apply(messages.MakeSymlink(1, b"link", b"to/there", 7, 8))
        await mount.drain()
        assert keys(lake) == ["link.rclonelink"] and content(lake, "link.rclonelink") == b"to/there"
        assert mount.uploader.queue() == []
        await mount.rename("link", "other")
        await mount.drain()
        assert keys(lake) == ["other.rclonelink"]


async def test_a_file_without_room_in_the_tier_leaves_the_cache_once_sent(tmp_path: Path) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake, tier_bytes=MIB) as mount:
        inode = await mount.put("big", body_of(3 * MIB))
        await mount.drain()
        node = mount.cache.index.node(inode)
        assert node is not None and not node.staged and mount.cache.index.version(node.vid) is None
        await mount.until(lambda: mount.staged_numbers() == [])
        assert mount.cache.residency.tiers[0].budget.used_bytes == 0


async def test_an_overwritten_version_leaves_the_tier(tmp_path: Path) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        for number in range(3):
            inode = await (mount.replace if number else mount.put)("file", body_of(MIB, number))
            await mount.drain()
        node = mount.cache.index.node(inode)
        assert node is not None
        await mount.until(lambda: len(list(mount.cache.index.versions())) == 1)
        assert mount.cache.index.version(node.vid) is not None


async def test_empty_files_and_directories_get_objects(tmp_path: Path) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        await mount.mkdir("d")
        await mount.put("d/empty", b"")
        await mount.mkdir("d/e")
        await mount.drain()
        assert keys(lake) == ["d/", "d/e/", "d/empty"]
        assert lake.head("d/").metadata["mode"] == "755"
        await mount.until(lambda: mount.staged_numbers() == [])


async def test_chmod_of_a_clean_file_restates_its_metadata(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.put("file", SMALL, metadata={"other": "kept"})
    async with mounted(tmp_path, lake) as mount:
        inode = await mount.inode("file")
        await mount.apply(messages.SetAttributes(inode, mode=0o600))
        await mount.drain()
        metadata = lake.head("file").metadata
        assert (metadata["mode"], metadata["other"]) == ("600", "kept")
        assert await mount.read("file") == SMALL and await mount.inode("file") == inode
        assert mount.uploader.queue() == []


async def test_bandwidth_is_bounded(tmp_path: Path) -> None:
    lake = WatchedLake()
    async with mounted(tmp_path, lake, replace(QUICK, bandwidth=4 * MIB)) as mount:
        started_s = trio.current_time()
        for number in range(4):
            await mount.put(f"f{number}", body_of(MIB))
        await mount.drain()
        assert trio.current_time() - started_s > 0.4  # A lower bound only: it can't be faster.


async def test_a_large_file_does_not_keep_small_ones_waiting(tmp_path: Path) -> None:
    lake = WatchedLake()
    parts, end = lake.hold("put_part"), lake.hold("complete_multipart")
    async with mounted(tmp_path, lake) as mount:
        await mount.put("big", body_of(100 * MIB))
        await lake.met("put_part", 3)
        await mount.put("small", SMALL)
        parts.set()
        await mount.until(lambda: not is_missing(lake, "small"))
        end.set()
        await mount.drain()
        assert keys(lake) == ["big", "small"]


async def test_a_file_of_more_than_one_object_fails_clearly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.uploading.OBJECT_BYTES_MAX", 5)
    lake = WatchedLake()
    async with mounted(tmp_path, lake) as mount:
        await mount.put("file", b"123456")
        await mount.drain()
        (shown,) = mount.uploader.queue()
        assert shown["state"] == FAILED and "too many for one object" in str(shown["error"])
        assert await mount.read("file") == b"123456"


async def test_an_abandoned_open_row_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.planning._ABANDONED_S", 0.0)
    monkeypatch.setattr("cache.dispatching._SCAN_S", 0.01)
    lake = WatchedLake()
    async with mounted(tmp_path, lake, replace(QUICK, open_delay_s=3600.0)) as mount:
        inode = await mount.create("file")
        mount.write(inode, SMALL)
        mount.shared.opens.closed(inode, writing=True)  # And the message was lost.
        await mount.until(lambda: not mount.uploader.queue())
        assert content(lake, "file") == SMALL


async def test_what_a_worker_opens_meanwhile_is_not_taken_over(tmp_path: Path) -> None:
    lake = WatchedLake()
    gate = lake.hold("put")
    async with mounted(tmp_path, lake) as mount:
        inode = await mount.put("file", SMALL)
        await lake.met("put")
        mount.shared.opens.opened(inode, writing=True)
        gate.set()
        await mount.drain()
        node = mount.cache.index.node(inode)
        assert node is not None and node.staged
        mount.write(inode, b"more", len(SMALL))
        await mount.close(inode)
        await mount.drain()
        assert content(lake, "file") == SMALL + b"more"


# A directory as a lake.


async def test_a_directory_lake_gets_files_markers_and_metadata(tmp_path: Path) -> None:
    (tmp_path / "lake").mkdir()
    (tmp_path / "cache").mkdir()
    lake = DirectoryLake(LakeConfig(str(tmp_path / "lake")))
    async with mounted(tmp_path / "cache", lake) as mount:
        await mount.mkdir("d")
        await mount.put("d/file", SMALL)
        big = body_of(40 * MIB)
        await mount.put("big", big)
        await mount.drain()
        assert (tmp_path / "lake/d/file").read_bytes() == SMALL
        assert (tmp_path / "lake/big").read_bytes() == big
        inode = await mount.inode("d/file")
        etag = lake.head("d/file").version.etag
        await mount.apply(messages.SetAttributes(inode, mode=0o600))
        await mount.rename("d", "e")
        await mount.drain()
        assert not (tmp_path / "lake/d").exists()
        assert lake.head("e/file").metadata["mode"] == "600" and lake.head("e/file").version.etag != etag
        assert await mount.read("e/file") == SMALL
