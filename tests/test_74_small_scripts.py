"""Many short scripts over few names, with uploads under way in between: the lake ends up with what they made.

A short script hits the same name again and again while the lake has, gets, or loses what was under it; that
finds what long scripts over many names rarely meet. Every script has a directory of its own.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash_driver import FolderView, below, drain, files, files_of_lake, known_pids
from tests.crash_model import difference, observe
from tests.crash_script import MakeDirectory, Operation, Remove, Rename, Tree, Write
from tests.mounting import Folder, LiveMount, Mounting, kill_each, until

CASES = int(os.environ.get("SMALL_SCRIPTS", "60"))  # Some hundreds are the long form.
STEPS, THREADS = 8, 6
OPTIONS = ("--no-read-only", "--upload-delay=0.03", "--upload-open-delay=3600")
PAUSES_S = (0.0, 0.0, 0.02, 0.06, 0.15)  # Shorter and longer than the quiet time and an upload.

Step = tuple[float, Operation]


def steps(seed: int, top: str) -> list[Step]:
    """Return pauses and operations, each of which must succeed after the ones before it."""
    roll, tree, drawn = random.Random(f"{seed} {top}"), Tree({top: None}), list[Step]()
    while len(drawn) < STEPS:
        operation = _draw(roll, tree, top)
        if operation is not None:
            operation.apply(tree)
            drawn.append((roll.choice(PAUSES_S), operation))
    return drawn


def _draw(roll: random.Random, tree: Tree, top: str) -> Operation | None:
    folders = [path for path, body in tree.items() if body is None and path != top]
    present = [path for path, body in tree.items() if body is not None]
    file = f"{roll.choice([top, *folders])}/{roll.choice('abc')}"
    folder = f"{roll.choice([top, *folders])}/{roll.choice('de')}"
    some = roll.choice(present) if present else None
    match roll.choice(["write", "write", "write", "move", "move", "move", "remove", "make", "move folder"]):
        case "write":
            return Write(file, "wb", 0, (roll.choice([20, 3000]), roll.randrange(1 << 30)), False)
        case "move" if some not in (None, file):
            return Rename(str(some), file)
        case "remove" if some is not None:
            return Remove(some)
        case "make" if folder not in tree:
            return MakeDirectory(folder)
        case "move folder" if folders and folder not in tree:
            moved = roll.choice(folders)
            return None if folder.startswith(f"{moved}/") else Rename(moved, folder)
    return None


def perform(root: Path, tops: Iterator[tuple[str, list[Step]]], failures: list[str]) -> None:
    for top, script in tops:
        (root / top).mkdir()
        for pause_s, operation in script:
            time.sleep(pause_s)
            try:
                operation.perform(root, lambda event: None)
            except OSError as error:
                failures.append(f"{top}: {operation}: {error}")
                break


class Locked:
    """An iterator that several threads may take from."""

    def __init__(self, scripts: dict[str, list[Step]]) -> None:
        self._items, self._lock = iter(scripts.items()), threading.Lock()

    def __iter__(self) -> Iterator[tuple[str, list[Step]]]:
        return self

    def __next__(self) -> tuple[str, list[Step]]:
        with self._lock:
            return next(self._items)


def told(top: str, script: list[Step], fault: str) -> str:
    """Return the script in short words, so that one can do it again by hand."""
    words = []
    for pause_s, operation in script:
        what = [type(operation).__name__.lower(), operation.path, getattr(operation, "target", "")]
        words.append((f"sleep {pause_s}; " if pause_s else "") + " ".join(what).replace(f"{top}/", ""))
    return f"{top}: {fault}\n    after: {'; '.join(words)}"


@pytest.mark.parametrize(("role", "seed"), [("", 1), ("mover", 2), ("workers", 3)])
def test_whatever_short_scripts_do_to_few_names_the_lake_has_what_they_made(
    mounting: Mounting, folder: Folder, role: str, seed: int
) -> None:
    mount, scripts = (
        mounting.mount(folder.url, *OPTIONS),
        {f"t{n}": steps(seed, f"t{n}") for n in range(CASES)},
    )
    tops, failures = Locked(scripts), list[str]()
    threads = [
        threading.Thread(target=perform, args=(mount.directory, tops, failures)) for _ in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    if role:
        kill_now_and_then(mount, role, seed, threads)
    for thread in threads:
        thread.join()
    assert failures == []
    until(lambda: known_pids(mount), "all processes are there")
    drain(mount)
    shown, stored = observe(mount.directory), files_of_lake(FolderView(folder))
    for top, script in scripts.items():
        wanted = Tree({top: None})
        for _, operation in script:
            operation.apply(wanted)
        if fault := difference(wanted, below(shown, top)):
            failures.append(told(top, script, f"the mount: {fault}"))
        if fault := difference(files(wanted), below(stored, top)):
            failures.append(told(top, script, f"the lake: {fault}"))
    assert failures == [], "\n".join(sorted(failures, key=len))
    assert "Traceback" not in mount.log()


def kill_now_and_then(mount: LiveMount, role: str, seed: int, threads: list[threading.Thread]) -> None:
    """A few times: a process that dies again and again soon after its start is only started anew later."""
    roll = random.Random(seed)
    for _ in range(4):
        time.sleep(roll.random())  # Where in the scripts it strikes is the seed's choice.
        if any(thread.is_alive() for thread in threads):
            kill_each([roll.choice(until(lambda: known_pids(mount), "all processes are there")[role])])
