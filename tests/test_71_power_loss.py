"""Power is cut: what was fsynced is there afterwards, whole, and the lake never gets a torn file."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.crash_driver import (
    TIMEOUT_S,
    FolderView,
    LakeWatch,
    batches,
    check_lake,
    drain,
    known_pids,
    points,
    running,
    start,
)
from tests.crash_model import Story, Told, difference, observe
from tests.crash_script import digest, script
from tests.mounting import (
    Folder,
    LiveMount,
    Mounting,
    content,
    kill_each,
    mounts_below,
    processes_naming,
    until,
)
from tests.power_loss import ATOM_BYTES, RecordedDisk, attached_images
from tests.recording_disk import FLUSH, WRITE

pytestmark = pytest.mark.timeout(TIMEOUT_S)


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordedDisk]:
    """Outside of `tmp_path`, where mounts end before it does."""
    home = tmp_path_factory.mktemp("power")
    with RecordedDisk(home) as made:
        yield made
    assert mounts_below(home) == []
    assert [name for name in attached_images().values() if name.startswith(str(home))] == []
    assert [path for path in home.rglob("*") if path.is_file()] == []


# --- The disk itself -----------------------------------------------------------------------------


def write_synced(path: Path, body: bytes) -> None:
    with path.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


def test_what_was_fsynced_is_whole_after_every_later_power_loss(disk: RecordedDisk) -> None:
    body = content(300_000)
    write_synced(disk.mountpoint / "kept", body)
    synced = len(disk.records)
    (disk.mountpoint / "more").write_bytes(content(500_000, seed=1))
    os.sync()
    records = len(disk.records)
    assert records > synced
    for cut in {synced, synced + 1, (synced + records) // 2, records}:
        for seed in range(2):
            with disk.power_lost(cut, seed) as after:
                assert (after / "kept").read_bytes() == body, (cut, seed)


def test_what_was_not_fsynced_may_be_lost(disk: RecordedDisk) -> None:
    write_synced(disk.mountpoint / "kept", b"kept")
    synced = len(disk.records)
    (disk.mountpoint / "lost").write_bytes(content(50_000))
    with disk.power_lost(synced, seed=0) as after:
        assert sorted(os.listdir(after)) == ["kept", "lost+found"]
    assert (disk.mountpoint / "lost").read_bytes() == content(50_000), "the disk itself lost nothing"


def test_an_overwrite_that_was_cut_off_may_be_torn_in_units_of_atoms(disk: RecordedDisk) -> None:
    """And every atom is one of the two versions'."""
    size = 64 * ATOM_BYTES
    old, new = b"o" * size, b"n" * size
    write_synced(disk.mountpoint / "file", old)
    with (disk.mountpoint / "file").open("r+b") as file:
        file.write(new)
        file.flush()
        os.fsync(file.fileno())
    records = disk.records
    writes = [n for n, record in enumerate(records) if record.kind == WRITE and record.content[:1] == b"n"]
    cut = next(n for n in range(writes[-1], len(records)) if records[n].kind == FLUSH)
    found = set()
    for seed in range(8):
        with disk.power_lost(cut, seed) as after:
            body = (after / "file").read_bytes()
        atoms = [body[start : start + ATOM_BYTES] for start in range(0, size, ATOM_BYTES)]
        assert all(len(set(atom)) == 1 for atom in atoms)
        found.add("".join(chr(atom[0]) for atom in atoms))
    assert any(len(set(body)) == 2 for body in found), "some are torn"
    with disk.power_lost(len(records), seed=0) as after:
        assert (after / "file").read_bytes() == new


FSYNC = """
import os, sys
for number in range(1000):
    with open(os.path.join(sys.argv[1], str(number)), "wb") as file:
        file.write(b"content")
        file.flush()
        os.fsync(file.fileno())
    print(number, flush=True)
"""


def test_a_frozen_disk_answers_no_fsync_and_whoever_is_killed_meanwhile_has_none_answered(
    disk: RecordedDisk,
) -> None:
    disk.freeze_at(disk.flushes + 15)
    with subprocess.Popen([sys.executable, "-c", FSYNC, disk.mountpoint], stdout=subprocess.PIPE) as writer:
        cut = disk.wait_frozen()
        flushes = sum(record.kind == FLUSH for record in disk.records[:cut])
        writer.kill()
        disk.thaw()
        returned = writer.communicate()[0].split()
    with disk.power_lost(cut, seed=3) as after:
        for name in returned:
            assert (after / name.decode()).read_bytes() == b"content"
    assert 0 < len(returned) <= flushes
    write_synced(disk.mountpoint / "later", b"thawed")


@pytest.mark.parametrize("seed", range(2))
def test_a_script_on_the_disk_itself_leaves_what_the_model_allows(disk: RecordedDisk, seed: int) -> None:
    """ext4 too keeps the order of names: an fsync commits all that was done to any of them before."""
    story, roll = Story(script(seed, COUNT)), random.Random(seed)
    (disk.mountpoint / "top").mkdir()
    os.sync()
    before = len(disk.records)
    with running(disk.mountpoint / "top", seed, COUNT) as performed:
        told = performed.finish()
    for cut in (roll.randrange(before, len(disk.records) + 1) for _ in range(6)):
        with disk.power_lost(cut, seed) as after:
            found = observe(after / "top")
        assert (fault := story.fault_after_power_loss(told_before(told, disk, cut), found)) == "", fault


def test_a_disk_can_go_on_from_what_a_power_loss_left(disk: RecordedDisk) -> None:
    write_synced(disk.mountpoint / "first", b"1")
    image = disk.image_after(len(disk.records), seed=0)
    with RecordedDisk(disk.home / "again", image) as again:
        assert (again.mountpoint / "first").read_bytes() == b"1"
        write_synced(again.mountpoint / "second", b"2")
        with again.power_lost(len(again.records), seed=0) as after:
            assert (after / "second").read_bytes() == b"2"


def test_the_disk_goes_though_the_process_that_made_it_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from tests.power_loss import RecordedDisk\n"
        "with RecordedDisk(Path(sys.argv[1])) as disk: print('made', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"made\n"
        assert len(mounts_below(tmp_path)) == 2
        maker.kill()
    until(lambda: mounts_below(tmp_path) == [], "it is unmounted")
    until(lambda: str(tmp_path) not in str(attached_images()), "its loop device is free")


# --- The mount -----------------------------------------------------------------------------------

OPTIONS = ("--no-read-only", "--upload-open-delay=3600", "--keep-free=0")
COUNT = 60


def on_disk(mounting: Mounting, folder: Folder, disk: Path, *options: str) -> LiveMount:
    """Return a mount, not mounted yet, whose cache directory is on that disk."""
    mount = mounting.prepare(folder.url, f"--cache={disk / 'cache'}:64M", *OPTIONS, *options)
    mount.cache = disk / "cache"
    return mount


@contextmanager
def mounted_after_power_loss(
    mounting: Mounting, folder: Folder, disk: RecordedDisk, cut: int, seed: int
) -> Iterator[LiveMount]:
    """Yield a mount whose cache is what a power loss left on the disk, after another boot."""
    with disk.power_lost(cut, seed) as after:
        mount = on_disk(mounting, folder, after, "--upload-delay=0.1")
        forget_boot(mount.cache)
        try:
            mount.mount()
            yield mount
        finally:
            mount.end()
            print(f"after {cut} records, seed {seed}:\n{mount.log_tail(60)}")


def forget_boot(cache: Path) -> None:
    """Have the next mount find that the machine was booted since the last one."""
    if (cache / "boot").exists():
        (cache / "boot").write_text("00000000-0000-0000-0000-000000000000")


def told_before(told: list[Told], disk: RecordedDisk, cut: int) -> list[Told]:
    """Return what had been told when the record after the first *cut* ones had not arrived yet."""
    records = disk.records
    if cut >= len(records):
        return told
    return [line for line in told if line.at_ns < records[cut].at_ns]


def check_recovered(mount: LiveMount, folder: Folder, story: Story, told: list[Told]) -> None:
    """Fail unless the mount shows what it may, and the lake gets that and at no time anything torn."""
    view = FolderView(folder)
    with LakeWatch(view) as watch:
        found = observe(mount.directory)
        assert (fault := story.fault_after_power_loss(told, found)) == "", fault
        drain(mount)
        assert (fault := difference(found, observe(mount.directory))) == "", fault
        check_lake(found, view)
        # What was changed in place since its last fsync may be anything, but it is the same thing everywhere.
        shown = {digest(body) for body in found.values() if body is not None}
        assert watch.torn(story.versions() | shown) == set()
    assert "Traceback" not in mount.log()


def empty(folder: Folder) -> None:
    for path in sorted(folder.path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def test_after_a_power_loss_at_any_moment_all_that_was_fsynced_is_there_and_reaches_the_lake(
    disk: RecordedDisk, mounting: Mounting, folder: Folder
) -> None:
    """One run, of which nothing reached the lake; its record is cut at many places."""
    story = Story(script(1, COUNT))
    mount = on_disk(mounting, folder, disk.mountpoint, "--upload-delay=3600")
    mount.mount()
    before = len(disk.records)
    with running(mount.directory, 1, COUNT) as performed:
        told = performed.finish()
    last = len(disk.records)
    mount.crash()
    assert observe(folder.path) == {}
    roll = random.Random(71)
    for seed in range(points(few=5)):
        cut = roll.randrange(before, last + 1)
        with mounted_after_power_loss(mounting, folder, disk, cut, seed) as again:
            check_recovered(again, folder, story, told_before(told, disk, cut))
        empty(folder)


def test_power_may_be_lost_again_during_the_recovery(
    disk: RecordedDisk, mounting: Mounting, folder: Folder
) -> None:
    story, roll = Story(script(2, COUNT)), random.Random(72)
    mount = on_disk(mounting, folder, disk.mountpoint, "--upload-delay=3600")
    mount.mount()
    before = len(disk.records)
    with running(mount.directory, 2, COUNT) as performed:
        told = performed.finish()
    mount.crash()
    for seed in range(points(few=3)):
        cut = roll.randrange((before + len(disk.records)) // 2, len(disk.records))
        with RecordedDisk(disk.home / f"again{seed}", disk.image_after(cut, seed)) as again:
            second = on_disk(mounting, folder, again.mountpoint, "--upload-delay=3600")
            forget_boot(second.cache)
            cut_again = cut_off_start(second, again, roll.randrange(1, 20))
            with mounted_after_power_loss(mounting, folder, again, cut_again, seed) as third:
                check_recovered(third, folder, story, told_before(told, disk, cut))
        empty(folder)


def cut_off_start(mount: LiveMount, disk: RecordedDisk, flushes: int) -> int:
    """Start the mount and kill it all when so many flushes have reached the disk, or it is up before.

    Return how many records had arrived then.
    """
    disk.freeze_at(disk.flushes + flushes)
    with start(mount) as starting:
        until(lambda: disk.is_frozen() or starting.poll() is not None, "the disk is frozen")
        cut = disk.wait_frozen() if disk.is_frozen() else len(disk.records)
        signal_each(processes_naming(mount.home))
        disk.thaw()
        mount.kill_all()
    mount.end()
    return cut


@pytest.mark.parametrize("seed", range(points(few=3)))
def test_after_a_power_loss_while_files_are_sent_the_lake_gets_the_rest_and_nothing_torn(
    disk: RecordedDisk, mounting: Mounting, folder: Folder, seed: int
) -> None:
    """Power is cut at a flush; what was done to the lake until then was done."""
    story, view = Story(script(100 + seed, COUNT)), FolderView(folder)
    mount = on_disk(mounting, folder, disk.mountpoint, "--upload-delay=0.1")
    mount.mount()
    disk.freeze_at(disk.flushes + random.Random(seed).randrange(5, 60))
    with LakeWatch(view) as watch:
        with running(mount.directory, 100 + seed, COUNT) as performed:
            cut = disk.wait_frozen()
            signal_each(processes_naming(mount.home))
            disk.thaw()
            mount.kill_all()
            told = performed.finish()
        mount.unmount()
        assert watch.torn(story.versions()) == set()
    with mounted_after_power_loss(mounting, folder, disk, cut, seed) as again:
        check_recovered(again, folder, story, told)


@pytest.mark.parametrize("numbers", batches(few=8, most=12), ids=str)
def test_a_mover_that_dies_at_any_sync_loses_nothing(
    disk: RecordedDisk, mounting: Mounting, folder: Folder, numbers: list[int]
) -> None:
    """The disk stops at a flush, the mover is killed, the disk goes on. Many times in one script."""
    story, view = Story(script(numbers[0], 4 * COUNT)), FolderView(folder)
    mount = on_disk(mounting, folder, disk.mountpoint, "--upload-delay=0.1")
    mount.mount()
    with LakeWatch(view) as watch, running(mount.directory, numbers[0], 4 * COUNT) as performed:
        for number in numbers:
            pids = until(lambda: known_pids(mount), "all processes are there")
            disk.freeze_at(disk.flushes + number)
            until(lambda: disk.is_frozen() or not performed.is_going_on, "the disk is frozen")
            if disk.is_frozen():
                disk.wait_frozen()
                signal_each(pids["mover"])
                disk.thaw()
                kill_each(pids["mover"])
        told = performed.finish()
        assert [line for line in told if line.event == "failed"] == []
        until(lambda: known_pids(mount), "all processes are there again")
        drain(mount)
        assert (fault := difference(story.states[-1], observe(mount.directory))) == "", fault
        check_lake(story.states[-1], view)
        assert watch.torn(story.versions()) == set()
    mount.end()


def signal_each(pids: list[int]) -> None:
    """Have them die as soon as the disk lets go of them."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
