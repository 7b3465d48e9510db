"""What chmod made of an object, in a lake that gives the copy another ETag, when nobody noted it."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from cache import messages
from cache.config import CacheDirectory, LakeConfig, MountConfig
from cache.errors import AccessDenied, LakeError, ObjectChanged
from cache.model import MIB, ROOT_INODE, Inode
from cache.mover import Mover, TierPlan, run_mover
from cache.pending import Move, Restate
from cache.store import open_store
from tests.uploads import content, keys
from tests.wiring import Shared, WatchedLake

BODY, FOREIGN = b"some bytes", b"SOME BYTES"


class FirstCopies:
    """For `FakeLake.fault`: refuses all copies but the first few."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed

    def __call__(self, verb: str, key: str) -> LakeError | None:
        if verb != "copy":
            return None
        self.allowed -= 1
        return AccessDenied(key) if self.allowed < 0 else None


@dataclass
class Machine:
    """One whose movers run one after the other, over one lake and one cache directory."""

    directory: Path
    lake: WatchedLake

    async def run(self, script: Callable[[Mover], Awaitable[None]]) -> None:
        plans = [TierPlan("nvme0", self.directory, False, 64 * MIB)]
        config = MountConfig(
            LakeConfig("s3://bucket"),
            self.directory.parent,
            (CacheDirectory(self.directory),),
            upload_delay_s=0.0,
            read_ahead="none",
        )
        store = open_store(config)
        try:

            async def serve(mover: Mover, changes: object) -> None:
                await script(mover)

            await run_mover(config, plans, Shared.make(), serve, first=True)  # type: ignore[arg-type]
        finally:
            store.release()

    def keep(self, *names: str) -> None:
        """Copy these environments as they are on the disk."""
        for name in names:
            shutil.copytree(self.directory / name, self.directory / f"{name}.kept")

    def put_back(self) -> None:
        """Leave what was kept and nothing else of index and journal. No mover may run."""
        for name in ("index.lmdb", "journal.lmdb"):
            shutil.rmtree(self.directory / name)
            if (kept := self.directory / f"{name}.kept").exists():
                kept.rename(self.directory / name)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    lake = WatchedLake()
    lake.fill({"file": BODY})
    monkeypatch.setattr("cache.mover.open_lake", lambda config: lake)
    return Machine(tmp_path / "cache", lake)


async def find(mover: Mover, name: bytes) -> Inode:
    assert (await mover.handle(messages.Lookup(ROOT_INODE, name))).value == 1
    found = mover.index.child(ROOT_INODE, name)
    assert found is not None
    return found[0]


async def read(mover: Mover, inode: Inode) -> bytes:
    return (await mover.handle(messages.ReadThrough(inode, 0, len(BODY)))).body


async def drain(mover: Mover) -> None:
    assert mover.uploader is not None
    await mover.uploader.drain()


async def crash_during_chmod(machine: Machine, *survivors: str, rename: bool) -> None:
    """Leave the lake with chmod's copy, and of the cache what *survivors* said before it was made."""
    lake = machine.lake

    async def script(mover: Mover) -> None:
        assert mover.write_path is not None
        inode = await find(mover, b"file")
        lake.fault = FirstCopies(1)  # The rename's is refused, so that it waits.
        gate = lake.hold("copy")
        await mover.handle(messages.SetAttributes(inode, mode=0o600), 2)
        await lake.met("copy")
        if rename:
            await mover.handle(messages.Rename(ROOT_INODE, b"file", ROOT_INODE, b"new", 0), 4)
        await mover.write_path.keeper.settled()
        machine.keep(*survivors)
        gate.set()
        await drain(mover)

    before = lake.head("file").version
    await machine.run(script)
    machine.put_back()
    lake.gates.clear()
    assert lake.head("file").version.etag != before.etag and lake.head("file").metadata["mode"] == "600"


POWER_LOSS, KILL = ("journal.lmdb",), ("index.lmdb", "journal.lmdb")


@pytest.mark.parametrize("survivors", [POWER_LOSS, KILL], ids=["power", "kill"])
async def test_a_file_that_was_renamed_meanwhile_is_read_before_its_move_is_made(
    machine: Machine, survivors: tuple[str, ...]
) -> None:
    await crash_during_chmod(machine, *survivors, rename=True)
    lake = machine.lake
    lake.fault = FirstCopies(0)

    async def script(mover: Mover) -> None:
        inode = await find(mover, b"new")
        kinds = {type(row) for row in mover.table.rows.values()}
        assert kinds == {Move, Restate}
        assert await read(mover, inode) == BODY
        assert keys(lake) == ["file"] and await find(mover, b"new") == inode
        (move,) = (row for row in mover.table.rows.values() if isinstance(row, Move))
        assert move.etag == lake.head("file").version.etag

    await machine.run(script)
    lake.fault = None

    async def go_on(mover: Mover) -> None:
        inode = await find(mover, b"new")
        await drain(mover)
        assert keys(lake) == ["new"] and content(lake, "new") == BODY and not mover.table.rows
        assert await find(mover, b"new") == inode and await read(mover, inode) == BODY
        assert lake.head("new").metadata["mode"] == "600"

    await machine.run(go_on)


async def test_a_move_that_meets_our_own_copy_keeps_the_file_what_it_is(machine: Machine) -> None:
    """Nobody read it before: who has it open goes on."""
    await crash_during_chmod(machine, *KILL, rename=True)
    machine.lake.fault = None

    async def script(mover: Mover) -> None:
        found = mover.index.child(ROOT_INODE, b"new")
        assert found is not None
        await drain(mover)
        assert await find(mover, b"new") == found[0] and await read(mover, found[0]) == BODY
        assert mover.index.node(found[0]).etag == machine.lake.head("new").version.etag  # type: ignore[union-attr]

    await machine.run(script)


async def test_another_chmod_goes_on_from_one_that_a_kill_cut_off(machine: Machine) -> None:
    await crash_during_chmod(machine, *KILL, rename=False)
    machine.lake.fault = None

    async def script(mover: Mover) -> None:
        found = mover.index.child(ROOT_INODE, b"file")
        assert found is not None
        await mover.handle(messages.SetAttributes(found[0], mode=0o640), 2)
        await drain(mover)
        assert machine.lake.head("file").metadata["mode"] == "640"
        assert await find(mover, b"file") == found[0] and await read(mover, found[0]) == BODY

    await machine.run(script)


@pytest.mark.parametrize("survivors", [POWER_LOSS, KILL], ids=["power", "kill"])
@pytest.mark.parametrize("keeps_metadata", [False, True])
async def test_what_somebody_else_wrote_since_is_not_taken_for_ours(
    machine: Machine, survivors: tuple[str, ...], keeps_metadata: bool
) -> None:
    """Not even if its size is the same, and it keeps our metadata but for the time."""
    await crash_during_chmod(machine, *survivors, rename=True)
    lake = machine.lake
    kept = {**lake.head("file").metadata, "mtime": "9.0"} if keeps_metadata else {}
    lake.put("file", FOREIGN, metadata=kept)
    lake.fault = FirstCopies(0)

    async def script(mover: Mover) -> None:
        inode = await find(mover, b"new")
        with pytest.raises(ObjectChanged):
            await read(mover, inode)

    await machine.run(script)
    lake.fault = None

    async def go_on(mover: Mover) -> None:
        await drain(mover)
        assert content(lake, "new") == FOREIGN
        etag = lake.head("new").version.etag
        with trio.fail_after(30):  # It is looked at once nothing is under way any more.
            while mover.index.node(await find(mover, b"new")).etag != etag:  # type: ignore[union-attr]
                await trio.lowlevel.checkpoint()
        assert await read(mover, await find(mover, b"new")) == FOREIGN

    await machine.run(go_on)


async def test_a_chmod_that_was_not_made_before_a_power_loss_is_made_without_a_look_at_the_file(
    machine: Machine,
) -> None:
    async def script(mover: Mover) -> None:
        assert mover.write_path is not None
        inode = await find(mover, b"file")
        machine.lake.fault = FirstCopies(0)
        await mover.handle(messages.SetAttributes(inode, mode=0o600), 2)
        await mover.write_path.keeper.settled()
        machine.keep(*POWER_LOSS)

    await machine.run(script)
    machine.put_back()
    machine.lake.fault = None
    await machine.run(drain)
    assert machine.lake.head("file").metadata.get("mode") == "600"
