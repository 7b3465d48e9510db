"""The kernel writes staging files itself: what programs see, with passthrough and without."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.disks import fill_up, small_disk
from tests.mounting import MIB, Folder, LiveMount, Mounting, content, until

WRITABLE = ("-o", "rw", "--upload-delay=0.3", "--upload-open-delay=0.5")
STRESS_S = float(os.environ.get("SLUICE_STRESS_S", "4"))
BODY = content(5 * MIB + 7, seed=3)


@pytest.fixture(params=["all", "off"])
def mount(request: pytest.FixtureRequest, mounting: Mounting, folder: Folder) -> LiveMount:
    folder.put("old", BODY)
    mount = mounting.mount(folder.url, *WRITABLE, "--workers=2", f"--passthrough={request.param}")
    feature = mount.status()["features"]["passthrough"]
    if request.param == "all" and not feature["on"]:
        pytest.skip(str(feature["reason"]))
    assert feature["on"] is (request.param == "all")
    return mount


def is_on(mount: LiveMount) -> bool:
    return bool(mount.status()["features"]["passthrough"]["on"])


def reaches_the_lake(folder: Folder, name: str, body: bytes) -> None:
    path = folder.path / name
    until(lambda: path.exists() and path.read_bytes() == body, f"the lake has {name} as it was written last")


def is_clean(mount: LiveMount) -> bool:
    return int(mount.status()["dirty_bytes"]) == 0 and not list((mount.cache / "staging").iterdir())


def test_a_checkpoint_is_written_and_read_back_without_a_request(mount: LiveMount, folder: Folder) -> None:
    before = mount.reads()["requests"]
    with (mount.directory / "new").open("wb", buffering=0) as file:
        for start in range(0, len(BODY), 100_000):
            file.write(BODY[start : start + 100_000])
        os.fsync(file.fileno())
        assert os.fstat(file.fileno()).st_size == len(BODY)
        assert (mount.directory / "new").read_bytes() == BODY
    after = mount.reads()["requests"]
    assert (after["requests"] - before["requests"] < 15) is is_on(mount)
    assert (after["opens_passed_through"] == 2) is is_on(mount)
    reaches_the_lake(folder, "new", BODY)


def test_a_file_stays_staged_while_the_kernel_reads_it_and_is_clean_afterwards(
    mount: LiveMount, folder: Folder
) -> None:
    path = mount.directory / "new"
    path.write_bytes(BODY)
    with path.open("rb", buffering=0) as reader:
        reaches_the_lake(folder, "new", BODY)
        with path.open("ab", buffering=0) as writer:  # It gets the same backing file.
            writer.write(b"more")
        assert reader.readall() == BODY + b"more"
    reaches_the_lake(folder, "new", BODY + b"more")
    until(lambda: is_clean(mount), "it is clean")
    assert path.read_bytes() == BODY + b"more"


def test_what_is_written_through_a_mapping_of_a_closed_file_is_not_lost(
    mount: LiveMount, folder: Folder
) -> None:
    path = mount.directory / "new"
    with path.open("wb", buffering=0) as writer:
        writer.write(BODY)
        fd = os.open(path, os.O_RDWR)  # Joins the writer's mode.
        mapped = mmap.mmap(fd, len(BODY))  # Python keeps a descriptor of its own.
        os.close(fd)
        link = subprocess.Popen([sys.executable, "-c", MAPPER, path], stdin=-1, stdout=-1)
        assert link.stdin is not None and link.stdout is not None
        assert link.stdout.readline() == b"mapped\n"
        mapped.close()
    reaches_the_lake(folder, "new", BODY)
    assert link.communicate(b"go\n")[0] == b"written\n" and link.returncode == 0
    reaches_the_lake(folder, "new", b"mapped" + BODY[6:])
    assert path.read_bytes() == b"mapped" + BODY[6:]


# mmap(2) without Python's own descriptor of the file.
MAPPER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
number = ctypes.c_int
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, number, number, number, ctypes.c_long]
fd = os.open(sys.argv[1], os.O_RDWR)
start = libc.mmap(None, 4096, 3, 1, fd, 0)
assert start not in (None, 2**64 - 1)
os.close(fd)
print("mapped", flush=True)
sys.stdin.readline()
ctypes.memmove(start, b"mapped", 6)
print("written", flush=True)
"""


def test_pages_of_an_earlier_open_are_not_shown_after_the_kernel_wrote_past_them(mount: LiveMount) -> None:
    path = mount.directory / "new"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)  # Cached mode.
    os.write(fd, BODY)
    assert os.pread(fd, len(BODY), 0) == BODY
    os.close(fd)

    def rewritten() -> bool:  # RELEASE comes after close(2) has returned; until then the mode stays.
        opens = mount.reads()["requests"]["opens_passed_through"]
        fd = os.open(path, os.O_WRONLY)
        os.pwrite(fd, b"X" * 10_000, 5000)
        os.close(fd)
        return not is_on(mount) or mount.reads()["requests"]["opens_passed_through"] > opens

    until(rewritten, "it is written in passthrough")
    expected = BODY[:5000] + b"X" * 10_000 + BODY[15_000:]
    for flags in (os.O_RDWR, os.O_RDONLY, os.O_RDWR):
        fd = os.open(path, flags)
        assert os.pread(fd, len(BODY), 0) == expected
        os.close(fd)


def test_appends_of_several_processes_are_all_there(mount: LiveMount, folder: Folder) -> None:
    path = mount.directory / "log"
    script = "import os, sys\nfd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n"
    script += "for i in range(500): os.write(fd, b'%s %d\\n' % (sys.argv[2].encode(), i))"
    running = [subprocess.Popen([sys.executable, "-c", script, path, str(number)]) for number in range(4)]
    assert [process.wait() for process in running] == [0, 0, 0, 0]
    lines = path.read_bytes().splitlines()
    assert sorted(lines) == sorted(b"%d %d" % (number, i) for number in range(4) for i in range(500))
    reaches_the_lake(folder, "log", path.read_bytes())


def test_truncation_and_size_are_seen_at_once(mount: LiveMount) -> None:
    path = mount.directory / "new"
    with path.open("wb", buffering=0) as file:
        file.write(BODY)
        assert path.stat().st_size == len(BODY)
        os.ftruncate(file.fileno(), 10)
        assert path.stat().st_size == 10
        file.seek(20)
        file.write(b"end")
        assert path.stat().st_size == 23 and path.read_bytes() == BODY[:10] + bytes(10) + b"end"
        before = path.stat().st_mtime_ns
        file.write(b"!")
        until(lambda: file.write(b"!") and path.stat().st_mtime_ns > before, "mtime goes on")


def test_a_file_of_the_lake_is_never_written_to_in_the_cache(mount: LiveMount, folder: Folder) -> None:
    path = mount.directory / "old"
    with path.open("rb") as reader:
        assert reader.read() == BODY
        with path.open("r+b") as writer:
            writer.write(b"new")
        fd = os.open(path, os.O_WRONLY)
        os.pwrite(fd, b"er", 3)
        os.close(fd)
        reader.seek(0)
        assert reader.read() == b"newer" + BODY[5:]
    reaches_the_lake(folder, "old", b"newer" + BODY[5:])
    with path.open("wb") as writer:
        writer.write(b"short")
    assert path.read_bytes() == b"short"
    reaches_the_lake(folder, "old", b"short")
    assert mount.reads()["corrupt_blocks"] == 0


@pytest.mark.parametrize("passthrough", ["all", "off"])
def test_a_full_disk_is_enospc_and_what_was_written_stays(
    mounting: Mounting, folder: Folder, tmp_path: Path, passthrough: str
) -> None:
    with small_disk(tmp_path, 200 * MIB) as disk:
        options = ("-o", "rw", "--upload-delay=3600", "--dirty-max=1G", "--keep-free=0", "--dram=0")
        mount = mounting.mount(
            folder.url, *options, f"--passthrough={passthrough}", f"--cache={disk}/cache:64M"
        )
        with (mount.directory / "new").open("wb", buffering=0) as file:
            file.write(BODY)
            filler = fill_up(disk)
            with pytest.raises(OSError) as caught:
                while True:
                    file.write(BODY)
            assert caught.value.errno == errno.ENOSPC
            filler.unlink()
            assert (mount.directory / "new").read_bytes()[: len(BODY)] == BODY
        mount.crash()


def play(directory: Path, lake: Path, seed: int, until_s: float) -> None:
    """Write, rename, read and remove the same few files; each is one letter, over and over."""
    roll = random.Random(seed)
    names = [directory / f"f{number}" for number in range(5)]
    while time.monotonic() < until_s:
        path, what = roll.choice(names), roll.random()
        letter, size = roll.choice(b"abcdefgh"), roll.choice([10, 300_000, 3 * MIB])
        try:
            if what < 0.3:
                new = directory / f"new-{os.getpid()}"
                new.write_bytes(bytes([letter]) * size)
                os.replace(new, path)
            elif what < 0.4:
                os.replace(path, roll.choice(names))
            elif what < 0.45:
                path.unlink()
            elif what < 0.55:
                fd = os.open(path, roll.choice([os.O_RDWR, os.O_WRONLY]))
                body = bytes([letter]) * os.fstat(fd).st_size
                os.close(fd)
                new = directory / f"new-{os.getpid()}"
                with new.open("w+b", buffering=0) as file:
                    file.write(body)
                    assert os.pread(file.fileno(), len(body), 0) == body
                os.replace(new, path)
            else:
                seen = path.read_bytes()
                assert len(set(seen)) <= 1, "a file is of one letter"
        except FileNotFoundError:
            pass


def test_rewriting_and_renaming_the_same_few_files_finds_no_error_and_no_wrong_byte(
    mount: LiveMount, folder: Folder
) -> None:
    """From eight processes, while the uploader makes clean what is closed."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    context = get_context("spawn")
    until_s = time.monotonic() + STRESS_S + 2
    players = [
        context.Process(target=play, args=(mount.directory, folder.path, seed + number, until_s))
        for number in range(8)
    ]
    for player in players:
        player.start()
    for player in players:
        player.join()
    assert [player.exitcode for player in players] == [0] * 8
    final = {path.name: path.read_bytes() for path in mount.directory.iterdir()}

    def lake_agrees() -> bool:
        # The lake's own directory is none of its objects.
        return {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()} == final

    until(lake_agrees, "the lake has what the mount shows", 60)
    assert "Traceback" not in mount.log()
    assert mount.reads()["corrupt_blocks"] == 0
