"""Tiers never hold more than they may, keep what they hold over unmounts and crashes, and give it back."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache import control
from tests.mount_readers import readers
from tests.mounting import (
    MIB,
    Folder,
    LiveMount,
    Mounting,
    content,
    detach,
    is_alive,
    kill_each,
    mounts_below,
    until,
)

SMALL, LARGE_BYTES = 800, 136 * MIB  # More than the tiers of `test_a_working_set…` together.
LONG = "a name so long that the label that the cache keeps beside the bytes needs a disk block of its own "


def fill(folder: Folder, small: int, large_bytes: int) -> dict[str, Path]:
    """Write *small* files of some 300 KB and a large one, cut from one random text; return them by key."""
    text = content(8 * MIB, seed=55)
    roll = random.Random(55)
    for i in range(small):
        start = roll.randrange(len(text) - 400_000)
        folder.put(f"small/{LONG}{i:04d}", text[start : start + 250_000 + roll.randrange(100_000)])
    if large_bytes:
        folder.put("large", b"".join(text[i:] + text[:i] for i in range(large_bytes // len(text))))
    return {str(path.relative_to(folder.path)): path for path in folder.path.rglob("*") if path.is_file()}


def disk_bytes(tier: Path) -> int:
    """Return what the tier's files take on their disk."""
    return sum(
        path.lstat().st_blocks * 512
        for folder in ("objects", "partial", "incoming")
        for path in (tier / folder).rglob("*")
        if path.is_file()
    )


class Sampler:
    """Compares, while it runs, what the tiers hold with the sizes that they were given."""

    def __init__(self, mount: LiveMount, **sizes_mib: int) -> None:
        self._mount = mount
        self._sizes = {name: size * MIB for name, size in sizes_mib.items()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.samples = 0
        self.over: list[str] = []

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Fail if a tier was over its size at any time."""
        while self.samples <= 3:
            self.sample()
        assert self.over == []

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self.sample()

    def sample(self) -> None:
        """Look at a moment: the mover, who writes the files, is stopped meanwhile."""
        try:
            status = control.call(self._mount.directory, "status")
        except Exception:
            return  # Between two movers.
        mover = status["processes"]["mover"]
        with stopped(mover):
            for tier in status["tiers"]:
                on_disk = disk_bytes(Path(tier["path"]))
                if tier["used_bytes"] > tier["size_bytes"] or on_disk > self._sizes[tier["name"]]:
                    self.over.append(f"{tier}, on disk {on_disk}")
        self.samples += is_alive(mover)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        yield
        return
    try:
        until(lambda: not is_alive(pid) or all_stopped(pid), "it has stopped", 5)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def all_stopped(pid: int) -> bool:
    try:
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks(pid)]
    except OSError:
        return False
    return set(states) <= {"T"}


def tasks(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def same(mount: LiveMount, name: str, truth: Path) -> bool:
    """Return whether a file that is read in order from the mount equals the lake's."""
    with (mount.directory / name).open("rb") as ours, truth.open("rb") as theirs:
        os.posix_fadvise(ours.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := theirs.read(MIB):
            if ours.read(MIB) != piece:
                return False
        return ours.read(1) == b""


def test_a_working_set_of_three_times_the_tiers_is_read_right_within_the_budgets(
    mounting: Mounting, folder: Folder
) -> None:
    files = fill(folder, SMALL, LARGE_BYTES)
    assert sum(path.stat().st_size for path in files.values()) > 2.8 * 128 * MIB
    mount = mounting.mount(folder.url, "--dram=64M", size="64M")
    with Sampler(mount, dram=64, nvme0=64) as sampler:
        for name, path in files.items():
            assert same(mount, name, path), name
        reads = mount.reads()["requests"]["reads"]
        with readers(mount.directory, folder.path, seed=55) as running:
            until(lambda: mount.reads()["requests"]["reads"] > reads + 800, "800 reads", 60)
            running.finish()
        sampler.check()
    tiers = mount.status()["tiers"]
    assert all(tier["used_bytes"] > tier["size_bytes"] // 2 for tier in tiers), "the tiers are made use of"
    assert mount.status()["moved_bytes"]["demoted"] > 0
    mount.remount()
    status = mount.status()
    assert status["tiers"][1]["used_bytes"] > 32 * MIB, "what was cached is kept"
    with Sampler(mount, dram=64, nvme0=64) as sampler:
        for name, path in list(files.items())[::5]:
            assert same(mount, name, path), name
        sampler.check()


def test_budgets_hold_though_the_mover_dies_while_it_writes(mounting: Mounting, folder: Folder) -> None:
    fill(folder, 100, 90 * MIB)
    mount = mounting.mount(folder.url, "--dram=64M", size="64M")
    roll = random.Random(57)
    with (
        readers(mount.directory, folder.path, seed=57) as running,
        Sampler(mount, dram=64, nvme0=64) as sampler,
    ):
        for _ in range(6):
            before = until(lambda: fetched_bytes(mount), "the mover fetches")
            goal = before + roll.randrange(1, 20) * MIB
            until(lambda goal=goal: fetched_bytes(mount) > goal, "it fetches on")  # type: ignore[misc]
            kill_each(mount.pids()["mover"])
        running.finish()
        until(lambda: fetched_bytes(mount) >= 0, "the last mover answers")
        sampler.check()
    mount.crash()
    mount.mount()
    with Sampler(mount, dram=64, nvme0=64) as sampler:
        for name, path in files_of(folder).items():
            assert same(mount, name, path)
        sampler.check()


def files_of(folder: Folder) -> dict[str, Path]:
    return {str(p.relative_to(folder.path)): p for p in folder.path.rglob("*") if p.is_file()}


def fetched_bytes(mount: LiveMount) -> int:
    """Return how much the mover has fetched; -1 where there is none."""
    try:
        return int(control.call(mount.directory, "status")["lake_io"]["bytes_fetched"])
    except Exception:
        return -1


def test_unmounting_moves_what_memory_holds_to_disk(mounting: Mounting, folder: Folder) -> None:
    files = fill(folder, 60, 24 * MIB)
    mount = mounting.mount(folder.url, "--dram=64M")
    for name, path in files.items():
        assert same(mount, name, path)
    dram, nvme = mount.status()["tiers"]
    assert dram["used_bytes"] > 32 * MIB and nvme["used_bytes"] == 0
    mount.unmount()
    assert mounts_below(mount.home) == []
    mount.mount()
    dram, nvme = mount.status()["tiers"]
    assert dram["used_bytes"] == 0 and nvme["used_bytes"] > 32 * MIB
    for name, path in files.items():
        assert same(mount, name, path)
    assert mount.requests()["get"] == 0


def crash_machine(mount: LiveMount) -> None:
    """Leave what a power cut leaves: no process, no memory, another boot."""
    mount.crash()
    detach(mount.cache / "dram")
    (mount.cache / "boot").write_text("00000000-0000-0000-0000-000000000000")
    (mount.cache / "clean").unlink(missing_ok=True)


def test_after_a_machine_crash_files_are_taken_over_without_fetching_them_again(
    mounting: Mounting, folder: Folder
) -> None:
    files = fill(folder, 80, 24 * MIB)
    mount = mounting.mount(folder.url)
    for name, path in files.items():
        assert same(mount, name, path)
    assert mount.status()["tiers"][0]["used_bytes"] > 40 * MIB
    for _ in range(2):
        crash_machine(mount)
        mount.mount()
        for name, path in files.items():
            assert same(mount, name, path)
        assert mount.requests()["get"] == 0
    mount.remount()
    assert mount.status()["tiers"][0]["used_bytes"] > 40 * MIB
    assert same(mount, "large", files["large"])
    assert mount.requests()["get"] == 0


def test_after_a_machine_crash_files_that_the_disk_lost_bytes_of_are_not_believed(
    mounting: Mounting, folder: Folder
) -> None:
    """A file whose size survived and whose pages did not: zeroes, as ext4 may leave them."""
    files = fill(folder, 40, 16 * MIB)
    mount = mounting.mount(folder.url, "--dram=64M")
    for name, path in files.items():
        assert same(mount, name, path)
    mount.remount()  # So that all of it is on the disk.
    with (mount.directory / "large").open("rb") as file:
        assert file.read(1)
    mount.kill_all()
    stored = [path for path in (mount.cache / "objects").rglob("*") if path.is_file()]
    for path in stored[::4]:
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(bytes(size - size // 2))
    (mount.cache / "objects" / "ab" / "not one of ours").write_text("")
    (mount.cache / "partial" / "ab" / ("ab" * 16)).write_bytes(bytes(300_000))
    crash_machine(mount)
    with_a_mount_that_reads_all_right(mount, files)
    assert mount.requests()["get"] >= len(stored[::4])
    assert not (mount.cache / "partial" / "ab" / ("ab" * 16)).exists()


def with_a_mount_that_reads_all_right(mount: LiveMount, files: dict[str, Path]) -> None:
    mount.mount()
    for name, path in files.items():
        assert same(mount, name, path), name


def test_a_cache_that_is_given_less_room_keeps_what_fits(mounting: Mounting, folder: Folder) -> None:
    files = fill(folder, 300, 24 * MIB)
    mount = mounting.mount(folder.url, size="256M")
    for name, path in files.items():
        assert same(mount, name, path)
    mount.unmount()
    smaller = mounting.prepare(folder.url, size="64M", name="m0")
    smaller.mount()
    with Sampler(smaller, nvme0=64) as sampler:
        until(lambda: sampler.samples > 3, "some samples")
        assert smaller.status()["tiers"][0]["used_bytes"] > 40 * MIB
        for name, path in list(files.items())[::10]:
            assert same(smaller, name, path)
        sampler.check()


def test_two_disks_of_unequal_sizes_are_filled_by_their_free_share(
    mounting: Mounting, folder: Folder, tmp_path: Path
) -> None:
    files = fill(folder, 500, 48 * MIB)
    caches = [f"--cache={tmp_path / 'one'}:64M", f"--cache={tmp_path / 'two'}:160M"]
    mount = mounting.mount(folder.url, *caches)
    with Sampler(mount, nvme0=64, nvme1=160) as sampler:
        for name, path in files.items():
            assert same(mount, name, path)
        sampler.check()
    one, two = mount.status()["tiers"]
    assert one["used_bytes"] > 24 * MIB and two["used_bytes"] > 60 * MIB
    mount.remount()
    for name, path in files.items():
        assert same(mount, name, path)
    assert mount.requests()["get"] < len(files) / 4


def test_evict_gives_the_space_back(mounting: Mounting, folder: Folder) -> None:
    files = fill(folder, 50, 20 * MIB)
    mount = mounting.mount(folder.url, "--dram=64M")
    for name, path in files.items():
        assert same(mount, name, path)
    mount.evict("small", "large")
    assert [tier["used_bytes"] for tier in mount.status()["tiers"]] == [0, 0]
    assert disk_bytes(mount.cache) == disk_bytes(mount.cache / "dram") == 0
    for name, path in files.items():
        assert same(mount, name, path)
