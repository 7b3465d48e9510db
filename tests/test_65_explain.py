"""`sluice ls` and `status` say what leaves next and why, and how the reading goes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.mounting import MIB, Folder, LiveMount, Mounting, content, sluice, until


def listed(mount: LiveMount, path: str = "") -> dict[str, dict[str, Any]]:
    done = sluice("ls", "--recursive", mount.directory / path, "--json")
    assert done.returncode == 0, done.stderr
    entries = json.loads(done.stdout)["entries"]
    return {str(Path(entry["path"]).relative_to(mount.directory)): entry for entry in entries}


def outdated(mount: LiveMount) -> set[str]:
    entries = listed(mount).items()
    return {path for path, entry in entries if entry["leaves"] == "a later checkpoint was written since"}


def test_ls_says_what_leaves_next_and_why(mounting: Mounting, folder: Folder) -> None:
    for number in range(40):
        folder.put(f"set/{number:02d}", content(10_000, number))
    mount = mounting.mount(folder.url, "--read-ahead=none")
    assert sluice("warm", mount.directory / "set/00", mount.directory / "set/01").returncode == 0
    for number in range(2, 40):
        mount.read(f"set/{number:02d}")
    assert sluice("pin", mount.directory / "set/05").returncode == 0
    entries = listed(mount)
    assert entries["set/00"]["leaves"] == "asked for, not yet used"
    assert (entries["set/05"]["leaves"], entries["set/05"]["pinned"]) == ("pinned", True)
    assert entries["set/05"]["victim_rank"] is None
    used = [entry for entry in entries.values() if entry["leaves"] == "used in this epoch"]
    first = min(
        entries.values(),
        key=lambda entry: float("inf") if entry["victim_rank"] is None else entry["victim_rank"],
    )
    assert first in used and first["victim_rank"] == 0
    text = sluice("ls", mount.directory / "set").stdout
    assert "#0: used in this epoch" in text and "stays: pinned" in text


def test_ls_tells_the_reason_of_each_policy(mounting: Mounting, folder: Folder) -> None:
    folder.put("a", content(10_000))
    mount = mounting.mount(folder.url, "--policy=lru")
    mount.read("a")
    assert listed(mount)["a"]["leaves"] == "least recently used first"


def test_ls_says_what_is_open_in_passthrough(mounting: Mounting, folder: Folder) -> None:
    folder.put("shard", content(4 * MIB))
    mount = mounting.mount(folder.url, "--profile=checkpoint")
    if not mount.status()["features"]["passthrough"]["on"]:
        return
    with (mount.directory / "shard").open("rb") as file:
        assert file.read() == content(4 * MIB)
        assert listed(mount)["shard"]["leaves"] == "open in passthrough"
    until(lambda: listed(mount)["shard"]["leaves"] != "open in passthrough", "it is closed")


def test_ls_says_what_the_lake_has_not(mounting: Mounting, folder: Folder) -> None:
    mount = mounting.mount(folder.url, "--no-read-only", "--upload-delay=60", "--upload-open-delay=60")
    with (mount.directory / "a").open("wb") as file:
        file.write(b"a")
        file.flush()
        assert listed(mount)["a"]["dirty"] == "being written"
    until(lambda: listed(mount)["a"]["dirty"] == "waits for its upload", "it is closed")
    assert sluice("sync", mount.directory).returncode == 0
    assert listed(mount)["a"]["dirty"] is None


def test_status_tells_hits_and_waits_by_set(mounting: Mounting, folder: Folder) -> None:
    for number in range(100):
        folder.put(f"set/{number:03d}", content(10_000, number))
    mount = mounting.mount(folder.url, "--profile=checkpoint", "--dram=64M")
    order = [number * 37 % 100 for number in range(100)]

    def shown_after_a_pass() -> dict[str, Any] | None:
        for number in order:
            mount.read(f"set/{number:03d}")
        sets = mount.status()["sets"]
        return sets[0] if sets and sets[0]["uses"] > 20 and sets[0]["hit_rate"] == 1.0 else None

    shown = until(shown_after_a_pass, "an epoch of hits only")
    assert shown is not None and shown["waited_s"] == 0.0
    reads = mount.reads()
    assert 0 < reads["hit_rate"] < 1 and reads["waits"] > 0
    text = " ".join(sluice("status", mount.directory).stdout.replace("│", " ").split())  # It is folded.
    assert "100.0% hits in this epoch, readers waited 0.0 s" in text and "% hits; " in text


def test_status_names_pins(mounting: Mounting, folder: Folder) -> None:
    folder.put("keep/a", content(10_000))
    mount = mounting.mount(folder.url)
    assert sluice("pin", mount.directory / "keep").returncode == 0
    assert "keep: 16.0 KiB of the disks" in sluice("status", mount.directory).stdout
    assert os.listdir(mount.directory / "keep") == ["a"]


@pytest.mark.parametrize("policy", ["auto", "lru"])
def test_old_checkpoints_of_a_series_leave_first_and_the_latest_is_read_from_the_disk(
    mounting: Mounting, folder: Folder, policy: str
) -> None:
    folder.put("data", content(MIB, 7))
    mount = mounting.mount(
        folder.url,
        "--no-read-only",
        "--upload-delay=0",
        "--dram=0",
        f"--policy={policy}",
        "--read-ahead=none",
    )
    for step in (1, 2, 3):
        for rank in (0, 1):
            path = mount.directory / f"step_{step * 50}" / f"rank{rank}.pt"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content(MIB, 10 * step + rank))
        assert sluice("sync", mount.directory).returncode == 0
    assert mount.read("data") == content(MIB, 7)
    expected = {f"step_{step}/rank{rank}.pt" for step in (50, 100) for rank in (0, 1)}
    assert outdated(mount) == expected
    ranks = {path: entry.get("victim_rank") for path, entry in listed(mount).items()}
    assert {path for path, rank in ranks.items() if rank is not None and rank < 4} == expected
    before = mount.status()["lake_io"]["bytes_fetched"]
    for rank in (0, 1):
        assert mount.read(f"step_150/rank{rank}.pt") == content(MIB, 30 + rank)
    assert mount.status()["lake_io"]["bytes_fetched"] == before


@pytest.mark.parametrize("whole", [False, True], ids=["file", "directory"])
@pytest.mark.parametrize("uploaded", [False, True], ids=["before", "after"])
def test_a_checkpoint_is_of_its_series_once_it_has_its_name(
    mounting: Mounting, folder: Folder, whole: bool, uploaded: bool
) -> None:
    """Written under a temporary name, and renamed *before* or *after* the lake had it."""
    mount = mounting.mount(
        folder.url, "--no-read-only", "--upload-delay=0", "--dram=0", "--policy=lru", "--read-ahead=none"
    )
    name, expected = "shards/rank0.pt" if whole else "rank0.pt", set[str]()

    def is_as_expected() -> bool:
        return outdated(mount) == expected

    for step in (100, 200, 300):
        final = mount.directory / f"step_{step}"
        made = mount.directory / f"tmp_step_{step}" if whole else final
        path = made / "shards" / "rank0.pt" if whole else made / "rank0.tmp"
        path.parent.mkdir(parents=True)
        path.write_bytes(content(MIB, step))
        if uploaded:
            assert sluice("sync", mount.directory).returncode == 0
            assert is_as_expected()  # The last one is not, while this one is not whole.
        os.rename(*((made, final) if whole else (path, final / "rank0.pt")))
        assert sluice("sync", mount.directory).returncode == 0
        expected |= {f"step_{step - 100}/{name}"} if step > 100 else set()
        until(is_as_expected, "the one before is outdated, and this one is not")
