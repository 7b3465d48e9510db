"""Runs scripts of file operations on a mount, kills what serves it, and watches the lake meanwhile.

The number of crash points of each kind is POINTS: a few, unless the environment variable CRASH_POINTS says
more. The long form, some minutes for each kind:

    CRASH_POINTS=50 python -m pytest tests/test_70_crash_processes.py tests/test_71_power_loss.py \
        tests/test_72_lake_faults_write.py
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cache import control
from tests.crash_model import Told, difference
from tests.crash_script import Tree, digest
from tests.mounting import Folder, LiveMount, is_alive, sluice
from tools.servers import SeaweedServer

POINTS = int(os.environ.get("CRASH_POINTS", "0"))
TIMEOUT_S = 120 + 30 * POINTS  # A process that dies again and again is replaced after 5 s.
LAKES_OWN = ".sluice-lake"  # The directory lake's lock, uploads and files on their way in.


def points(few: int) -> int:
    """Return how many crash points to try: *few*, or what CRASH_POINTS says."""
    return POINTS or few


def batches(few: int, most: int) -> list[list[int]]:
    """Return which calls of a process to strike at, in batches for one script each.

    *few* between 1 and *most*; in the long form each of the first CRASH_POINTS.
    """
    if not POINTS:
        return [random.Random(few).sample(range(1, most), few)]
    return [list(range(first, min(first + 10, POINTS + 1))) for first in range(1, POINTS + 1, 10)]


class Running:
    """A process that performs a script below *root*. `told` grows with what it says."""

    def __init__(self, root: Path, seed: int, count: int, top: str = "") -> None:
        self.told: list[Told] = []
        self._news = threading.Condition()
        self._ended = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash_script", str(root), str(seed), str(count), top],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def wait_for(self, lines: int, within_s: float = 60.0) -> bool:
        """Wait until it has told so many lines, or has ended; return whether it told them."""
        deadline_s = time.monotonic() + within_s
        with self._news:
            while len(self.told) < lines and not self._ended:
                assert self._news.wait(deadline_s - time.monotonic()), f"stuck after {self.told[-1:]}"
            return len(self.told) >= lines

    @property
    def is_going_on(self) -> bool:
        return not self._ended

    def finish(self, within_s: float = 60.0) -> list[Told]:
        """Wait for its end, whether it came through or failed; return all that it told.

        Fails when nothing more is told for *within_s*.
        """
        told = -1
        while self._listener.is_alive() and told < len(self.told):
            told = len(self.told)
            self._listener.join(within_s)
        assert not self._listener.is_alive(), f"stuck after {self.told[-1:]}"
        self._process.wait()
        errors = self._process.stderr.read().decode() if self._process.stderr else ""
        assert errors == "", errors
        return self.told

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self.told.append(Told(**json.loads(line)))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


@contextmanager
def running(root: Path, seed: int, count: int, top: str = "") -> Iterator[Running]:
    performed = Running(root, seed, count, top)
    try:
        yield performed
    finally:
        performed.end()


# --- The lake, seen by another client ------------------------------------------------------------


class LakeView(Protocol):
    def stamps(self) -> dict[str, object]:
        """Return, by key, what changes whenever the object does."""

    def body(self, key: str) -> bytes | None:
        """Return the object, None if it is gone."""

    def part_bytes(self) -> int:
        """Return how many bytes of unfinished multipart uploads it has."""


class FolderView:
    """A directory lake, read as a directory."""

    def __init__(self, folder: Folder) -> None:
        self._root = folder.path

    def stamps(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for directory, folders, names in os.walk(self._root):
            folders[:] = [name for name in folders if name != LAKES_OWN]
            for path in (Path(directory, name) for name in names):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    key = str(path.relative_to(self._root))
                    found[key] = (status.st_ino, status.st_mtime_ns, status.st_size)
        return found

    def body(self, key: str) -> bytes | None:
        try:
            return (self._root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def part_bytes(self) -> int:
        parts = (self._root / LAKES_OWN).glob("uploads/*/*")
        return sum(part.stat().st_size for part in parts if part.suffix != ".json")


class BucketView:
    """A prefix of a bucket, through boto3."""

    def __init__(self, server: SeaweedServer, bucket: str, prefix: str) -> None:
        self._client, self._bucket, self._prefix = server.client(), bucket, f"{prefix}/"

    def stamps(self) -> dict[str, object]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix
        )
        rows = [row for page in pages for row in page.get("Contents", ())]
        return {
            row["Key"].removeprefix(self._prefix): row["ETag"] for row in rows if not row["Key"].endswith("/")
        }

    def body(self, key: str) -> bytes | None:
        try:
            found = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
        except self._client.exceptions.NoSuchKey:
            return None
        return bytes(found["Body"].read())

    def part_bytes(self) -> int:
        uploads = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=self._prefix)
        total = 0
        for upload in uploads.get("Uploads", ()):
            parts = self._client.list_parts(
                Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )
            total += sum(part["Size"] for part in parts.get("Parts", ()))
        return total


def files_of_lake(view: LakeView) -> Tree:
    """Return all objects. Directories are not among them."""
    bodies = {key: view.body(key) for key in view.stamps()}
    return {key: body for key, body in bodies.items() if body is not None}


class LakeWatch:
    """Looks at the lake all the time and notes each version of each object that it finds there."""

    def __init__(self, view: LakeView) -> None:
        self._view = view
        self._known: dict[str, object] = {}
        self.seen: set[tuple[str, str]] = set()  # Key and digest.
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> LakeWatch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def torn(self, versions: set[str]) -> set[tuple[str, str]]:
        """Look once more; return what was seen at any time and whose digest is none of *versions*.

        Under which key does not count: what is moved with its directory may have another successor there
        already. In the end the lake is compared key by key.
        """
        self._look()
        return {(key, content) for key, content in self.seen if content not in versions}

    def _run(self) -> None:
        while not self._stop.wait(0.03):
            with suppress(Exception):  # A server that is down or busy: it is looked at again soon.
                self._look()

    def _look(self) -> None:
        for key, stamp in self._view.stamps().items():
            if self._known.get(key) == stamp:
                continue
            body = self._view.body(key)
            if body is not None and self._view.stamps().get(key) == stamp:
                self.seen.add((key, digest(body)))
                self._known[key] = stamp


# --- What the mount says -------------------------------------------------------------------------


def drain(mount: LiveMount) -> None:
    """Wait until the lake has everything."""
    done = sluice("sync", mount.directory)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    queue = control.call(mount.directory, "queue")
    assert queue["entries"] == [], queue


def bytes_sent(mount: LiveMount) -> int:
    """Return what this mover has sent so far."""
    return int(mount.status()["lake_io"]["bytes_sent"])


@dataclass(frozen=True)
class Unsent:
    """What the lake had at some moment, to tell what was left to send."""

    had: Tree
    part_bytes: int

    def bytes(self, tree: Tree) -> int:
        """Return how much of the files of *tree* the lake had not."""
        missing = (body for path, body in tree.items() if body is not None and self.had.get(path) != body)
        return max(0, sum(map(len, missing)) - self.part_bytes)


def note_lake(view: LakeView) -> Unsent:
    return Unsent(files_of_lake(view), view.part_bytes())


def below(tree: Tree, top: str) -> Tree:
    """Return what is at *top* or below it."""
    return {path: body for path, body in tree.items() if path == top or path.startswith(f"{top}/")}


def files(tree: Tree) -> Tree:
    return {path: body for path, body in tree.items() if body is not None}


def check_lake(tree: Tree, view: LakeView) -> None:
    """Fail unless the lake has the files of *tree*, and no others."""
    assert (fault := difference(files(tree), files_of_lake(view))) == "", fault


def start(mount: LiveMount) -> subprocess.Popen[bytes]:
    """Start what `mount.mount()` runs, and don't wait for it."""
    command = [*mount.program, "mount", mount._lake, str(mount.directory), *mount._options]
    mount.directory.mkdir(exist_ok=True)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def known_pids(mount: LiveMount) -> dict[str, list[int]]:
    """Return the processes by role once all are alive; {} while one is being replaced."""
    try:
        pids: dict[str, list[int]] = mount.pids()
    except Exception:  # Between two movers nobody answers.
        return {}
    return pids if all(is_alive(pid) for role in pids.values() for pid in role) else {}
