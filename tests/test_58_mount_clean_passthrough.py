"""Cached files that the kernel reads itself on writable mounts: a writer writes to the file that is read."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from cache.errors import SluiceError
from tests.mounting import MIB, Folder, LiveMount, Mounting, content, kill_each, until

OPTIONS = ("--no-read-only", "--upload-delay=0.2", "--upload-open-delay=0.3")
STRESS_S = float(os.environ.get("SLUICE_STRESS_S", "4"))
BODY = content(5 * MIB + 7, seed=3)
PAGE = 4096


@pytest.fixture
def mount(mounting: Mounting, folder: Folder) -> LiveMount:
    folder.put("old", BODY)
    for i in range(3):
        folder.put(f"f{i}", content(3 * MIB, seed=i))
    mount = mounting.mount(folder.url, *OPTIONS)
    feature = mount.status()["features"]["passthrough"]
    if not feature["on"]:
        pytest.skip(str(feature["reason"]))
    cached(mount, "old")
    return mount


def cached(mount: LiveMount, name: str) -> None:
    """Read the file until an open of it is passed through."""
    before = passed(mount)
    path = mount.directory / name
    until(lambda: path.read_bytes() and passed(mount) > before, f"{name} is whole in the cache")


def passed(mount: LiveMount) -> int:
    return int(mount.reads()["requests"]["opens_passed_through"])


def objects(mount: LiveMount) -> set[int]:
    """Return the numbers of the files in the tier."""
    return {path.stat().st_ino for path in (mount.cache / "objects").rglob("*") if path.is_file()}


def staged(mount: LiveMount) -> set[int]:
    return {path.stat().st_ino for path in (mount.cache / "staging").iterdir()}


def reaches_the_lake(mount: LiveMount, folder: Folder, name: str, body: bytes) -> None:
    path = folder.path / name
    until(lambda: path.exists() and path.read_bytes() == body, f"the lake has {name} as it was written last")
    until(lambda: mount.status()["dirty_bytes"] == 0 and not staged(mount), "all of it is clean")


def test_a_cached_file_is_read_without_a_request(mount: LiveMount) -> None:
    reads = mount.reads()["requests"]["reads"]
    for _ in range(3):
        assert mount.read_anew("old") == BODY
    assert mount.reads()["requests"]["reads"] == reads


def test_with_a_tier_in_memory_so_is_what_is_fetched_then(mounting: Mounting, folder: Folder) -> None:
    folder.put("large", BODY)
    folder.put("small", content(MIB, seed=9))
    mount = mounting.mount(folder.url, *OPTIONS, "--dram=64M")
    feature = mount.status()["features"]["passthrough"]
    if not feature["on"]:
        pytest.skip(str(feature["reason"]))
    if not mount.status()["features"]["dram_tier"]["on"]:
        pytest.skip("a tier in memory needs root")
    cached(mount, "large")
    assert (mount.directory / "small").read_bytes() == content(MIB, seed=9)
    with (mount.directory / "large").open("rb") as reader, (mount.directory / "large").open("r+b") as writer:
        writer.write(b"new")
        writer.flush()
        assert reader.read(4) == b"new" + BODY[3:4]
    where = {tier["name"]: tier["used_bytes"] for tier in mount.status()["tiers"]}
    assert MIB <= where["dram"] < 2 * MIB, "the small file alone"
    reaches_the_lake(mount, folder, "large", b"new" + BODY[3:])


def test_what_is_written_goes_through_python(mount: LiveMount, folder: Folder) -> None:
    before = mount.reads()["requests"]
    (mount.directory / "new").write_bytes(BODY)
    after = mount.reads()["requests"]
    assert after["opens_passed_through"] == before["opens_passed_through"]
    assert after["requests"] - before["requests"] > 4, "its writes among them: --dirty-max holds them up"
    reaches_the_lake(mount, folder, "new", BODY)


def write_at_the_start(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"newer")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewrite(path: Path) -> None:
    path.write_bytes(b"short")


def cut(path: Path) -> None:
    os.truncate(path, 3 * MIB)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (write_at_the_start, b"newer" + BODY[5:]),
        (append, BODY + b"more"),
        (rewrite, b"short"),
        (cut, BODY[: 3 * MIB]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_writer_changes_the_file_that_is_being_read(
    mount: LiveMount, folder: Folder, change: Callable[[Path], None], expected: bytes
) -> None:
    path, before = mount.directory / "old", objects(mount)
    used_bytes = mount.status()["tiers"][0]["used_bytes"]
    inode = path.stat().st_ino
    with path.open("rb", buffering=0) as reader:
        assert reader.read(100) == BODY[:100]
        change(path)
        assert os.pread(reader.fileno(), len(BODY) + 100, 0) == path.read_bytes() == expected
        assert staged(mount) == before and objects(mount) == set(), "it is the same file, and not copied"
        assert mount.status()["tiers"][0]["used_bytes"] < used_bytes
    reaches_the_lake(mount, folder, "old", expected)
    assert path.read_bytes() == expected and path.stat().st_ino == inode
    assert objects(mount) == before, "it is the cached file again"
    assert mount.reads()["corrupt_blocks"] == 0
    mount.remount()
    assert path.read_bytes() == expected


def test_who_opens_to_write_and_does_not_changes_nothing(mount: LiveMount, folder: Folder) -> None:
    path = mount.directory / "old"
    mtime_ns = path.stat().st_mtime_ns
    with path.open("rb") as reader:
        os.close(os.open(path, os.O_RDWR))
        assert reader.read() == BODY
        assert path.stat().st_mtime_ns == mtime_ns
    reaches_the_lake(mount, folder, "old", BODY)
    assert path.stat().st_mtime_ns == mtime_ns


def test_the_mode_is_that_which_was_set_last(mount: LiveMount, folder: Folder) -> None:
    """Not the one that the cached file has kept from the time when it was written."""
    path = mount.directory / "new"
    with path.open("wb") as file:
        file.write(BODY)
        os.fchmod(file.fileno(), 0o755)
    reaches_the_lake(mount, folder, "new", BODY)
    path.chmod(0o640)
    cached(mount, "new")
    with path.open("rb") as reader:
        append(path)
        assert reader.read() == BODY + b"more"
        assert path.stat().st_mode & 0o7777 == 0o640
    reaches_the_lake(mount, folder, "new", BODY + b"more")
    assert path.stat().st_mode & 0o7777 == 0o640


def test_without_a_reader_what_is_written_to_is_a_copy(mount: LiveMount, folder: Folder) -> None:
    before = objects(mount)
    write_at_the_start(mount.directory / "old")
    assert not staged(mount) & before
    reaches_the_lake(mount, folder, "old", b"newer" + BODY[5:])


def test_a_file_whose_cached_copy_is_gone_is_not_written_to_beside_its_readers(
    mount: LiveMount, folder: Folder
) -> None:
    """Somebody emptied the cache directory: readers go on, and no write is lost without a word."""
    path = mount.directory / "old"
    with path.open("rb", buffering=0) as reader:
        for file in (mount.cache / "objects").rglob("*"):
            if file.is_file():
                file.unlink()
        with pytest.raises(OSError):
            os.open(path, os.O_RDWR)
        assert reader.read() == BODY
    until(lambda: can_write(path), "once it is closed it can be written to")
    reaches_the_lake(mount, folder, "old", b"newer" + BODY[5:])


def can_write(path: Path) -> bool:
    try:
        write_at_the_start(path)
        return True
    except OSError:
        return False


def keep_a_page(directory: Path, number: int, until_s: float) -> None:
    """Write this process's page of each of the files over and over; fail where it is not what was written."""
    roll, names = random.Random(number), [directory / f"f{i}" for i in range(3)]
    while time.monotonic() < until_s:
        path = roll.choice(names)
        held = os.open(path, os.O_RDONLY) if roll.random() < 0.5 else -1
        if held >= 0:
            os.pread(held, 100, 0)
        page = roll.randbytes(8) * (PAGE // 8)
        fd = os.open(path, roll.choice([os.O_RDWR, os.O_WRONLY]))
        assert os.pwrite(fd, page, number * PAGE) == PAGE
        os.close(fd)
        for again in [fd for fd in (held, os.open(path, os.O_RDONLY)) if fd >= 0]:
            assert os.pread(again, PAGE, number * PAGE) == page, (path, number)
            os.close(again)


@pytest.mark.parametrize("role", ["", "mover", "workers"])
def test_writing_in_place_evicting_and_reading_the_same_few_files_loses_no_byte(
    mount: LiveMount, folder: Folder, role: str
) -> None:
    """From six processes, while the uploader makes clean what is closed, and processes are killed."""
    until_s = time.monotonic() + STRESS_S + 2
    players = [
        get_context("spawn").Process(target=keep_a_page, args=(mount.directory, number, until_s))
        for number in range(6)
    ]
    killer = threading.Thread(target=kill_again_and_again, args=(mount, role, until_s))
    for each in (*players, killer):
        each.start()
    while any(player.is_alive() for player in players):
        evict(mount)
    for each in (*players, killer):
        each.join()
    assert [player.exitcode for player in players] == [0] * 6
    final = {f"f{i}": (mount.directory / f"f{i}").read_bytes() for i in range(3)}
    for name, body in final.items():
        until(lambda name=name, body=body: folder.path.joinpath(name).read_bytes() == body, name, 60)  # type: ignore[misc]
    assert "Traceback" not in mount.log()
    assert mount.reads()["corrupt_blocks"] == 0


def evict(mount: LiveMount) -> None:
    try:
        mount.evict("f0", "f1", "f2")
    except Exception:  # Between two movers nobody answers.
        time.sleep(0.01)


def kill_again_and_again(mount: LiveMount, role: str, until_s: float) -> None:
    while role and time.monotonic() < until_s - 1:
        try:
            pids = mount.pids()[role]
        except SluiceError:
            continue
        kill_each([random.choice(pids)])
        time.sleep(0.7)
