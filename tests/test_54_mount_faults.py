"""What fails below a mount stays below it: a lake that is away or lies, a cache that rots or is full."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cache import control
from tests.disks import fill_up, small_disk
from tests.memory_s3 import MemoryS3
from tests.mount_readers import readers
from tests.mounting import MIB, Folder, LiveMount, Mounting, Prefix, content, is_alive, sluice, until
from tests.test_55_mount_budgets import stopped
from tools.servers import Faults, SeaweedServer, SlowProxy

IMPATIENT = ("--retry=1", "--read-timeout=0.5", "--connect-timeout=0.5")


def errno_of_reading(path: Path) -> int:
    """Return the errno that reading the file fails with; 0 if it does not."""
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno or 0
    return 0


# --- The lake ----------------------------------------------------------------------------------

Outage = Callable[[], object]


@contextmanager
def lake_away(how: str, proxy: SlowProxy, server: SeaweedServer) -> Iterator[None]:
    if how == "killed":
        server.kill()
    else:
        proxy.faults = {
            "hangs": Faults(hang_share=1, hang_s=5),
            "resets": Faults(reset_share=1),
            "503": Faults(slow_down_share=1),
        }[how]
    try:
        yield
    finally:
        proxy.faults = Faults()
        if how == "killed":
            server.restart()


@pytest.mark.parametrize("how", ["killed", "hangs", "503"])
def test_while_the_lake_is_away_cached_files_are_read_and_others_fail_until_it_returns(
    mounting: Mounting, prefix: Prefix, proxy: SlowProxy, s3_server: SeaweedServer, how: str
) -> None:
    files = {f"d/{i}": content(50_000 + i) for i in range(8)} | {"large": content(12 * MIB)}
    for name, body in files.items():
        prefix.put(name, body)
    cached = ["d/0", "d/1", "d/2", "d/3"]
    mount = mounting.mount(prefix.url, f"--endpoint-url={proxy.endpoint_url}", "--ttl=600", *IMPATIENT)
    os.listdir(mount.directory / "d")
    for name in cached:
        mount.read(name)
    with lake_away(how, proxy, s3_server):
        for name in ("d/7", "large"):
            assert errno_of_reading(mount.directory / name) == errno.EIO
        for name in cached:
            assert mount.read_anew(name) == files[name]
        status = mount.status()
        assert status["lake_io"]["failing_for_s"] is not None
        assert "lake: get of" in mount.log()
    for name, body in files.items():
        until(lambda name=name: errno_of_reading(mount.directory / name) == 0, "the lake is back")  # type: ignore[misc]
        assert mount.read(name) == body
    assert "Traceback" not in mount.log()


def test_past_the_ttl_too_cached_files_are_read_while_the_lake_is_away(
    mounting: Mounting, prefix: Prefix, proxy: SlowProxy, s3_server: SeaweedServer
) -> None:
    body = content(90_000)
    prefix.put("d/file", body)
    prefix.put("d/other", content(90_000, seed=1))
    mount = mounting.mount(prefix.url, f"--endpoint-url={proxy.endpoint_url}", "--ttl=0.3", *IMPATIENT)
    assert mount.read("d/file") == body
    with lake_away("resets", proxy, s3_server):
        until(lambda: expired(mount), "the kernel asks again")
        for _ in range(3):
            assert mount.read_anew("d/file") == body
        assert sorted(os.listdir(mount.directory / "d")) == ["file", "other"]
        assert errno_of_reading(mount.directory / "d/other") == errno.EIO
    prefix.put("d/file", b"new")
    until(lambda: mount.read("d/file") == b"new", "what is new shows once the lake is back")


def expired(mount: LiveMount) -> bool:
    """Look at a file by its path; return whether the mount has met the lake's failure by now."""
    try:
        os.stat(mount.directory / "d/file")
    except OSError as error:
        pytest.fail(f"a file that is in the cache: {error}")
    return mount.status()["lake_io"]["failing_for_s"] is not None


def test_a_lake_that_fails_a_third_of_the_time_gives_only_right_bytes(
    mounting: Mounting, prefix: Prefix, proxy: SlowProxy
) -> None:
    files = {f"d/{i:02d}": content(30_000 + i) for i in range(30)} | {"large": content(20 * MIB, seed=3)}
    for name, body in files.items():
        prefix.put(name, body)
    mount = mounting.mount(prefix.url, f"--endpoint-url={proxy.endpoint_url}", "--retry=90")
    proxy.faults = Faults(slow_down_share=0.05, error_share=0.1, reset_share=0.1, truncate_share=0.1)
    wrong: list[str] = []

    def read_each(names: list[str]) -> None:
        wrong.extend(name for name in names if mount.read(name) != files[name])

    threads = [threading.Thread(target=read_each, args=(sorted(files)[start::8],)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(proxy.faults_dealt.values()) > 5
    assert mount.status()["reads"]["errors"] == 0


def test_a_lost_permission_is_eacces_for_what_is_not_cached(mounting: Mounting, memory_s3: MemoryS3) -> None:
    memory_s3.put_many(
        {"d/cached": b"cached", "d/other": b"other", "e/file": b"e", "large": content(9 * MIB)}
    )
    mount = mounting.mount(memory_s3.url, *memory_s3.options, "--ttl=600", *IMPATIENT)
    assert mount.read("d/cached") == b"cached"
    assert (mount.directory / "large").stat().st_size == 9 * MIB
    memory_s3.denied = frozenset({"get", "head", "list"})
    assert errno_of_reading(mount.directory / "d/other") == errno.EACCES
    assert errno_of_reading(mount.directory / "large") == errno.EACCES
    with pytest.raises(PermissionError):
        os.listdir(mount.directory / "e")
    assert mount.read_anew("d/cached") == b"cached"
    memory_s3.denied = frozenset()
    assert mount.read("d/other") == b"other"
    assert mount.read("e/file") == b"e"
    assert mount.read("large") == content(9 * MIB)


# --- The tiers' files --------------------------------------------------------------------------


def tier_files(mount: LiveMount, tier: str) -> list[Path]:
    root = mount.cache / "dram" if tier == "dram" else mount.cache
    return [path for folder in ("objects", "partial") for path in (root / folder).glob("*/*")]


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        place = 70_000
        os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, place)[0] ^ 1]), place)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte flipped": flip,
    "truncated": lambda path: os.truncate(path, 5000),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "another file": lambda path: path.write_bytes(content(path.stat().st_size, seed=99)),
}


def all_cached(mount: LiveMount, files: dict[str, bytes]) -> bool:
    """Read all; return whether that asked the lake for nothing."""
    until(lambda: mount.status()["lake_io"]["flights"] == 0, "no flight is under way")
    gets = mount.requests()["get"]
    for name, body in files.items():
        assert mount.read_anew(name) == body, name
    return mount.requests()["get"] == gets


@pytest.mark.parametrize("tier", ["dram", "nvme"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_in_a_tier_never_reaches_a_reader_and_is_replaced(
    mounting: Mounting, folder: Folder, tier: str, damage: str
) -> None:
    files = {"small": content(300_000), "whole": content(9 * MIB), "sparse": content(30 * MIB)}
    for name, body in files.items():
        folder.put(name, body)
    # With passthrough, no read of "whole" would come by: only its size is checked, by the next test.
    dram = "--dram=64M" if tier == "dram" else "--dram=0"
    mount = mounting.mount(folder.url, dram, "--ttl=600", "--passthrough=off")
    assert mount.read("small") == files["small"]
    assert mount.read("whole") == files["whole"]
    with (mount.directory / "sparse").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(file.fileno(), 200_000, 0) == files["sparse"][:200_000]
    until(lambda: mount.status()["lake_io"]["flights"] == 0, "no flight is under way")
    damaged = tier_files(mount, tier)
    assert len(damaged) == 3
    for path in damaged:
        DAMAGE[damage](path)
    for name, body in files.items():
        assert mount.read_anew(name) == body, name
    if damage != "deleted":
        assert mount.reads()["corrupt_blocks"] >= 3
        assert mount.log().count("does not match its checksum") >= 3
    until(lambda: all_cached(mount, files), "what was damaged is whole in the cache again", 5)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted"])
def test_a_file_of_another_size_is_not_passed_through_but_replaced(
    mounting: Mounting, folder: Folder, damage: str
) -> None:
    folder.put("whole", content(9 * MIB))
    mount = mounting.mount(folder.url, "--profile=checkpoint", "--ttl=600")
    assert mount.read("whole") == content(9 * MIB)
    until(lambda: mount.status()["lake_io"]["flights"] == 0, "no flight is under way")
    (damaged,) = tier_files(mount, "nvme")
    DAMAGE[damage](damaged)
    assert mount.read_anew("whole") == content(9 * MIB)
    until(lambda: all_cached(mount, {"whole": content(9 * MIB)}), "it is whole in the cache again", 5)


def test_damage_that_happened_while_nothing_was_mounted_is_found_too(
    mounting: Mounting, folder: Folder
) -> None:
    files = {f"{i}": content(200_000 + i) for i in range(5)}
    for name, body in files.items():
        folder.put(name, body)
    mount = mounting.mount(folder.url, "--ttl=600")
    for name in files:
        mount.read(name)
    mount.unmount()
    for path, damage in zip(tier_files(mount, "nvme"), DAMAGE.values(), strict=True):
        damage(path)
    mount.mount()
    for name, body in files.items():
        assert mount.read(name) == body


@pytest.mark.parametrize("how", ["emptied", "garbage", "removed"])
def test_a_damaged_index_is_rebuilt_or_named(mounting: Mounting, folder: Folder, how: str) -> None:
    folder.put("file", content(100_000))
    mount = mounting.mount(folder.url)
    assert mount.read("file") == content(100_000)
    mount.unmount()
    data = mount.cache / "index.lmdb/data.mdb"
    if how == "removed":
        data.unlink()
    else:
        data.write_bytes(b"" if how == "emptied" else content(data.stat().st_size))
    done = sluice("mount", folder.url, mount.directory, f"--cache={mount.cache}:64M", "--keep-free=0")
    if done.returncode == 0:
        assert mount.read("file") == content(100_000)
    else:
        assert len(done.stderr.splitlines()) == 1
        assert str(mount.cache) in done.stderr


# --- The cache's disk --------------------------------------------------------------------------


def test_on_a_full_disk_reads_pass_by_the_cache_and_use_it_again_when_there_is_room(
    mounting: Mounting, folder: Folder, tmp_path: Path
) -> None:
    files = {f"d/{i:02d}": content(500_000 + i) for i in range(40)} | {"large": content(20 * MIB)}
    for name, body in files.items():
        folder.put(name, body)
    with small_disk(tmp_path, 110 * MIB) as disk:
        mount = mounting.mount(folder.url, f"--cache={disk / 'cache'}:64M", "--keep-free=1M")
        try:
            assert mount.read("d/00") == files["d/00"]
            balloon = fill_up(disk)
            pids = mount.pids()
            with readers(mount.directory, folder.path, seed=54) as running:
                for name, body in files.items():
                    assert mount.read(name) == body, name
                running.finish()
            assert mount.pids() == pids, "nothing died"
            balloon.unlink()
            until(lambda: all_cached(mount, {"d/07": files["d/07"]}), "the cache takes files again")
        finally:
            mount.end()
            print((disk / "cache/log").read_text()[-5000:])


def test_the_free_space_guard_keeps_its_space_free(
    mounting: Mounting, folder: Folder, tmp_path: Path
) -> None:
    for i in range(70):
        folder.put(f"d/{i:02d}", content(MIB, seed=i))
    with small_disk(tmp_path, 110 * MIB) as disk:
        mount = mounting.mount(folder.url, f"--cache={disk / 'cache'}:90M", "--keep-free=60M")
        try:
            for i in range(70):
                assert mount.read(f"d/{i:02d}") == content(MIB, seed=i)
                status = os.statvfs(disk)
                assert status.f_bavail * status.f_frsize >= 55 * MIB, i
            assert mount.status()["tiers"][0]["objects"] > 10
        finally:
            mount.end()


NONSENSE = (
    b"",
    b"\n",
    b"{}\n",
    b"[]\n",
    b"null\n",
    b"\xff\xfe\n",
    b'{"verb": "evict"}\n',
    b'{"verb": 3}\n',
    b'{"verb": "ls", "paths": 7}\n',
    b'{"verb": "ls", "paths": [3]}\n',
    b'{"verb": "ls", "paths": [""], "limit": -5}\n',
    b'{"verb": "ls", "paths": ["a\\u0000b", "\\ud800", "x/../../y"]}\n',
    b'{"verb": "hidden", "limit": {}}\n',
    b'{"verb": "hidden", "limit": -1}\n',
    b'{"verb": "evict", "paths": ["", "/", "nothing/below"]}\n',
)


def test_nonsense_on_the_control_socket_ends_no_process(mounting: Mounting, folder: Folder) -> None:
    folder.put("file", b"1")
    mount = mounting.mount(folder.url)
    pids = mount.pids()
    for nonsense in NONSENSE:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(control.socket_path(mount.directory)))
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            reply = connection.recv(1 << 20)
            assert not reply or json.loads(reply).keys() <= {"error", "result", "progress"}
    assert mount.pids() == pids and all(is_alive(pid) for role in pids.values() for pid in role)
    assert mount.read_anew("file") == b"1"
    assert "Traceback" not in mount.log()


def test_readers_who_wait_for_the_lake_are_in_nobody_elses_way(mounting: Mounting, folder: Folder) -> None:
    """However many they are, one worker answers for what is cached."""
    for number in range(151):
        folder.put(f"f{number}", b"%d" % number)
    mount = mounting.mount(folder.url, "--read-only", "--workers=1", "--read-ahead=none")
    assert mount.read_anew("f150") == b"150"
    (mover,) = mount.pids()["mover"]
    with ThreadPoolExecutor(150) as threads:
        with stopped(mover):
            waiting = [threads.submit((mount.directory / f"f{number}").read_bytes) for number in range(150)]
            time.sleep(1)
            assert not any(reader.done() for reader in waiting)
            with ThreadPoolExecutor(1) as other:
                assert other.submit(mount.read_anew, "f150").result(20) == b"150"
        assert [int(reader.result()) for reader in waiting] == list(range(150))
