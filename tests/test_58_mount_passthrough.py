"""Cached files that the kernel reads itself: from a mount's outside, under eviction and death too."""

from __future__ import annotations

import mmap
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cache import control
from cache.model import SMALL_OBJECT_BYTES_MAX
from tests.mount_readers import readers
from tests.mounting import MIB, Folder, LiveMount, Mounting, content, is_alive, until

ON = ("--profile=checkpoint",)
STRESS_S = float(os.environ.get("SLUICE_STRESS_S", "4"))


def feature(mount: LiveMount, name: str = "passthrough") -> dict[str, Any]:
    return dict(mount.status()["features"][name])


def passing(mount: LiveMount) -> LiveMount:
    """Return *mount* if it passes files through; skip the test where this machine can't."""
    if not feature(mount)["on"]:
        pytest.skip(str(feature(mount)["reason"]))
    return mount


def cached(mount: LiveMount, name: str, body: bytes) -> None:
    """Have all of *name* in the cache."""
    assert mount.read(name) == body
    until(lambda: entry(mount, name)["cached_bytes"] == len(body), f"{name} is cached")
    until(lambda: mount.status()["lake_io"]["flights"] == 0, "no flight is under way")


def entry(mount: LiveMount, name: str) -> dict[str, Any]:
    return dict(control.call(mount.directory, "ls", paths=[name])["entries"][0])


def reads(mount: LiveMount) -> int:
    return int(mount.reads()["requests"]["reads"])


def passed(mount: LiveMount) -> int:
    return int(mount.reads()["requests"]["opens_passed_through"])


@pytest.mark.parametrize("tier", ["dram", "nvme"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_cached_file_is_read_without_a_request(
    mounting: Mounting, folder: Folder, tier: str, workers: int
) -> None:
    body = content(9 * MIB)
    folder.put("file", body)
    dram = "--dram=64M" if tier == "dram" else "--dram=0"
    mount = passing(mounting.mount(folder.url, *ON, dram, f"--workers={workers}"))
    cached(mount, "file", body)
    before, opens = reads(mount), passed(mount)
    for _ in range(3):
        assert mount.read_anew("file") == body
    with (mount.directory / "file").open("rb") as file:
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == body
        assert os.fstat(file.fileno()).st_size == len(body)
    assert reads(mount) == before
    assert passed(mount) == opens + 4


@pytest.mark.parametrize("options", [("--profile=dataset",), (*ON, "--passthrough=off")], ids=" ".join)
def test_with_the_feature_off_the_same_files_read_the_same(
    mounting: Mounting, folder: Folder, options: tuple[str, ...]
) -> None:
    body = content(9 * MIB)
    folder.put("file", body)
    mount = mounting.mount(folder.url, *options)
    assert feature(mount)["on"] is False and feature(mount)["reason"]
    cached(mount, "file", body)
    before = reads(mount)
    assert mount.read_anew("file") == body
    assert reads(mount) > before
    assert passed(mount) == 0


@pytest.mark.parametrize(
    ("size_bytes", "expected"), [(100_000, "no_open"), (SMALL_OBJECT_BYTES_MAX, "passthrough")]
)
def test_auto_picks_by_what_the_lake_holds(
    mounting: Mounting, folder: Folder, size_bytes: int, expected: str
) -> None:
    bodies = {f"d/{i}": content(size_bytes, seed=i) for i in range(4)}
    for name, body in bodies.items():
        folder.put(name, body)
    mount = mounting.mount(folder.url)
    if expected == "passthrough":
        passing(mount)
        assert feature(mount, "no_open")["on"] is False
    else:
        assert feature(mount, "no_open")["on"] is True
    assert "MiB" in feature(mount, "no_open")["reason"] or not feature(mount)["on"]
    for name, body in bodies.items():
        assert mount.read(name) == body
    assert (mount.reads()["requests"]["opens"] > 0) is (expected == "passthrough")


def test_who_opens_a_file_before_it_is_cached_keeps_all_others_in_its_mode(
    mounting: Mounting, folder: Folder
) -> None:
    body = content(20 * MIB)
    folder.put("file", body)
    mount = passing(mounting.mount(folder.url, *ON))
    with (mount.directory / "file").open("rb", buffering=0) as first:
        assert os.pread(first.fileno(), 100, 0) == body[:100]
        cached(mount, "file", body)
        assert mount.read("file") == body
        assert passed(mount) == 0
    until(
        lambda: mount.read("file") == body and passed(mount) > 0, "once all are closed it is passed through"
    )


def test_a_file_that_is_open_is_not_evicted(mounting: Mounting, folder: Folder) -> None:
    body = content(9 * MIB)
    folder.put("file", body)
    mount = passing(mounting.mount(folder.url, *ON))
    cached(mount, "file", body)
    with (mount.directory / "file").open("rb", buffering=0) as file:
        mount.evict("file")
        assert entry(mount, "file")["cached_bytes"] == len(body)
        assert mount.read("file") == body
        assert file.readall() == body

    def is_evicted() -> bool:  # RELEASE comes after close(2) has returned.
        mount.evict("file")
        return int(entry(mount, "file")["cached_bytes"]) == 0

    until(is_evicted, "once it is closed it can be evicted")
    assert mount.read("file") == body


def test_an_object_that_changed_in_the_lake_shows_its_new_bytes(mounting: Mounting, folder: Folder) -> None:
    """While the old version is open, whose reader goes on with it."""
    folder.put("file", content(9 * MIB, seed=1))
    mount = passing(mounting.mount(folder.url, *ON, "--ttl=0"))
    cached(mount, "file", content(9 * MIB, seed=1))
    with (mount.directory / "file").open("rb", buffering=0) as old:
        folder.put("file", content(9 * MIB, seed=2))
        until(lambda: mount.read("file") == content(9 * MIB, seed=2), "the new version shows")
        assert old.readall() == content(9 * MIB, seed=1)
    cached(mount, "file", content(9 * MIB, seed=2))


def test_backing_files_outlive_the_workers(mounting: Mounting, folder: Folder) -> None:
    body = content(9 * MIB)
    folder.put("file", body)
    mount = passing(mounting.mount(folder.url, *ON))
    cached(mount, "file", body)
    with (mount.directory / "file").open("rb", buffering=0) as file:
        old = mount.pids()["workers"]
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        assert file.readall() == body
        before = reads(mount)
        assert mount.read("file") == body
        assert reads(mount) == before, "the open joined the one that the dead worker had counted"
    until(lambda: not set(old) & set(mount.pids()["workers"]), "the workers are replaced")

    def is_evicted() -> bool:
        mount.evict("file")
        return int(entry(mount, "file")["cached_bytes"]) == 0

    until(is_evicted, "all opens were counted back")


@pytest.mark.parametrize("killing", [False, True])
def test_opening_and_evicting_the_same_few_files_finds_no_error_and_no_wrong_byte(
    mounting: Mounting, folder: Folder, killing: bool
) -> None:
    """Eight readers, tiers that hold about half, an administrator who evicts, and workers that die."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    roll = random.Random(seed)
    sizes = [3 * MIB, 5 * MIB, 8 * MIB, 12 * MIB, 30 * MIB, 50 * MIB, 200_000, 1_900_000]
    names = [f"f{number}" for number in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        folder.put(name, content(size))
    mount = passing(mounting.mount(folder.url, *ON, "--dram=64M", "--workers=2", size="64M"))
    deadline_s = time.monotonic() + STRESS_S
    with readers(mount.directory, folder.path, seed, processes=8, threads=1) as running:
        while time.monotonic() < deadline_s or not passed(mount):
            running.check_alive()
            control.call(mount.directory, "evict", paths=[roll.choice(names)])
            if killing and roll.random() < 0.05:
                kill_a_worker(mount, roll)
        assert running.finish() > 0
    assert "Traceback" not in mount.log()

    def all_gone() -> bool:
        control.call(mount.directory, "evict", paths=names)
        return not any(entry(mount, name)["cached_bytes"] for name in names)

    until(all_gone, "no open is left in the count")


def kill_a_worker(mount: LiveMount, roll: random.Random) -> None:
    pid = roll.choice(mount.pids()["workers"])
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid), f"{pid} is dead")
    until(lambda: pid not in mount.pids()["workers"], "it is replaced")


def test_a_mount_leaves_no_file_of_the_cache_open(mounting: Mounting, folder: Folder) -> None:
    """Backing ids hold files without anybody's descriptor: their space must come back."""
    body = content(9 * MIB)
    folder.put("file", body)
    mount = passing(mounting.mount(folder.url, *ON))
    cached(mount, "file", body)
    for _ in range(50):
        assert mount.read("file") == body
    for pid in mount.pids()["workers"]:
        open_files = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
        assert not [path for path in open_files if "/objects/" in path]
