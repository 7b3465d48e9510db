"""`sluice warm`, `pin` and `unpin` on real mounts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.memory_s3 import MemoryS3
from tests.mounting import MIB, Folder, LiveMount, Mounting, content, kill_each, sluice, until
from tools.mounted import sluice_command

KIB = 1024
FILES = 40
SIZE = 20 * KIB


def fill(folder: Folder, name: str, count: int = FILES, size_bytes: int = SIZE) -> None:
    for number in range(count):
        folder.put(f"{name}/c{number % 2}/{number:03d}.jpg", content(size_bytes, number))


def told(*arguments: object) -> dict[str, Any]:
    """Return what a command says with --json; it must do what it was asked for."""
    done = sluice(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def shares(mount: LiveMount, path: str) -> dict[str, bool]:
    """Return path below the mount -> whether it is cached whole."""
    entries = told("ls", "--recursive", mount.directory / path)["entries"]
    return {
        str(Path(entry["path"]).relative_to(mount.directory)): entry["cached_bytes"] == entry["size_bytes"]
        for entry in entries
    }


def gets(mount: LiveMount) -> int:
    return mount.requests()["get"]


# Warm


def test_what_was_warmed_is_read_without_the_lake(mounting: Mounting, folder: Folder) -> None:
    """Small files, a large one, and a file, a directory, a pattern: each once however often it is named."""
    fill(folder, "train")
    folder.put("big.tar", content(20 * MIB, 5))
    mount = mounting.mount(folder.url, "--dram=64M")
    root = mount.directory
    total = told("warm", root / "train", root / "train/c0/000.jpg", f"{root}/*.tar")
    assert (total["files"], total["fetched_files"], total["complete"]) == (FILES + 1, FILES + 1, True)
    assert total["fetched_bytes"] == FILES * SIZE + 20 * MIB
    before = gets(mount)
    for number in range(FILES):
        assert mount.read(f"train/c{number % 2}/{number:03d}.jpg") == content(SIZE, number)
    assert mount.read("big.tar") == content(20 * MIB, 5)
    assert gets(mount) == before
    again = told("warm", root)
    assert (again["cached_files"], again["fetched_files"], again["fetch_bytes"]) == (FILES + 1, 0, 0)


def test_what_it_takes_is_said_before_it_starts(mounting: Mounting, folder: Folder) -> None:
    fill(folder, "train")
    mount = mounting.mount(folder.url)
    mount.read("train/c0/000.jpg")
    done = sluice("warm", mount.directory / "train")
    assert done.returncode == 0
    assert done.stderr == "sluice: 40 files, 800.0 KiB: 20.0 KiB are cached, 39 files, 780.0 KiB, to fetch\n"
    assert done.stdout.startswith("fetched 39 files, 780.0 KiB, in ") and "1 of 40 were there" in done.stdout


def test_a_list_of_files_is_warmed(mounting: Mounting, folder: Folder, tmp_path: Path) -> None:
    fill(folder, "train")
    mount = mounting.mount(folder.url)
    wanted = [f"train/c0/{number:03d}.jpg" for number in range(0, 20, 2)]
    text = (
        "".join(f"{mount.directory / path}\n" for path in wanted) + f"{mount.directory}/none.jpg\n\n\0bad\n"
    )
    (tmp_path / "list").write_text(text)
    done = sluice("warm", "--from-list", tmp_path / "list", "--json")
    total = json.loads(done.stdout)
    assert done.returncode == 1 and total["fetched_files"] == len(wanted)
    assert [item["error"] for item in total["errors"]] == ["no such file or directory"]
    assert "1 lines are no paths" in done.stderr and "none.jpg: no such file" in done.stderr
    assert {path for path, is_cached in shares(mount, "train").items() if is_cached} == set(wanted)


def test_a_list_longer_than_a_request_goes_in_parts(
    mounting: Mounting, folder: Folder, tmp_path: Path
) -> None:
    fill(folder, "train")
    mount = mounting.mount(folder.url)
    names = [f"{mount.directory}/train/c{n % 2}/{n:03d}.jpg" for n in range(FILES)]
    names += [f"{mount.directory}/train/c0/{'long-' * 20}{n}" for n in range(30_000)]
    (tmp_path / "list").write_text("\n".join(names))
    done = sluice("warm", "--from-list", tmp_path / "list", "--json")
    total = json.loads(done.stdout)
    assert (done.returncode, total["fetched_files"], total["error_count"]) == (1, FILES, 30_000)
    assert done.stderr.count("\n") < 10 and "and 29,995 more like these" in done.stderr


@pytest.mark.parametrize("tier", ["dram", "nvme"])
def test_files_are_warmed_into_the_tier_that_is_asked_for(
    mounting: Mounting, folder: Folder, tier: str
) -> None:
    """Also those that were in the other one."""
    fill(folder, "train")
    folder.put("big.bin", content(9 * MIB))
    mount = mounting.mount(folder.url, "--dram=64M")
    other = "nvme" if tier == "dram" else "dram"
    told("warm", "--tier", other, mount.directory / "train/c0", mount.directory / "big.bin")
    total = told("warm", "--tier", tier, mount.directory)
    assert (total["moved_files"], total["fetched_files"]) == (FILES // 2 + 1, FILES // 2)
    entries = told("ls", "--recursive", mount.directory)["entries"]
    files = [entry for entry in entries if entry["kind"] == "file"]
    assert len(files) == FILES + 1 and {entry["tier"].startswith(tier) for entry in files} == {True}
    before = gets(mount)
    assert mount.read("big.bin") == content(9 * MIB)
    assert mount.read("train/c1/001.jpg") == content(SIZE, 1)
    assert gets(mount) == before


def test_what_does_not_fit_is_left_out_and_said(mounting: Mounting, folder: Folder) -> None:
    """128 MiB do not go into 64; what is there stays there, and nothing is fetched twice."""
    fill(folder, "train", count=64, size_bytes=2 * MIB)
    mount = mounting.mount(folder.url, size="64M")
    done = sluice("warm", mount.directory / "train")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()[:2]
    assert first.startswith("sluice: 64 files, 128.0 MiB: 0 B are cached, ")
    assert "do not fit in the tiers" in second
    cached = sum(shares(mount, "train").values())
    assert 24 <= cached <= 32 and gets(mount) == cached
    assert sluice("warm", mount.directory / "train").returncode == 1
    assert gets(mount) <= cached + 1


def test_warming_pushes_out_what_nobody_asked_for(mounting: Mounting, folder: Folder) -> None:
    fill(folder, "old", count=28, size_bytes=2 * MIB)
    fill(folder, "new", count=24, size_bytes=2 * MIB)
    mount = mounting.mount(folder.url, size="64M")
    for number in range(28):
        mount.read(f"old/c{number % 2}/{number:03d}.jpg")
    assert told("warm", mount.directory / "new")["complete"]
    assert all(shares(mount, "new").values())


def test_bad_input_is_refused_in_one_line(mounting: Mounting, folder: Folder, tmp_path: Path) -> None:
    folder.put("a", b"a")
    mount = mounting.mount(folder.url)
    (tmp_path / "empty").write_text("\n\n")
    for arguments, status, said in (
        ([], 2, "nothing is named"),
        ([tmp_path], 2, "not in a SluiceFS mount"),
        ([mount.directory / "none"], 1, "none: no such file or directory"),
        ([f"{mount.directory}/*.jpg"], 2, "nothing fits this pattern"),
        (["--from-list", tmp_path / "none"], 2, "No such file or directory"),
        (["--from-list", tmp_path / "empty"], 2, "no line is a path"),
        (["--tier", "tape", mount.directory], 2, "invalid choice: 'tape'"),
        (["--tier", "dram", mount.directory], 1, "this mount has no tier in memory; mount with --dram"),
    ):
        done = sluice("warm", *arguments)
        assert (done.returncode, done.stderr.splitlines()[-1].count(said)) == (status, 1), done


def test_what_the_lake_does_not_give_is_counted_and_told_once(mounting: Mounting, folder: Folder) -> None:
    fill(folder, "train")
    mount = mounting.mount(folder.url)
    assert (
        len(os.listdir(mount.directory / "train/c0")) + len(os.listdir(mount.directory / "train/c1")) == FILES
    )
    for number in range(0, 20, 2):
        folder.delete(f"train/c0/{number:03d}.jpg")
    done = sluice("warm", mount.directory / "train")
    assert done.returncode == 1 and "fetched 30 files" in done.stdout
    assert done.stderr.count("\n") == 2 and "sluice: 10 files: no longer in the lake (" in done.stderr


def test_a_lake_that_denies_everything_is_told_once(mounting: Mounting, memory_s3: MemoryS3) -> None:
    for number in range(FILES):
        memory_s3.put(f"train/{number:03d}.jpg", content(SIZE, number))
    mount = mounting.mount(memory_s3.url, *memory_s3.options)
    assert len(os.listdir(mount.directory / "train")) == FILES
    memory_s3.denied = frozenset({"get"})
    done = sluice("warm", mount.directory / "train")
    assert done.returncode == 1 and "fetched 0 files" in done.stdout
    assert "40 files: access denied by the lake (" in done.stderr and done.stderr.count("\n") == 2


def test_interrupting_it_leaves_the_mount_as_it_should_be(mounting: Mounting, memory_s3: MemoryS3) -> None:
    memory_s3.put_many({f"train/{number:03d}.jpg": content(SIZE, number) for number in range(300)})
    mount = mounting.mount(memory_s3.url, *memory_s3.options, "--fetch-threads=1")
    memory_s3.latency_s = 0.1  # So that it takes longer than an interrupt can be late.
    running = subprocess.Popen(
        [sluice_command(), "warm", mount.directory / "train"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        until(lambda: mount.status()["warming"] and gets(mount) > 2, "it has begun")
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=30)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 130
    until(lambda: not mount.status()["warming"], "the job has ended")
    until(lambda: mount.status()["lake_io"]["flights"] == 0, "nothing is fetched any more")
    assert gets(mount) < 300
    memory_s3.latency_s = 0.0
    assert mount.read("train/000.jpg") == content(SIZE, 0)


# Pin


def pinned(mount: LiveMount) -> list[str]:
    return list(mount.status()["pins"]["paths"])


def crowd(mount: LiveMount, count: int = 64) -> None:
    """Read more than the tiers hold of other files."""
    for number in range(count):
        mount.read_anew(f"crowd/c{number % 2}/{number:03d}.jpg")


@pytest.fixture
def crowded(mounting: Mounting, folder: Folder) -> LiveMount:
    fill(folder, "crowd", count=64, size_bytes=2 * MIB)
    fill(folder, "keep", count=8, size_bytes=2 * MIB)
    return mounting.mount(folder.url, "--read-ahead=none", "--dram=64M", size="64M")


def test_what_is_pinned_stays_while_all_else_goes(crowded: LiveMount) -> None:
    total = told("pin", crowded.directory / "keep")
    assert total["fetched_files"] == 8 and total["pinned"] == [str(crowded.directory / "keep")]
    for _ in range(3):
        crowd(crowded)
        assert all(shares(crowded, "keep").values())
    before = gets(crowded)
    for number in range(8):
        assert crowded.read_anew(f"keep/c{number % 2}/{number:03d}.jpg") == content(2 * MIB, number)
    assert gets(crowded) == before
    listed = json.loads(sluice("pin", "--list", "--json", crowded.directory).stdout)
    assert listed[str(crowded.directory)]["paths"] == [str(crowded.directory / "keep")]
    assert told("unpin", crowded.directory / "keep")["unpinned"] == [str(crowded.directory / "keep")]
    until(lambda: crowd(crowded) or not all(shares(crowded, "keep").values()), "they may leave again")


def test_pins_outlive_the_mount_the_mover_and_the_index(crowded: LiveMount) -> None:
    told("pin", crowded.directory / "keep")
    mover = crowded.pids()["mover"]
    kill_each(mover)
    until(lambda: crowded.pids()["mover"] != mover, "there is another mover")
    crowd(crowded)
    assert pinned(crowded) == ["keep"] and all(shares(crowded, "keep").values())
    crowded.remount()
    crowd(crowded)
    assert pinned(crowded) == ["keep"] and all(shares(crowded, "keep").values())
    crowded.unmount()
    (crowded.cache / "clean").unlink()  # As after a power loss: another boot, and no clean unmount.
    (crowded.cache / "boot").write_text("another boot")
    crowded.mount()
    assert pinned(crowded) == ["keep"]
    until(lambda: all(shares(crowded, "keep").values()), "the files are taken over")
    until(lambda: crowded.status()["pins"]["bytes"] >= 8 * 2 * MIB, "they are pinned again")
    crowd(crowded)
    assert all(shares(crowded, "keep").values())


def test_what_comes_later_below_a_pinned_directory_is_pinned_when_it_is_read(
    mounting: Mounting, folder: Folder
) -> None:
    """New files, and new versions; the old version goes."""
    fill(folder, "crowd", count=64, size_bytes=2 * MIB)
    folder.put("keep/a", content(2 * MIB, 1))
    mount = mounting.mount(folder.url, "--ttl=0.2", size="64M")
    told("pin", mount.directory / "keep")
    folder.put("keep/a", content(2 * MIB, 2))
    folder.put("keep/b", content(2 * MIB, 3))
    until(lambda: mount.read("keep/a") == content(2 * MIB, 2), "the new version")
    until(lambda: os.path.exists(mount.directory / "keep/b"), "the new file")
    assert mount.read("keep/b") == content(2 * MIB, 3)
    until(lambda: mount.status()["pins"]["bytes"] < 3 * 2 * MIB, "the old version is pinned no longer")
    crowd(mount)
    crowd(mount)
    assert shares(mount, "keep") == {"keep/a": True, "keep/b": True}


def test_pinning_more_than_the_disks_hold_is_refused(crowded: LiveMount) -> None:
    done = sluice("pin", crowded.directory / "crowd")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "all that would be pinned takes" in done.stderr and "larger --cache" in done.stderr
    assert pinned(crowded) == [] and gets(crowded) == 0


def test_evicting_what_is_pinned_is_refused(crowded: LiveMount) -> None:
    told("pin", crowded.directory / "keep/c0")
    one = sluice("evict", crowded.directory / "keep/c0/000.jpg")
    assert one.returncode == 1 and "is pinned by keep/c0: `sluice unpin` it first" in one.stderr
    all_of_it = sluice("evict", crowded.directory / "keep")
    assert all_of_it.returncode == 1 and "4 pinned files below it stay" in all_of_it.stderr
    assert sum(shares(crowded, "keep/c0").values()) == 4


def test_pins_that_are_none_are_told(crowded: LiveMount) -> None:
    told("pin", "--no-fetch", crowded.directory / "keep")
    assert gets(crowded) == 0
    done = sluice("unpin", crowded.directory / "keep/c0", crowded.directory / "crowd")
    assert done.returncode == 1
    assert "is pinned by its directory keep: unpin that" in done.stderr
    assert "crowd: is not pinned" in done.stderr
    done = sluice("pin", crowded.directory / "nowhere")
    assert done.returncode == 1 and "nowhere: no such file or directory" in done.stderr
    assert pinned(crowded) == ["keep"]


def test_a_file_that_is_written_or_renamed_below_a_pinned_directory_is_pinned(
    mounting: Mounting, folder: Folder
) -> None:
    fill(folder, "crowd", count=64, size_bytes=2 * MIB)
    folder.put("keep/a", content(2 * MIB, 1))
    folder.put("other/b", content(2 * MIB, 2))
    mount = mounting.mount(folder.url, "--no-read-only", "--upload-delay=0", size="64M")
    told("pin", mount.directory / "keep")
    assert mount.read("other/b") == content(2 * MIB, 2)
    os.rename(mount.directory / "other/b", mount.directory / "keep/b")
    (mount.directory / "keep/c").write_bytes(content(2 * MIB, 3))
    assert sluice("sync", mount.directory).returncode == 0
    until(lambda: mount.status()["pins"]["bytes"] > 3 * 2 * MIB, "all three are pinned")
    os.rename(mount.directory / "keep/a", mount.directory / "other/a")
    until(lambda: mount.status()["pins"]["bytes"] < 3 * 2 * MIB, "what left is pinned no longer")
    crowd(mount)
    crowd(mount)
    assert shares(mount, "keep") == {"keep/b": True, "keep/c": True}


def test_a_damaged_file_of_pins_is_told_and_the_mount_goes_on(crowded: LiveMount) -> None:
    told("pin", crowded.directory / "keep")
    crowded.unmount()
    (crowded.cache / "pins").write_bytes(b"\0rubbish")
    crowded.mount()
    assert pinned(crowded) == [] and "pins: not readable" in crowded.log()
    told("pin", crowded.directory / "keep")
    assert pinned(crowded) == ["keep"]
