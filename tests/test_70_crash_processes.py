"""Any process dies at any moment: what had returned is there, whole, and reaches the lake."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.crash_driver import (
    TIMEOUT_S,
    FolderView,
    LakeView,
    LakeWatch,
    Running,
    batches,
    below,
    bytes_sent,
    check_lake,
    drain,
    files,
    known_pids,
    note_lake,
    points,
    running,
    start,
)
from tests.crash_model import Story, Told, difference, observe
from tests.crash_script import (
    MakeDirectory,
    Remove,
    Rename,
    SyncDirectory,
    Tree,
    Write,
    digest,
    lines_told,
    script,
)
from tests.mounting import (
    Folder,
    LiveMount,
    Mounting,
    detach,
    kill_each,
    mounts_below,
    processes_naming,
    until,
)

pytestmark = pytest.mark.timeout(TIMEOUT_S)

# --- The harness itself: plain directories keep the promises, damaged ones are found out -----------------


@pytest.mark.parametrize("seed", range(4))
def test_a_plain_directory_is_what_the_model_says_after_every_script(tmp_path: Path, seed: int) -> None:
    story = Story(script(seed, 80))
    with running(tmp_path, seed, 80) as performed:
        told = performed.finish()
    assert [line for line in told if line.event == "failed"] == []
    found = observe(tmp_path)
    assert found == story.states[-1]
    assert story.fault_after_kill(told, found) == ""
    assert story.fault_after_power_loss(told, found) == ""


def test_scripts_hold_every_kind_of_operation() -> None:
    kinds = {type(operation) for seed in range(4) for operation in script(seed, 80)}
    assert kinds == {Write, Rename, Remove, MakeDirectory, SyncDirectory}
    assert {o.how for seed in range(4) for o in script(seed, 80) if isinstance(o, Write)} == {
        "wb",
        "ab",
        "r+b",
    }


@pytest.mark.parametrize("seed", range(10))
def test_a_script_that_is_cut_off_leaves_what_the_model_allows(tmp_path: Path, seed: int) -> None:
    story, roll = Story(script(seed, 60)), random.Random(seed)
    performed = Running(tmp_path, seed, 60)
    performed.wait_for(roll.randrange(120))
    performed.end()
    assert story.fault_after_kill(performed.told, observe(tmp_path)) == ""


def lines(*events: tuple[int, str]) -> list[Told]:
    return [Told(number, event, at_ns) for at_ns, (number, event) in enumerate(events)]


def written(number: int, *, synced: bool) -> list[tuple[int, str]]:
    return [
        (number, "begun"),
        (number, "part"),
        *([(number, "synced")] if synced else []),
        (number, "returned"),
    ]


A, B = (Write("a", "wb", 0, (5000, seed), seed == 1) for seed in (1, 2))  # A is fsynced, B is not.
OLD, NEW = A.content, B.content


def test_the_model_finds_what_killed_processes_must_not_leave() -> None:
    story = Story([A, B, Rename("a", "b")])
    whole = lines(*written(0, synced=True), *written(1, synced=False))
    assert story.fault_after_kill(whole, {"a": NEW}) == ""
    assert "missing" in story.fault_after_kill(whole, {})
    assert "not" in story.fault_after_kill(whole, {"a": OLD})
    cut_off = whole[:-1]
    assert story.fault_after_kill(cut_off, {"a": NEW[:1000]}) == ""
    assert "torn" in story.fault_after_kill(cut_off, {"a": OLD[:1000] + NEW[1000:]})
    renaming = [*whole, *lines((2, "begun"))]
    assert story.fault_after_kill(renaming, {"a": NEW}) == story.fault_after_kill(renaming, {"b": NEW}) == ""
    assert "neither" in story.fault_after_kill(renaming, {"a": NEW, "b": NEW})
    assert "neither" in story.fault_after_kill(renaming, {})


def test_the_model_finds_what_a_power_loss_must_not_leave() -> None:
    story = Story([A, Rename("a", "b"), MakeDirectory("d"), Write("b", "wb", 0, (10, 3), False)])
    told = lines(*written(0, synced=True), (1, "begun"), (1, "returned"), (2, "begun"))
    assert story.fault_after_power_loss(told, {"a": OLD}) == ""
    assert story.fault_after_power_loss(told, {"b": OLD}) == ""
    assert story.fault_after_power_loss(told, {"b": OLD, "d": None}) == ""
    assert "b was fsynced" in story.fault_after_power_loss(told, {"b": OLD[:-1]})
    assert "missing" in story.fault_after_power_loss(told, {})
    assert "missing" in story.fault_after_power_loss(told, {"a": OLD, "d": None}), "no such moment"
    later = [*told, *lines((2, "returned"), *written(3, synced=False))]
    assert story.fault_after_power_loss(later, {"b": b"any", "d": None}) == "", "written since, not fsynced"
    assert story.fault_after_power_loss(later, {"a": b"any"}) == "", "it is the same file"
    assert story.fault_after_power_loss(later, {"d": None}) == "", "nor is its name promised"
    again = [*later, *lines((3, "synced"))]
    assert "missing" in story.fault_after_power_loss(again, {"a": OLD}), "fsync covers the rename before it"
    assert "b is missing" in story.fault_after_power_loss(again, {"d": None})


def test_the_watch_over_the_lake_sees_versions_that_come_and_go(folder: Folder) -> None:
    with LakeWatch(FolderView(folder)) as watch:
        folder.put("d/file", b"one")
        until(lambda: len(watch.seen) == 1, "it saw the first")
        folder.put("d/file", b"two")
        until(lambda: len(watch.seen) == 2, "it saw the second")
        shutil.rmtree(folder.path / "d")
    one, two = digest(b"one"), digest(b"two")
    assert watch.torn({one, two}) == set()
    assert watch.torn({one}) == {("d/file", two)}


# --- The mount ---------------------------------------------------------------------------------

# Sent soon, so that uploads are under way at most moments; what is open is not sent.
OPTIONS = ("--no-read-only", "--upload-delay=0.1", "--upload-open-delay=3600", "--keep-free=0")
COUNT = 60


def chosen_lines(story: Story, seed: int, count: int) -> list[int]:
    """Return *count* moments of the script, ascending, as numbers of the lines that it tells."""
    roll, lines = random.Random(f"points {seed}"), lines_told(story.operations)
    return sorted(roll.randrange(1, lines) for _ in range(count))


def check_through_to_the_lake(mount: LiveMount, view: LakeView, wanted: Tree) -> None:
    """Fail unless the mount shows *wanted*, the lake gets it, and the next mount shows it."""
    assert (fault := difference(wanted, observe(mount.directory))) == "", fault
    drain(mount)
    check_lake(wanted, view)
    mount.remount()
    assert (fault := difference(wanted, observe(mount.directory))) == "", fault


@contextmanager
def performing(
    mount: LiveMount, view: LakeView, seed: int, count: int, *tops: str
) -> Iterator[list[Running]]:
    """Perform a script in each of the directories *tops* ("": the root) at the same time.

    When the block ends, fails unless they all come through, and what they made is in the lake
    and nothing torn was ever there.
    """
    stories = [Story(script(seed, count, top)) for top in tops]
    final = {path: body for story in stories for path, body in story.states[-1].items()}
    with LakeWatch(view) as watch, ExitStack() as all_of_them:
        scripts = [all_of_them.enter_context(running(mount.directory, seed, count, top)) for top in tops]
        yield scripts
        failed = [line for performed in scripts for line in performed.finish() if line.event == "failed"]
        assert failed == []
        until(lambda: known_pids(mount), "all processes are there again")
        check_through_to_the_lake(mount, view, final)
        assert watch.torn(set[str]().union(*(story.versions() for story in stories))) == set()
    assert "Traceback" not in mount.log()


@pytest.mark.parametrize(("workers", "tops"), [(0, [""]), (1, [""]), (3, ["a", "b", "c"])], ids=str)
def test_scripts_of_changes_do_what_they_say_and_reach_the_lake(
    mounting: Mounting, folder: Folder, workers: int, tops: list[str]
) -> None:
    mount = mounting.mount(folder.url, f"--workers={workers}", *OPTIONS)
    with performing(mount, FolderView(folder), workers, 2 * COUNT, *tops):
        pass


@pytest.mark.parametrize(("role", "seed"), [("workers", 1), ("mover", 2), ("both", 3)])
def test_killed_workers_and_movers_fail_no_operation_and_lose_nothing(
    mounting: Mounting, folder: Folder, role: str, seed: int
) -> None:
    mount, roll = mounting.mount(folder.url, *OPTIONS), random.Random(seed)
    roles = ["workers", "mover"] if role == "both" else [role]
    with performing(mount, FolderView(folder), seed, 2 * COUNT, "a", "b") as (performed, _):
        for line in chosen_lines(Story(script(seed, 2 * COUNT, "a")), seed, points(few=5)):
            pids = until(lambda: known_pids(mount), "all processes are there", TIMEOUT_S)
            performed.wait_for(line, TIMEOUT_S)
            kill_each([roll.choice(pids[roll.choice(roles)])])


def test_without_the_supervisor_changes_go_on_and_the_next_mount_has_them(
    mounting: Mounting, folder: Folder
) -> None:
    story, view = Story(script(4, COUNT)), FolderView(folder)
    mount = mounting.mount(folder.url, *OPTIONS)
    with running(mount.directory, 4, COUNT) as performed:
        performed.wait_for(chosen_lines(story, 4, 1)[0])
        kill_each([mount.supervisor])
        told = performed.finish()
    assert [line for line in told if line.event == "failed"] == []
    mount.unmount()
    mount.mount()
    check_through_to_the_lake(mount, view, story.states[-1])


def test_after_the_death_of_all_the_next_mount_has_what_had_returned_and_sends_it_once(
    mounting: Mounting, folder: Folder
) -> None:
    """Every time a directory more: what earlier crashes left stays as it was."""
    view, kept, versions = FolderView(folder), Tree(), set[str]()
    mount = mounting.mount(folder.url, *OPTIONS)
    with LakeWatch(view) as watch:
        for point in range(points(few=5)):
            top = f"p{point}"
            story = Story(script(point, COUNT, top))
            versions |= story.versions()
            with running(mount.directory, point, COUNT, top) as performed:
                performed.wait_for(chosen_lines(story, point, 1)[0])
                mount.kill_all()
                told = performed.finish()
            unsent = note_lake(view)
            mount.unmount()
            mount.mount()
            found = observe(mount.directory)
            print(f"point {point}: after {told[-2:]}")
            assert (fault := story.fault_after_kill(told, below(found, top))) == "", fault
            others = {path: body for path, body in found.items() if path not in below(found, top)}
            assert (fault := difference(kept, others)) == "", fault
            kept = found
            # A file that was being written is then what its writer, who was cut off too, had got so far.
            versions |= {digest(body) for body in files(found).values()}
            drain(mount)
            assert bytes_sent(mount) <= 1.1 * unsent.bytes(found)
            check_lake(found, view)
            assert watch.torn(versions) == set()
    check_through_to_the_lake(mount, view, kept)
    assert "Traceback" not in mount.log()


def test_recovery_may_be_killed_and_begins_anew(mounting: Mounting, folder: Folder) -> None:
    """Nothing is sent before the first death: all of it must come through all of them."""
    story, view, roll = Story(script(5, COUNT)), FolderView(folder), random.Random(5)
    mount = mounting.mount(folder.url, "--no-read-only", "--upload-delay=3600", "--upload-open-delay=3600")
    with running(mount.directory, 5, COUNT) as performed:
        performed.finish()
    mount.crash()
    for _ in range(points(few=4)):
        with start(mount):
            until(lambda: processes_naming(mount.home), "it starts")
            time.sleep(roll.random() * 0.8)  # Where in the start it strikes is the seed's choice.
            mount.kill_all()
        for mountpoint in mounts_below(mount.home):
            detach(mountpoint)
    mount.mount()
    check_through_to_the_lake(mount, view, story.states[-1])


# --- Every call that changes the disk or answers a worker ----------------------------------------

# LMDB writes a commit with pwritev and pwrite64, the last of them the page that makes it valid; an answer
# leaves with sendto. A process that is killed at a call does not make it any more.
CALLS = (
    "pwrite64,pwritev,writev,fsync,fdatasync,msync,syncfs,link,linkat,rename,unlink,mkdir,ftruncate,sendto"
)


@contextmanager
def killed_at_call(pid: int, number: int, calls: str = CALLS) -> Iterator[subprocess.Popen[str]]:
    """Have the process killed when one of its threads begins its *number*th call of those from now on.

    The yielded strace ends with it; it lets go of the process at the end of the block.
    """
    options = ["-f", "-qq", "-o", os.devnull, "-e", f"inject={calls}:signal=SIGKILL:when={number}"]
    strace = subprocess.Popen(
        ["strace", *options, "-p", str(pid)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        until(lambda: is_traced(pid) or strace.poll() is not None, "strace has attached")
        yield strace
    finally:
        strace.terminate()
        strace.communicate()


def is_traced(pid: int) -> bool:
    """Return whether all threads are, or there is no such process any more."""
    try:
        status = [task.joinpath("status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return True
    return all("TracerPid:\t0\n" not in text for text in status)


@pytest.mark.parametrize("numbers", batches(few=6, most=40), ids=str)
@pytest.mark.parametrize("role", ["mover", "workers"])
def test_a_process_that_dies_at_any_call_that_leaves_a_trace_loses_nothing(
    mounting: Mounting, folder: Folder, role: str, numbers: list[int]
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    mount, roll, deaths = mounting.mount(folder.url, *OPTIONS), random.Random(10), 0
    with performing(mount, FolderView(folder), numbers[0], 4 * COUNT, "") as (performed,):
        for number in numbers:
            pid = roll.choice(until(lambda: known_pids(mount), "all processes are there")[role])
            with killed_at_call(pid, number) as strace:
                until(lambda: strace.poll() is not None or not performed.is_going_on, "it dies")
                deaths += performed.is_going_on
        assert deaths > 0
