"""Renames and deletes of what the lake has, and crashes at every request of uploads and moves."""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from cache import messages
from cache.config import LakeConfig
from cache.errors import AccessDenied, LakeUnavailable
from cache.lake.s3 import S3Lake
from cache.model import MIB
from tests.uploads import QUICK, Mount, content, keys, mounted
from tests.wiring import NO_RETRY, QUICK_RETRY, Shared, WatchedLake
from tools.servers import SeaweedServer


def body_of(size_bytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


async def list_all(mount: Mount, path: str = "") -> None:
    """Have the index know everything at and below *path*."""
    inode = await mount.inode(path)
    await mount.cache.lister.list_directory(inode)  # type: ignore[arg-type]
    for _, node in mount.cache.index.children(inode, b"", 10_000):
        if node.is_directory:
            await list_all(mount, f"{path}/{node.name.decode()}".lstrip("/"))


async def test_a_renamed_object_is_copied_and_keeps_its_cached_bytes(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fill({"old": b"content"})
    async with mounted(tmp_path, lake) as mount:
        inode = await mount.inode("old")
        await mount.cache.fetch(lake.head("old").version)
        await mount.rename("old", "new")
        assert await mount.inode("new") == inode and await mount.read("new") == b"content"
        await mount.drain()
        assert keys(lake) == ["new"] and content(lake, "new") == b"content"
        node = mount.cache.index.node(inode)
        assert node is not None and not node.origin and node.etag == lake.head("new").version.etag
        assert mount.cache.index.version(node.vid) is not None
        assert mount.uploader.queue() == [] and lake.requests["put"] == 0


async def test_a_chain_of_renames_ends_at_the_last_name(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fill({"a": b"1", "b": b"2"})
    async with mounted(tmp_path, lake) as mount:
        await list_all(mount)
        gate = lake.hold("copy")
        await mount.rename("a", "c")
        await lake.met("copy")
        await mount.rename("c", "d")
        await mount.rename("b", "a")
        await mount.rename("d", "b")
        gate.set()
        await mount.drain()
        assert {key: content(lake, key) for key in keys(lake)} == {"a": b"2", "b": b"1"}
        assert await mount.read("a") == b"2" and await mount.read("b") == b"1"


async def test_a_directory_moves_with_all_below_it(tmp_path: Path) -> None:
    lake = WatchedLake(page_keys=7)
    lake.fill({f"d/{i % 3}/f{i}": b"%d" % i for i in range(40)} | {"d/": b"", "dx": b"other"})
    async with mounted(tmp_path, lake) as mount:
        await list_all(mount)
        await mount.rename("d", "e")
        assert await mount.read("e/1/f4") == b"4"
        await mount.drain()
        expected = {f"e/{i % 3}/f{i}": b"%d" % i for i in range(40)} | {"e/": b"", "dx": b"other"}
        assert {key: content(lake, key) for key in keys(lake)} == expected
        assert await mount.read("e/1/f4") == b"4" and mount.uploader.queue() == []
        assert not await mount.shows("d")


async def test_what_changes_below_a_moving_directory_ends_where_the_mount_shows_it(
    tmp_path: Path,
) -> None:
    lake = WatchedLake()
    lake.fill({f"d/f{i}": b"%d" % i for i in range(8)})
    async with mounted(tmp_path, lake) as mount:
        await list_all(mount)
        gate = lake.hold("copy")
        await mount.rename("d", "e")
        await lake.met("copy")
        await mount.rename("e/f0", "out")
        await mount.unlink("e/f1")
        await mount.replace("e/f2", b"new")
        await mount.put("e/made", b"made")
        await mount.rename("e/f3", "e/f4")
        await mount.rename("e", "g")
        gate.set()
        await mount.drain()
        expected = {"out": b"0", "g/f2": b"new", "g/made": b"made", "g/f4": b"3"}
        expected |= {f"g/f{i}": b"%d" % i for i in (5, 6, 7)}
        assert {key: content(lake, key) for key in keys(lake) if not key.endswith("/")} == expected
        for key, body in expected.items():
            assert await mount.read(key) == body


async def test_a_new_directory_that_moves_too_takes_nothing_from_the_one_before_it(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fill({"a/": b"", "a/f": b"old", "a/d/f": b"deep", "b": b"b"})
    async with mounted(tmp_path, lake) as mount:
        await list_all(mount)
        gate = lake.hold("copy")
        await mount.rename("a", "first")
        await lake.met("copy")
        await mount.mkdir("a")
        await mount.rename("b", "a/b")
        await mount.rename("a", "second")
        gate.set()
        await mount.drain()
        expected = {"first/f": b"old", "first/d/f": b"deep", "second/b": b"b"}
        assert {key: content(lake, key) for key in keys(lake) if not key.endswith("/")} == expected
        assert not any(key.startswith("a/") for key in keys(lake))


async def test_a_removed_tree_is_deleted_in_batches(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fill({f"d/f{i}": b"" for i in range(300)} | {"d/": b"", "kept": b""})
    async with mounted(tmp_path, lake, replace(QUICK, delay_s=0.0)) as mount:
        await list_all(mount)
        for i in range(300):
            await mount.unlink(f"d/f{i}")
        await mount.rmdir("d")
        await mount.drain()
        assert keys(lake) == ["kept"]
        assert mount.cache.lake_io.requests["delete"] < 100


async def test_deletes_that_fail_stay_for_themselves(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fill({"a": b"", "b": b"", "c": b""})
    lake.fault = lambda verb, key: AccessDenied("locked") if (verb, key) == ("delete", "b") else None
    async with mounted(tmp_path, lake) as mount:
        await list_all(mount)
        for name in "abc":
            await mount.unlink(name)
        await mount.drain()
        (shown,) = mount.uploader.queue()
        assert (shown["path"], shown["state"], shown["error"]) == ("b", "failed", "locked")
        assert keys(lake) == ["b"] and not await mount.shows("b")
        lake.fault = None
        assert await mount.uploader.retry(b"b") == 1
        await mount.drain()
        assert keys(lake) == []


async def test_what_is_open_is_deleted_when_it_is_closed(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fill({"file": b"content", "other": b""})
    async with mounted(tmp_path, lake) as mount:
        inode = await mount.inode("file")
        mount.shared.opens.opened(inode)
        await mount.unlink("file")
        await mount.unlink("other")
        await mount.until(lambda: keys(lake) == ["file"])
        mount.shared.opens.closed(inode)
        assert mount.cache.writing is not None
        await mount.cache.writing.changes.closed(inode)
        await mount.until(lambda: keys(lake) == [])


async def test_a_source_that_vanished_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lake = WatchedLake()
    lake.fill({"a": b"1", "d/x": b"2", "d/y": b"3"})
    async with mounted(tmp_path, lake, replace(QUICK, delay_s=3600.0)) as mount:
        await list_all(mount)
        await mount.rename("a", "b")
        await mount.rename("d", "e")
        lake.delete_many(["a", "d/x"])
        await mount.drain()
        assert keys(lake) == ["e/y"] and mount.uploader.queue() == []
        assert any("gone from the lake" in record.message for record in caplog.records)
        await mount.until(lambda: mount.cache.index.child(1, b"b") is None)


async def test_a_source_that_changed_is_moved_as_it_is(tmp_path: Path) -> None:
    lake = WatchedLake()
    lake.fill({"a": b"1"})
    async with mounted(tmp_path, lake, replace(QUICK, delay_s=3600.0)) as mount:
        await list_all(mount)
        await mount.rename("a", "b")
        lake.fill({"a": b"newer"})
        await mount.drain()
        assert keys(lake) == ["b"] and content(lake, "b") == b"newer"
        await mount.until(lambda: mount.cache.names()["b"][1].size_bytes == 5)


# Crashes


class Crash(Exception):
    """The process ends here."""


class CountingLake(WatchedLake):
    """Counts requests; from one of them on, before or after it was carried out, nothing gets through."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.crash_at, self.after = 0, 10**9, False
        self.crashed = threading.Event()
        self._counter = threading.Lock()
        self.parts_bytes = 0

    def begin(self, crash_at: int, *, after: bool) -> None:
        self.count, self.crash_at, self.after = 0, crash_at, after
        self.crashed = threading.Event()

    def _ends(self) -> bool:
        with self._counter:
            self.count += 1
            if self.count >= self.crash_at:
                self.crashed.set()
            return self.count > self.crash_at or (self.count == self.crash_at and not self.after)

    def put(self, key: str, body: bytes, **options: object) -> object:  # type: ignore[override]
        return self._do(lambda: super(CountingLake, self).put(key, body, **options))  # type: ignore[arg-type]

    def _do(self, call: Callable[[], object]) -> object:
        if self._ends():
            raise LakeUnavailable("the process is dead")
        result = call()
        if self.crashed.is_set():
            raise LakeUnavailable("the answer is lost")
        return result

    def put_part(self, *args: object) -> object:  # type: ignore[override]
        def call() -> object:
            part = super(CountingLake, self).put_part(*args)  # type: ignore[arg-type]
            self.parts_bytes += part.size_bytes
            return part

        return self._do(call)

    def start_multipart(self, *args: object, **options: object) -> object:  # type: ignore[override]
        return self._do(lambda: super(CountingLake, self).start_multipart(*args, **options))  # type: ignore[arg-type]

    def complete_multipart(self, *args: object, **options: object) -> object:  # type: ignore[override]
        return self._do(lambda: super(CountingLake, self).complete_multipart(*args, **options))  # type: ignore[arg-type]

    def copy(self, *args: object, **options: object) -> object:  # type: ignore[override]
        return self._do(lambda: super(CountingLake, self).copy(*args, **options))  # type: ignore[arg-type]

    def delete_many(self, keys: object) -> object:  # type: ignore[override]
        return self._do(lambda: super(CountingLake, self).delete_many(keys))  # type: ignore[arg-type]


async def crash_and_go_on(
    path: Path,
    lake: CountingLake,
    work: Callable[[Mount], Awaitable[None]],
    after: Callable[[Mount], Awaitable[None]],
) -> None:
    """Do *work*, end everything at the lake's crash point, start again, do *after* and drain."""
    shared = Shared.make()
    async with mounted(path, lake, shared=shared, retry=NO_RETRY) as mount:
        await work(mount)
        with trio.move_on_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(end_when_drained, mount, nursery)
                await trio.to_thread.run_sync(lambda: lake.crashed.wait(30), abandon_on_cancel=True)
                nursery.cancel_scope.cancel()
    lake.crash_at, lake.crashed = 10**9, threading.Event()
    async with mounted(path, lake, shared=shared, first=False, retry=QUICK_RETRY) as mount:
        await after(mount)
        await mount.drain()
        assert mount.uploader.queue() == []


async def end_when_drained(mount: Mount, nursery: trio.Nursery) -> None:
    await mount.uploader.drain()
    nursery.cancel_scope.cancel()


async def nothing(mount: Mount) -> None:
    pass


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("crash_at", range(1, 8))
async def test_an_upload_that_a_crash_ended_goes_on(tmp_path: Path, crash_at: int, after: bool) -> None:
    lake = CountingLake()
    lake.fill({"base": b"old"})
    body = body_of(64 * MIB)

    async def work(mount: Mount) -> None:
        lake.begin(crash_at, after=after)
        await mount.put("big", body)
        await mount.replace("base", b"new")

    await crash_and_go_on(tmp_path, lake, work, nothing)
    assert keys(lake) == ["base", "big"]
    assert content(lake, "big") == body and content(lake, "base") == b"new"
    assert lake.parts_bytes <= len(body) + 4 * 16 * MIB  # At most what was on its way.
    assert not any(upload.parts for upload in lake._uploads.values())


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("crash_at", range(1, 14, 2))
async def test_a_move_that_a_crash_ended_goes_on(tmp_path: Path, crash_at: int, after: bool) -> None:
    lake = CountingLake()
    lake.fill({f"d/f{i}": b"%d" % i for i in range(6)} | {"a": b"a"})

    async def work(mount: Mount) -> None:
        await list_all(mount)
        lake.begin(crash_at, after=after)
        await mount.rename("d", "e")
        await mount.rename("a", "b")

    async def check(mount: Mount) -> None:
        assert await mount.read("e/f3") == b"3" and await mount.read("b") == b"a"

    await crash_and_go_on(tmp_path, lake, work, check)
    expected = {f"e/f{i}": b"%d" % i for i in range(6)} | {"b": b"a"}
    assert {key: content(lake, key) for key in keys(lake)} == expected


@pytest.mark.parametrize("crash_at", [1, 2, 3])
@pytest.mark.parametrize("change", ["rename", "unlink", "append"])
async def test_what_is_changed_after_a_crash_leaves_nothing_of_before(
    tmp_path: Path, crash_at: int, change: str
) -> None:
    lake = CountingLake()

    async def work(mount: Mount) -> None:
        lake.begin(crash_at, after=True)
        await mount.put("file", b"content")
        await mount.put("other", b"other")

    async def after(mount: Mount) -> None:
        if change == "rename":
            await mount.rename("file", "new")
        elif change == "unlink":
            await mount.unlink("file")
        else:
            inode = await mount.open("file")
            mount.write(inode, b"more", 7)
            await mount.close(inode)

    await crash_and_go_on(tmp_path, lake, work, after)
    expected = {"rename": {"new": b"content"}, "unlink": {}, "append": {"file": b"contentmore"}}[change]
    assert {key: content(lake, key) for key in keys(lake)} == {**expected, "other": b"other"}


async def test_nested_directories_that_wait_for_their_markers_keep_nobody_waiting(tmp_path: Path) -> None:
    lake, shared, config = WatchedLake(), Shared.make(), replace(QUICK, delay_s=3600.0)
    async with mounted(tmp_path, lake, config, shared=shared) as mount:
        for name in ("d", "d/e"):
            await mount.mkdir(name)
        for name in ("d/f", "d/e/g"):
            await mount.put(name, name.encode())
    async with mounted(tmp_path, lake, config, shared=shared, first=False) as mount:
        await mount.drain()
        assert mount.uploader.queue() == [] and keys(lake) == ["d/", "d/e/", "d/e/g", "d/f"]


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_is_done_the_lake_ends_as_the_mount_shows(tmp_path: Path, seed: int) -> None:
    """Random changes, with failures and lost answers in between, against a model in memory."""
    generator = random.Random(seed)
    lake = WatchedLake()
    lake.fault = lambda verb, key: (
        LakeUnavailable("now and then") if verb not in ("list", "head") and generator.random() < 0.2 else None
    )
    lake.fill(model := {f"{d}/f{i}": b"%s%d" % (d.encode(), i) for d in "abc" for i in range(3)})
    async with mounted(tmp_path, lake) as mount:
        await list_all(mount)
        for number in range(60):
            await random_change(mount, model, generator, number)
            if generator.random() < 0.2:
                with trio.move_on_after(0.02):
                    await mount.uploader.drain()
        await mount.drain()
        lake.fault = None
        assert mount.uploader.queue() == []
        assert {key: content(lake, key) for key in keys(lake) if not key.endswith("/")} == model
        for key, body in model.items():
            assert await mount.read(key) == body, key
        await mount.until(lambda: mount.staged_numbers() == [])


KINDS = ["write", "write", "unlink"]
RENAME_KINDS = ["rename", "rename"]
DIRECTORY_KINDS = ["directory", "back"]


async def random_change(
    mount: Mount, model: dict[str, bytes], generator: random.Random, number: int, kinds: list[str] = KINDS
) -> None:
    name = f"{generator.choice('abc')}/f{generator.randrange(5)}"
    present = sorted(model)
    kind = generator.choice(kinds)
    if kind == "write":
        body = b"written %d" % number
        await (mount.replace if name in model else mount.put)(name, body)
        model[name] = body
    elif kind == "rename" and present:
        old = generator.choice(present)
        if old != name:
            await mount.rename(old, name)
            model[name] = model.pop(old)
    elif kind == "unlink" and name in model:
        await mount.unlink(name)
        del model[name]
    elif kind == "directory":
        one = generator.choice("abc")
        await mount.rename(one, f"moved{number}")
        await mount.mkdir(one)
        for key in [key for key in model if key.startswith(f"{one}/")]:
            model[f"moved{number}/{key[2:]}"] = model.pop(key)
    elif kind == "back" and any(key.startswith("moved") for key in model):
        old = generator.choice([key for key in present if key.startswith("moved")])
        if old != name:
            await mount.rename(old, name)
            model[name] = model.pop(old)


# A real server


async def test_a_real_server_ends_as_the_mount_shows(
    s3_server: SeaweedServer, shared_bucket: str, s3_credentials: None, tmp_path: Path
) -> None:
    url = f"s3://{shared_bucket}/{secrets.token_hex(4)}"
    lake = S3Lake(LakeConfig(url, endpoint_url=s3_server.endpoint_url))
    big = body_of(40 * MIB)
    async with mounted(tmp_path, lake) as mount:
        await mount.mkdir("d")
        await mount.put("d/big", big)
        for number in range(20):
            await mount.put(f"d/f{number}", b"%d" % number)
        await mount.drain()
        assert mount.cache.lake_io.bytes_sent == len(big) + sum(len(b"%d" % i) for i in range(20))
        await mount.rename("d", "e")
        await mount.replace("e/f1", b"new")
        await mount.unlink("e/f2")
        await mount.apply(messages.SetAttributes(await mount.inode("e/f3"), mode=0o600))
        await mount.drain()
        assert mount.uploader.queue() == []
        expected = {f"e/f{i}": b"%d" % i for i in range(20)} | {"e/f1": b"new", "e/big": big}
        del expected["e/f2"]
        assert {key: content(lake, key) for key in keys(lake) if not key.endswith("/")} == expected
        assert lake.head("e/f3").metadata["mode"] == "600"
        assert lake.head("e/big").metadata["mode"] == "644"
        for key, body in expected.items():
            assert await mount.read(key) == body
        info = lake.put("e/f4", b"foreign")
        await mount.replace("e/f4", b"ours")
        await mount.drain()
        assert [row["state"] for row in mount.uploader.queue()] == ["conflict"]
        assert lake.head("e/f4").version == info.version
        await mount.uploader.resolve(b"e/f4", "ours")
        await mount.drain()
        assert content(lake, "e/f4") == b"ours"
    lake.close()
