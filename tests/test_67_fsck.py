"""`sluice fsck`: what it finds in a cache directory, and what a mount makes of one that it mended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounting import Folder, LiveMount, Mounting, content, sluice, until

WRITABLE = ("-o", "rw", "--upload-delay=600", "--dram=0")
BODIES = {f"sample-{number}": content(200_000, seed=number) for number in range(3)}
NEW = {"new-1": b"one", "new-2": b"two"}


@pytest.fixture
def mount(mounting: Mounting, folder: Folder) -> LiveMount:
    """A mount with three cached files, and two that the lake has not got."""
    for name, body in BODIES.items():
        folder.put(name, body)
    mount = mounting.mount(folder.url, *WRITABLE)
    for name in BODIES:
        mount.read(name)
    for name, body in NEW.items():
        (mount.directory / name).write_bytes(body)
    return mount


@pytest.fixture
def cache(mount: LiveMount) -> Path:
    """Its cache directory, after it was unmounted without waiting for the lake."""
    leave(mount)
    return mount.cache


def leave(mount: LiveMount) -> None:
    mount._sluice("umount", "--lazy", str(mount.directory))
    until(lambda: sluice("fsck", mount.cache).returncode != 2, "nobody holds the cache directory")


def check(cache: Path, *options: str) -> tuple[int, dict[str, object], list[str]]:
    """Return (status, report, faults)."""
    done = sluice("fsck", *options, "--json", cache)
    report = json.loads(done.stdout)
    return done.returncode, report, report["faults"]


def files(cache: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(cache.rglob("*")):
        if path.is_file() and path.name not in ("lock", "lock.mdb"):
            yield path, path.read_bytes()


def cached_file(cache: Path, body: bytes) -> Path:
    return next(path for path, found in files(cache / "objects") if found == body)


def shown(mount: LiveMount) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in mount.directory.iterdir()}


def test_a_good_directory_has_no_fault_and_is_as_before(cache: Path) -> None:
    before = list(files(cache))
    done = sluice("fsck", cache)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("checked 2 changes that the lake has not got, 2 staging files, 3 cached")
    assert done.stdout.endswith(": no fault\n")
    assert list(files(cache)) == before


def test_missing_bytes_are_named_and_the_change_is_dropped_when_asked(
    mount: LiveMount, cache: Path, folder: Folder
) -> None:
    lost = next(path for path, body in files(cache / "staging") if body == b"two")
    lost.unlink()
    status, report, faults = check(cache)
    assert (status, report["mended"]) == (1, 0)
    assert faults == [f"new-2: its bytes, {lost}, are missing"]
    mount.mount()
    with pytest.raises(OSError, match="Read-only"):
        (mount.directory / "other").write_bytes(b"")
    leave(mount)
    assert check(cache, "--repair")[:1] == (0,)
    assert check(cache)[0] == 0
    mount.mount()
    assert shown(mount) == BODIES | {"new-1": b"one"}
    (mount.directory / "other").write_bytes(b"other")
    mount._sluice("sync", str(mount.directory))
    assert (folder.path / "new-1").read_bytes() == b"one"
    assert (folder.path / "other").read_bytes() == b"other"
    assert not (folder.path / "new-2").exists()


def test_a_bad_block_is_named_and_fetched_again(mount: LiveMount, cache: Path) -> None:
    path = cached_file(cache, BODIES["sample-1"])
    with path.open("r+b") as file:
        file.seek(70_000)
        file.write(b"flipped")
    before = list(files(cache))
    status, _, faults = check(cache)
    assert status == 1 and faults == [f"{path}: does not match its checksums (sample-1)"]
    assert list(files(cache)) == before
    assert check(cache, "--repair")[0] == 0
    assert not path.exists()
    mount.mount()
    assert shown(mount) == BODIES | NEW
    assert mount.requests()["get"] == 1


@pytest.mark.parametrize("damage", ["cut off", "rubbish"])
def test_a_corrupt_index_is_made_anew_by_the_next_mount(mount: LiveMount, cache: Path, damage: str) -> None:
    path = cache / "index.lmdb" / "data.mdb"
    path.write_bytes(path.read_bytes()[:8192] if damage == "cut off" else b"rubbish" * 9999)
    before = path.read_bytes()
    status, report, faults = check(cache)
    assert status == 1 and len(faults) == 1 and "index.lmdb" in faults[0]
    assert report["changes"] == 2, "the journal has them"
    assert path.read_bytes() == before
    assert check(cache, "--repair")[0] == 0
    mount.mount()
    assert shown(mount) == BODIES | NEW
    assert mount.requests().get("get", 0) == 0


def test_a_corrupt_journal_is_moved_aside_and_the_index_knows_the_changes(
    mount: LiveMount, cache: Path
) -> None:
    path = cache / "journal.lmdb" / "data.mdb"
    path.write_bytes(b"rubbish" * 9999)
    status, _, faults = check(cache)
    assert status == 1 and len(faults) == 1 and "journal" in faults[0]
    assert path.exists()
    assert check(cache, "--repair")[0] == 0
    assert (cache / "journal.lmdb.broken-1" / "data.mdb").exists()
    mount.mount()
    assert shown(mount) == BODIES | NEW
    mount._sluice("sync", str(mount.directory))


def test_without_index_and_journal_the_bytes_are_in_lost_and_found(mount: LiveMount, cache: Path) -> None:
    (cache / "journal.lmdb" / "data.mdb").write_bytes(b"rubbish" * 9999)
    shutil.rmtree(cache / "index.lmdb")
    assert check(cache, "--repair")[0] == 0
    mount.mount()
    assert shown(mount) == BODIES
    leave(mount)
    assert sorted(path.read_bytes() for path in (cache / "lost+found").iterdir()) == [b"one", b"two"]
    status, report, _ = check(cache)
    assert status == 0
    assert len(report["notes"]) == 2 and "kept for you" in str(report["notes"])


def test_a_staging_file_of_no_change_is_noted(cache: Path) -> None:
    (cache / "staging" / "77").write_bytes(b"whose?")
    status, report, _ = check(cache)
    assert status == 0
    assert report["notes"] == [
        "1 staging files belong to no change: the next mount keeps in lost+found what may not be elsewhere"
    ]


def test_a_mounted_cache_is_refused(mount: LiveMount) -> None:
    done = sluice("fsck", mount.cache)
    assert done.returncode == 2
    assert done.stderr.startswith(f"sluice: --cache {mount.cache}: in use by another mount")


def test_what_is_no_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    (other := tmp_path / "second").mkdir()
    shutil.copy(cache / "format", other)
    for directory, text in (
        (tmp_path, "no SluiceFS cache; name the directories that --cache had, in its order"),
        (tmp_path / "missing", "no SluiceFS cache"),
        (other, "has no index; name the directory first that --cache had first"),
    ):
        done = sluice("fsck", directory)
        assert done.returncode == 2
        assert done.stderr.startswith(f"sluice: {directory}: ") and text in done.stderr
        assert done.stderr.count("\n") == 1
    assert sluice("fsck").returncode == 2
