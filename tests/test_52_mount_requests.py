"""How often a mount asks the lake: never for what it knows, once for what many want."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from cache import control
from tests.memory_s3 import MemoryS3
from tests.mounting import MIB, Folder, LiveMount, Mounting, content, is_alive, kill_each, until

FILES = {f"d/{i:03d}": content(3000 + i) for i in range(60)} | {"e/f/g": b"deep", "top": b"top"}


@pytest.fixture
def lake(memory_s3: MemoryS3) -> MemoryS3:
    memory_s3.put_many(FILES)
    return memory_s3


def mount_it(mounting: Mounting, lake: MemoryS3, *options: str) -> LiveMount:
    """Mount, and count from then on."""
    mount = mounting.prepare(lake.url, f"--endpoint-url={lake.endpoint_url}", *options)
    mount.mount()
    lake.reset_counts()
    return mount


def asked(lake: MemoryS3) -> dict[str, int]:
    """Return the requests since the last time, and begin to count anew."""
    counts = dict(lake.requests)
    lake.reset_counts()
    return counts


def stat_all(mount: LiveMount) -> None:
    for name in FILES:
        os.stat(mount.directory / name)


def let_expire(ttl_s: float) -> None:
    """Wait until what was listed before is past its ttl: that is what the claim is about."""
    time.sleep(ttl_s + 0.1)


def test_stat_of_listed_files_asks_the_lake_nothing(mounting: Mounting, lake: MemoryS3) -> None:
    mount = mount_it(mounting, lake)
    for directory in (".", "d", "e", "e/f"):
        os.listdir(mount.directory / directory)
    assert asked(lake) == {"list": 4}
    stat_all(mount)
    subprocess.run(["ls", "-lR", mount.directory], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["find", mount.directory, "-size", "+1k"], check=True, stdout=subprocess.DEVNULL)
    assert asked(lake) == {}


def test_opening_by_path_without_a_listing_lists_each_directory_once(
    mounting: Mounting, lake: MemoryS3
) -> None:
    mount = mount_it(mounting, lake)
    stat_all(mount)
    assert asked(lake) == {"list": 4}


def test_a_name_that_is_not_there_is_asked_for_at_most_once(mounting: Mounting, lake: MemoryS3) -> None:
    mount = mount_it(mounting, lake)
    for _ in range(3):
        for name in ("nothing", "d/nothing", "nothing/below"):
            assert not (mount.directory / name).exists()
    assert asked(lake) == {"list": 2}


def test_a_name_missing_in_a_huge_directory_costs_one_question_within_the_ttl(
    mounting: Mounting, lake: MemoryS3
) -> None:
    lake.put_many({f"huge/{i:05d}": b"" for i in range(4000)})
    mount = mount_it(mounting, lake)
    for _ in range(5):
        assert not (mount.directory / "huge/nothing").exists()
    counts = asked(lake)
    assert counts.get("head", 0) == 2, "an object of the name, or a symlink of it"
    assert counts["list"] <= 4, "the root, the first page of huge/, and what lies below huge/nothing/"


def test_reading_again_asks_the_lake_nothing(mounting: Mounting, lake: MemoryS3) -> None:
    mount = mount_it(mounting, lake)
    for _ in range(2):
        for name, body in FILES.items():
            assert mount.read_anew(name) == body
    assert sum(lake.gets.values()) == len(FILES)
    assert set(lake.gets.values()) <= {0, 1}
    assert asked(lake) == {"list": 4, "get": len(FILES)}


def test_within_the_ttl_a_second_mount_asks_for_no_list_and_no_object(
    mounting: Mounting, lake: MemoryS3
) -> None:
    mount = mount_it(mounting, lake, "--ttl=600", "--dram=64M")
    for name in FILES:
        mount.read(name)
    subprocess.run(["ls", "-lR", mount.directory], check=True, stdout=subprocess.DEVNULL)
    mount.remount()
    checks = asked(lake)  # Of bucket and credentials, at the start.
    assert not checks.get("get", 0) - len(FILES)
    listed = subprocess.run(
        ["find", mount.directory, "-type", "f"], capture_output=True, text=True, check=True
    )
    assert len(listed.stdout.splitlines()) == len(FILES)
    stat_all(mount)
    for name, body in FILES.items():
        assert mount.read(name) == body
    assert asked(lake) == {}
    assert not (mount.directory / "d/nothing").exists()
    assert asked(lake) == {}


def test_past_the_ttl_a_second_mount_lists_again_but_fetches_nothing(
    mounting: Mounting, lake: MemoryS3
) -> None:
    mount = mount_it(mounting, lake, "--ttl=0.5")
    for name in FILES:
        mount.read(name)
    mount.unmount()
    let_expire(0.5)
    mount.mount()
    asked(lake)
    for name, body in FILES.items():
        assert mount.read(name) == body
    counts = asked(lake)
    assert counts.get("list", 0) >= 4
    assert counts.get("get", 0) == 0


def test_past_the_ttl_names_and_sizes_are_asked_for_again(mounting: Mounting, lake: MemoryS3) -> None:
    mount = mount_it(mounting, lake, "--ttl=0.5")
    stat_all(mount)
    let_expire(0.5)
    asked(lake)
    os.listdir(mount.directory / "d")
    assert asked(lake)["list"] >= 1
    assert not (mount.directory / "nothing").exists()
    let_expire(0.5)
    asked(lake)
    assert not (mount.directory / "nothing").exists()
    assert sum(asked(lake).values()) >= 1


def test_an_immutable_mount_never_asks_again(mounting: Mounting, lake: MemoryS3) -> None:
    mount = mount_it(mounting, lake, "--ttl=0.1", "--immutable")
    for name in FILES:
        mount.read(name)
    for _ in range(2):
        let_expire(0.1)
        asked(lake)
        stat_all(mount)
        for name, body in FILES.items():
            assert mount.read_anew(name) == body
        for directory in (".", "d", "e", "e/f"):
            os.listdir(mount.directory / directory)
        assert asked(lake) == {}
        mount.remount()


def at_once(calls: Sequence[Callable[[], bytes]]) -> list[bytes]:
    """Return what the calls return, each made in a thread of its own, all at the same time."""
    barrier, results = threading.Barrier(len(calls)), [b""] * len(calls)

    def run(number: int, call: Callable[[], bytes]) -> None:
        barrier.wait()
        results[number] = call()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_small_object_is_fetched_once_however_many_read_it(mounting: Mounting, lake: MemoryS3) -> None:
    lake.put_many({f"s/{i}": content(700_000, seed=i) for i in range(3)})
    mount = mount_it(mounting, lake, "--workers=3")
    lake.latency_s = 0.1  # So that the readers overlap.
    for i in range(3):
        body = content(700_000, seed=i)
        pieces = at_once([partial(mount.read, f"s/{i}")] * 12)
        assert pieces == [body] * 12
        assert lake.gets[f"s/{i}"] == 1


def test_a_part_of_a_large_object_is_fetched_once_however_many_read_it(
    mounting: Mounting, lake: MemoryS3
) -> None:
    body = content(20 * MIB, seed=9)
    lake.put("large", body)
    mount = mount_it(mounting, lake, "--workers=3")
    lake.latency_s = 0.1
    with (mount.directory / "large").open("rb", buffering=0) as file:
        places = [9 * MIB + 5, 9 * MIB + 100, 9 * MIB + 60_000] * 4
        reads = [partial(os.pread, file.fileno(), 20_000, place) for place in places]
        assert at_once(reads) == [body[place : place + 20_000] for place in places]
    until(lambda: mount.status()["lake_io"]["flights"] == 0, "no flight is under way")
    assert mount.status()["lake_io"]["bytes_fetched"] < 12 * MIB
    assert mount.read("large") == body
    until(lambda: mount.status()["lake_io"]["flights"] == 0, "no flight is under way")
    assert mount.status()["lake_io"]["bytes_fetched"] == len(body), "no byte was fetched twice"


def test_a_reader_that_goes_away_leaves_the_fetch_to_the_others(mounting: Mounting, lake: MemoryS3) -> None:
    body = content(900_000, seed=4)
    lake.put("object", body)
    mount = mount_it(mounting, lake)
    os.stat(mount.directory / "object")
    lake.latency_s = 1.0
    quitter = subprocess.Popen(["cat", mount.directory / "object"], stdout=subprocess.DEVNULL)
    until(lambda: lake.gets["object"] == 1, "the fetch is under way")
    quitter.kill()
    assert mount.read("object") == body
    quitter.wait(10)
    assert lake.gets["object"] == 1


def test_an_unchanged_file_stays_in_the_page_cache_over_closing_and_opening(
    mounting: Mounting, lake: MemoryS3
) -> None:
    for profile in ("dataset", "checkpoint"):
        mount = mounting.mount(
            lake.url, f"--endpoint-url={lake.endpoint_url}", "--ttl=0.3", f"--profile={profile}"
        )
        for name in FILES:
            mount.read(name)

        def read_expired() -> None:
            let_expire(0.3)
            for name, body in FILES.items():
                assert mount.read(name) == body  # noqa: B023

        assert mount.asks_nothing(read_expired), profile
        mount.unmount()


def test_a_walk_of_many_directories_lists_each_once(mounting: Mounting, lake: MemoryS3) -> None:
    lake.put_many({f"w/{i:03d}/{j}": b"x" for i in range(100) for j in range(2)})
    mount = mount_it(mounting, lake)
    found = subprocess.run(["find", mount.directory / "w"], capture_output=True, text=True, check=True)
    assert len(found.stdout.splitlines()) == 301
    assert asked(lake)["list"] == 102


def test_while_a_directory_is_in_use_it_is_listed_again_before_it_expires(
    mounting: Mounting, lake: MemoryS3
) -> None:
    mount = mount_it(mounting, lake, "--ttl=4")
    os.listdir(mount.directory / "d")
    lake.put("d/new", b"new")

    def look() -> bool:
        return "new" in os.listdir(mount.directory / "d")

    until(look, "the new name shows", within_s=10)


def test_mount_and_umount_alone_fetch_nothing(mounting: Mounting, folder: Folder) -> None:
    folder.put("file", b"1")
    mount = mounting.mount(folder.url)
    assert mount.requests()["get"] == mount.requests()["list"] == 0


def test_the_death_of_the_mover_loses_no_request_and_asks_for_nothing_twice(
    mounting: Mounting, lake: MemoryS3
) -> None:
    body = content(500_000, seed=6)
    lake.put("object", body)
    mount = mount_it(mounting, lake)
    os.stat(mount.directory / "object")
    lake.latency_s = 2.0  # Time to kill the mover before the answer is there.
    reader = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())",
         str(Path(mount.directory / "object"))],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        until(lambda: lake.gets["object"] == 1, "the fetch is under way")
        mover = mount.pids()["mover"]
        kill_each(mover)
        lake.latency_s = 0.0
        out, _ = reader.communicate(timeout=30)
    finally:
        reader.kill()
        reader.wait()
    assert out == body
    assert lake.gets["object"] == 2
    assert not any(map(is_alive, mover))


@pytest.mark.parametrize("profile", ["auto", "checkpoint"])
def test_a_hit_is_told_to_the_eviction_policy_whether_opens_are_seen_or_not(
    mounting: Mounting, folder: Folder, profile: str
) -> None:
    folder.put("file", content(300_000))
    mount = mounting.mount(folder.url, f"--profile={profile}")

    def hits() -> int:
        found = control.call(mount.directory, "ls", paths=["file"])
        return int(found["entries"][0]["hits"])

    assert mount.read("file") == content(300_000)
    assert mount.read_anew("file") == content(300_000)
    until(lambda: hits() > 0, "the hit is counted")
