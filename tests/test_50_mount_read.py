"""A real mount shows the lake's tree byte for byte, from a directory and from S3, and nothing else."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.memory_s3 import MemoryS3
from tests.mounting import (
    MIB,
    Folder,
    Lake,
    LiveMount,
    Mounting,
    Prefix,
    content,
    mounting_below,
    sluice,
    until,
)
from tools.servers import SeaweedServer

KIB = 1 << 10
SIZES = {
    "zero": 0,
    "one": 1,
    "block-1": 128 * KIB - 1,
    "block": 128 * KIB,
    "block+1": 128 * KIB + 1,
    "small": 8 * MIB,
    "small+1": 8 * MIB + 1,
    "large": 30 * MIB + 12_345,
}
ODD_NAMES = (
    " leading and trailing ",
    "plus+sign",
    "percent%20",
    "%2F",
    "ünïcödé-日本語-😀",
    "é",  # Composed, and
    "é",  # decomposed: two files.
    "new\nline",
    "tab\t",
    "bell\x07",
    "quote'\"",
    "#hash?query&a=b;c",
    "...",
    "..three",
    ".hidden",
    "-n",
    "~",
    "*",
    "[x]",
    "$HOME",
    "<a>&amp;",
    "n" * 255,
    "é" * 127,
)


def reference() -> dict[str, bytes]:
    files = {f"sizes/{name}": content(size, seed=1) for name, size in SIZES.items()}
    files |= {f"odd/{name}": name.encode() for name in ODD_NAMES}
    files |= {f"many/{i:03d}.bin": content(1000 + i, seed=2) for i in range(60)}
    files["deep/a/b/c/d/e/f/g/leaf"] = b"leaf"
    files["root file"] = b"at the root"
    return files


@pytest.fixture(scope="module", params=["directory", "S3"])
def tree(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LiveMount, dict[str, bytes]]]:
    """One mount of one lake for all tests that only read."""
    home = tmp_path_factory.mktemp("tree")
    lake: Lake
    environment: dict[str, str] = {}
    if request.param == "directory":
        lake = Folder(home / "lake")
    else:
        server: SeaweedServer = request.getfixturevalue("s3_server")
        lake = Prefix(server, request.getfixturevalue("shared_bucket"), f"tree-{os.getpid()}")
        environment = {k: v for k, v in server.environment().items() if k != "AWS_ENDPOINT_URL"}
    files = reference()
    for key, body in files.items():
        lake.put(key, body)
    lake.put("markers/empty/", b"")
    with mounting_below(home) as mounting:
        yield (
            mounting.mount(
                lake.url, *lake.options, "--dram=64M", "--ttl=600", size="128M", environment=environment
            ),
            files,
        )


Tree = tuple[LiveMount, dict[str, bytes]]


def walk(directory: Path) -> dict[str, bytes]:
    return {
        os.path.relpath(os.path.join(where, name), directory): Path(where, name).read_bytes()
        for where, _, names in os.walk(directory)
        for name in names
    }


def test_the_tree_equals_the_lake_byte_for_byte(tree: Tree) -> None:
    mount, files = tree
    found = walk(mount.directory)
    assert sorted(found) == sorted(files)
    assert [name for name in files if found[name] != files[name]] == []


def test_an_empty_directory_marker_is_an_empty_directory(tree: Tree) -> None:
    mount, _ = tree
    assert (mount.directory / "markers").is_dir()
    assert os.listdir(mount.directory / "markers") == ["empty"]
    assert os.listdir(mount.directory / "markers/empty") == []


def test_sizes_kinds_modes_and_owners_are_shown(tree: Tree) -> None:
    mount, files = tree
    for name, body in files.items():
        status = os.stat(mount.directory / name)
        assert (status.st_size, stat.S_IMODE(status.st_mode)) == (len(body), 0o644), name
        assert stat.S_ISREG(status.st_mode) and (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
        assert abs(status.st_mtime - os.stat(mount.home).st_mtime) < 600, name
    assert stat.S_IMODE(os.stat(mount.directory / "deep/a").st_mode) == 0o755


def test_find_and_ls_show_all(tree: Tree) -> None:
    mount, files = tree
    found = subprocess.run(["find", ".", "-type", "f", "-print0"], cwd=mount.directory, capture_output=True)
    assert sorted(found.stdout.decode().split("\0")[:-1]) == sorted(f"./{name}" for name in files)
    listed = subprocess.run(["ls", "-lR", "."], cwd=mount.directory, capture_output=True)
    assert (found.returncode, found.stderr) == (listed.returncode, listed.stderr) == (0, b"")


RANDOM_READER = """
import os, random, sys
seed, path, reference, count = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
roll = random.Random(seed)
with open(reference, "rb") as file:
    body = file.read()
fd = os.open(path, os.O_RDONLY)
for i in range(count):
    length = roll.choice([1, 100, 4096, 110_000, 131072, 300_000, 2_000_000])
    offset = roll.choice([roll.randrange(len(body) + 10)] * 9 + [0, 131071, 131072, 8 << 20])
    if roll.random() < 0.5:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    found = os.pread(fd, length, offset)
    assert found == body[offset : offset + length], (seed, i, offset, length, len(found))
"""


def test_random_reads_of_several_processes_are_right(tree: Tree, tmp_path: Path) -> None:
    mount, files = tree
    copy = tmp_path / "reference"
    copy.write_bytes(files["sizes/large"])
    path = mount.directory / "sizes/large"
    readers = [
        subprocess.Popen([sys.executable, "-c", RANDOM_READER, str(seed), path, copy, "60"])
        for seed in range(4)
    ]
    try:
        assert [reader.wait(90) for reader in readers] == [0] * 4
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


def test_mapped_files_read_right(tree: Tree) -> None:
    mount, files = tree
    roll = random.Random(5)
    for name in ("sizes/one", "sizes/block+1", "sizes/small", "sizes/large"):
        with (
            (mount.directory / name).open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        ):
            for _ in range(30):
                start = roll.randrange(len(mapped))
                assert mapped[start : start + 9000] == files[name][start : start + 9000], (name, start)
            assert mapped[:] == files[name]


def test_sendfile_copy_and_direct_reads_are_right(tree: Tree, tmp_path: Path) -> None:
    mount, files = tree
    path = mount.directory / "sizes/small+1"
    shutil.copyfile(path, tmp_path / "copy")  # sendfile(2)
    subprocess.run(["cp", path, tmp_path / "cp"], check=True)  # copy_file_range(2)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "cp").read_bytes() == files["sizes/small+1"]
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, MIB)  # Aligned.
        assert os.preadv(fd, [buffer], 4096) == MIB
        assert buffer[:] == files["sizes/small+1"][4096 : 4096 + MIB]
    finally:
        os.close(fd)


def test_reading_at_and_past_the_end_gives_what_is_there(tree: Tree) -> None:
    mount, files = tree
    for name in ("sizes/zero", "sizes/block", "sizes/large"):
        body = files[name]
        fd = os.open(mount.directory / name, os.O_RDONLY)
        try:
            assert os.pread(fd, 10, len(body)) == os.pread(fd, 10, len(body) + 5000) == b""
            assert os.pread(fd, 1000, max(0, len(body) - 3)) == body[-3:]
        finally:
            os.close(fd)


def open_to_write(flags: int) -> Callable[[Path], object]:
    return lambda directory: os.close(os.open(directory / "root file", flags))


WRITES: dict[str, Callable[[Path], object]] = {
    "O_WRONLY": open_to_write(os.O_WRONLY),
    "O_RDWR": open_to_write(os.O_RDWR),
    "O_APPEND": open_to_write(os.O_WRONLY | os.O_APPEND),
    "O_TRUNC": open_to_write(os.O_WRONLY | os.O_TRUNC),
    "create": lambda directory: (directory / "new").touch(),
    "mkdir": lambda directory: (directory / "new").mkdir(),
    "mkfifo": lambda directory: os.mkfifo(directory / "new"),
    "rmdir": lambda directory: (directory / "markers/empty").rmdir(),
    "unlink": lambda directory: (directory / "root file").unlink(),
    "rename": lambda directory: (directory / "root file").rename(directory / "new"),
    "rename directory": lambda directory: (directory / "deep").rename(directory / "new"),
    "symlink": lambda directory: (directory / "new").symlink_to("x"),
    "link": lambda directory: (directory / "new").hardlink_to(directory / "root file"),
    "truncate": lambda directory: os.truncate(directory / "root file", 1),
    "chmod": lambda directory: (directory / "root file").chmod(0o600),
    "chown": lambda directory: os.chown(directory / "root file", 1, 1),
    "utime": lambda directory: os.utime(directory / "root file"),
    "setxattr": lambda directory: os.setxattr(directory / "root file", "user.a", b"b"),
}


@pytest.mark.parametrize("verb", WRITES)
def test_every_write_says_that_the_filesystem_is_read_only(tree: Tree, verb: str) -> None:
    mount, files = tree
    with pytest.raises(OSError) as caught:
        WRITES[verb](mount.directory)
    assert errno.errorcode[caught.value.errno or 0] == "EROFS"
    assert mount.read("root file") == files["root file"]


def test_names_that_are_not_there_are_not_there(tree: Tree) -> None:
    mount, _ = tree
    for name in ("nothing", "many/nothing", "nothing/below", "n" * 256, "root file/below", "odd/nothing\n"):
        with pytest.raises(OSError) as caught:
            (mount.directory / name).stat()
        assert caught.value.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG), name


def test_inodes_stay_over_a_remount_and_bytes_too(tree: Tree) -> None:
    mount, files = tree
    names = [*list(files)[:20], "deep/a/b", "markers/empty"]
    before = [os.stat(mount.directory / name).st_ino for name in names]
    mount.remount()
    assert [os.stat(mount.directory / name).st_ino for name in names] == before
    assert mount.read("sizes/large") == files["sizes/large"]


# --- What needs a lake of its own --------------------------------------------------------------


HIDDEN = {
    "a//b": "empty component",
    "//": "empty component",
    "x/./y": "'.'",
    "../up": "'..'",
    "x/../../up": "'..'",
    "both": "directory",  # Is a directory too.
    "long/" + "é" * 128: "255 bytes",
    "marker/": "content",
    "nul\0": "NUL",
}


def test_keys_that_no_path_can_show_are_hidden_and_counted(mounting: Mounting, memory_s3: MemoryS3) -> None:
    memory_s3.put_many(dict.fromkeys(HIDDEN, b"hidden"))
    shown = {
        "both/inside": b"1",
        "a/c": b"2",
        "x/y": b"3",
        "long/name": b"4",
        "marker/in": b"5",
        "plain": b"6",
    }
    memory_s3.put_many(shown)
    mount = mounting.mount(memory_s3.url, f"--endpoint-url={memory_s3.endpoint_url}")
    assert walk(mount.directory) == shown
    told = json.loads(sluice("doctor", "--json", mount.directory).stdout)["hidden"]
    # What lies below a hidden prefix is listed under that prefix.
    assert told["count"] == len(told["keys"])
    for key, reason in HIDDEN.items():
        named = [row for row in told["keys"] if key.startswith(row["key"])]
        assert named and any(reason in row["reason"] for row in named), (key, told)
    assert not any(shown_key.startswith(row["key"]) and row["key"] != "both" and row["key"] != "marker/"
                   for shown_key in shown for row in told["keys"])  # fmt: skip


def test_names_that_are_no_unicode_work(mounting: Mounting, folder: Folder) -> None:
    raw = b"\xff\xfe raw \x80"
    (folder.path / "d").mkdir()
    Path(os.fsdecode(bytes(folder.path) + b"/d/" + raw)).write_bytes(b"raw")
    mount = mounting.mount(folder.url)
    assert os.listdir(os.fsencode(mount.directory / "d")) == [raw]
    assert Path(os.fsdecode(bytes(mount.directory) + b"/d/" + raw)).read_bytes() == b"raw"


def list_in_pieces(directory: Path, between: Callable[[int], None]) -> list[str]:
    names = []
    with os.scandir(directory) as entries:
        for number, entry in enumerate(entries):
            names.append(entry.name)
            if number % 800 == 400:
                between(number)
    return names


def test_a_directory_of_5000_is_complete_and_without_duplicates(
    mounting: Mounting, memory_s3: MemoryS3
) -> None:
    keys = [f"d/{i:05d}" for i in range(5000)]
    memory_s3.put_many(dict.fromkeys(keys, b"x"))
    mount = mounting.mount(memory_s3.url, f"--endpoint-url={memory_s3.endpoint_url}", "--workers=3")
    for _ in range(2):
        names = list_in_pieces(mount.directory / "d", lambda _: None)
        assert sorted(names) == [key[2:] for key in keys]


def test_entries_that_come_and_go_disturb_no_listing_of_the_others(
    mounting: Mounting, memory_s3: MemoryS3
) -> None:
    """What is there all the time is seen exactly once; what comes and goes at most once."""
    stays = {f"d/{i:05d}": b"x" for i in range(0, 5000, 2)}
    memory_s3.put_many(stays)
    memory_s3.put_many({f"d/{i:05d}": b"y" for i in range(1, 5000, 4)})
    mount = mounting.mount(
        memory_s3.url, f"--endpoint-url={memory_s3.endpoint_url}", "--ttl=0.2", "--workers=3"
    )

    def change(number: int) -> None:
        """Take away, add, and replace by a directory, on both sides of the reader; see it listed again."""
        for i in (1, 3997):
            key = f"d/{number // 500 * 8 + i:05d}"
            memory_s3.delete(key)
            memory_s3.put(f"{key}/now a directory", b"z")
        memory_s3.put_many({f"d/{i + number % 7:05d}": b"n" for i in range(3, 5000, 800)})
        relisted = memory_s3.requests["list"]
        until(
            lambda: os.listdir(mount.directory / "d") and memory_s3.requests["list"] > relisted,
            "a new listing",
        )

    names = list_in_pieces(mount.directory / "d", change)
    assert len(names) == len(set(names))
    assert {key[2:] for key in stays} <= set(names)
