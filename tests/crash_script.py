"""A script of file operations, drawn by a seed, and the trees that it passes through.

`python -m tests.crash_script DIRECTORY SEED COUNT TOP` performs it below DIRECTORY/TOP (TOP may be empty) and
tells on its standard output, one line each, what has begun and what has returned. `tests.crash_model` says
what a directory must look like then. No operation may fail if DIRECTORY is empty at the start.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

Tree = dict[str, bytes | None]  # By path; a directory has no content.
Tell = Callable[[str], None]
CHUNK_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Write:
    """*how*: "wb" (new or truncated), "ab" or "r+b" at *offset*; fsynced before the close if *synced*."""

    path: str
    how: str
    offset: int
    body: tuple[int, int]  # Size and seed.
    synced: bool

    def apply(self, tree: Tree) -> None:
        old = tree.get(self.path) or b""
        if self.how == "wb":
            tree[self.path] = self.content
        else:
            start = len(old) if self.how == "ab" else self.offset
            tree[self.path] = old[:start] + self.content + old[start + len(self.content) :]

    def perform(self, root: Path, tell: Tell) -> None:
        with (root / self.path).open(self.how, buffering=0) as file:
            if self.how == "r+b":
                file.seek(self.offset)
            for start in range(0, len(self.content), CHUNK_BYTES):
                _write_whole(file, self.content[start : start + CHUNK_BYTES])
                tell("part")
            if self.synced:
                os.fsync(file.fileno())
                tell("synced")

    @property
    def content(self) -> bytes:
        size, seed = self.body
        return random.Random(f"{size}/{seed}").randbytes(size)


@dataclass(frozen=True, slots=True)
class Rename:
    """Of a file, over whatever file is there, or of a directory to a name that is free."""

    path: str
    target: str

    def apply(self, tree: Tree) -> None:
        for old in [old for old in tree if old == self.path or old.startswith(f"{self.path}/")]:
            tree[self.target + old[len(self.path) :]] = tree.pop(old)

    def perform(self, root: Path, tell: Tell) -> None:
        (root / self.path).replace(root / self.target)


@dataclass(frozen=True, slots=True)
class Remove:
    path: str

    def apply(self, tree: Tree) -> None:
        del tree[self.path]

    def perform(self, root: Path, tell: Tell) -> None:
        if (root / self.path).is_dir():
            (root / self.path).rmdir()
        else:
            (root / self.path).unlink()


@dataclass(frozen=True, slots=True)
class MakeDirectory:
    path: str

    def apply(self, tree: Tree) -> None:
        tree[self.path] = None

    def perform(self, root: Path, tell: Tell) -> None:
        (root / self.path).mkdir()


@dataclass(frozen=True, slots=True)
class SyncDirectory:
    path: str

    def apply(self, tree: Tree) -> None:
        pass

    def perform(self, root: Path, tell: Tell) -> None:
        fd = os.open(root / self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        tell("synced")


Operation = Write | Rename | Remove | MakeDirectory | SyncDirectory


def _write_whole(file: FileIO, part: bytes) -> None:
    """Write on where a short write ended: a mount that dies within one has kept its first pages only."""
    rest = memoryview(part)
    while rest:
        rest = rest[file.write(rest) :]


def after(tree: Tree, operation: Operation) -> Tree:
    changed = dict(tree)
    operation.apply(changed)
    return changed


def digest(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=12).hexdigest()


# --- Drawing a script --------------------------------------------------------------------------


class Author:
    """Writes the script for *seed*. All paths are below *top*, a name or "" for the root."""

    def __init__(self, seed: int, top: str = "", size_max: int = 3 << 20) -> None:
        self._roll = random.Random(f"script {seed} {top}")
        self._top, self._size_max = top, size_max
        self._numbers = 0
        self.tree: Tree = {}

    def script(self, count: int) -> list[Operation]:
        """Return *count* operations, or a few more."""
        written: list[Operation] = [MakeDirectory(self._top)] if self._top else []
        self._take(written)
        while len(written) < count:
            verb = self._roll.choices(
                [self._create, self._checkpoint, self._change, self._move, self._remove, self._directory],
                [5, 4, 4, 3, 2, 2],
            )[0]
            operations = verb()
            self._take(operations)
            written += operations
        return written

    def _take(self, operations: list[Operation]) -> None:
        for operation in operations:
            operation.apply(self.tree)

    def _create(self) -> list[Operation]:
        return [Write(self._fresh(), "wb", 0, self._body(), self._roll.random() < 0.5)]

    def _checkpoint(self) -> list[Operation]:
        """As frameworks save: a temporary file, fsync, and a rename over the last one."""
        folder = self._folder()
        temporary, final = f"{folder}latest.tmp", f"{folder}latest"
        operations: list[Operation] = [
            Write(temporary, "wb", 0, self._body(), True),
            Rename(temporary, final),
        ]
        if self._roll.random() < 0.5:
            operations.append(SyncDirectory(folder.rstrip("/")))
        return operations

    def _change(self) -> list[Operation]:
        path = self._some(lambda body: body is not None)
        if path is None:
            return self._create()
        how = self._roll.choice(["wb", "ab", "r+b"])
        length = len(self.tree[path] or b"")
        return [Write(path, how, self._roll.randrange(length + 1), self._body(), self._roll.random() < 0.5)]

    def _move(self) -> list[Operation]:
        path = self._some(lambda body: True)
        if path is None:
            return []
        if self.tree[path] is None:
            target = self._fresh()
            return [] if target.startswith(f"{path}/") else [Rename(path, target)]
        other = self._some(lambda body: body is not None)
        if self._roll.random() < 0.5 or other is None or other == path:
            return [Rename(path, self._fresh())]
        return [Rename(path, other)]

    def _remove(self) -> list[Operation]:
        path = self._some(lambda body: True)
        if path is None:
            return []
        below = sorted((p for p in self.tree if p.startswith(f"{path}/")), reverse=True)
        return [Remove(p) for p in [*below, path]]

    def _directory(self) -> list[Operation]:
        return [MakeDirectory(self._fresh())]

    def _some(self, wanted: Callable[[bytes | None], bool]) -> str | None:
        paths = sorted(p for p, body in self.tree.items() if p != self._top and wanted(body))
        return self._roll.choice(paths) if paths else None

    def _folder(self) -> str:
        """Return a directory of the tree with a slash at its end, "" for the root."""
        folders = sorted(f"{p}/" for p, body in self.tree.items() if body is None and p != self._top)
        return self._roll.choice([self._top and f"{self._top}/", *folders])

    def _fresh(self) -> str:
        self._numbers += 1
        return f"{self._folder()}n{self._numbers}"

    def _body(self) -> tuple[int, int]:
        largest = self._roll.choice([10, 5000, 5000, 200_000, 200_000, self._size_max])
        return self._roll.randrange(largest), self._roll.randrange(1 << 30)


def script(seed: int, count: int, top: str = "") -> list[Operation]:
    return Author(seed, top).script(count)


def lines_told(operations: list[Operation]) -> int:
    """Return how many lines the script tells when nothing fails."""
    writes = [operation for operation in operations if isinstance(operation, Write)]
    synced = sum(write.synced for write in writes) + sum(isinstance(o, SyncDirectory) for o in operations)
    parts = sum(-(-write.body[0] // CHUNK_BYTES) for write in writes)
    return 2 * len(operations) + synced + parts


# --- Performing it -----------------------------------------------------------------------------


def perform(root: Path, operations: list[Operation]) -> int:
    """Perform them and tell of each; return 1 when one failed, which ends it."""
    for number, operation in enumerate(operations):

        def tell(event: str, number: int = number, **more: object) -> None:
            line = {"operation": number, "event": event, "at_ns": time.monotonic_ns(), **more}
            os.write(1, json.dumps(line).encode() + b"\n")

        tell("begun")
        try:
            operation.perform(root, tell)
        except OSError as error:
            tell("failed", errno=error.errno)
            return 1
        tell("returned")
    return 0


def main(root: str, seed: str, count: str, top: str) -> int:
    return perform(Path(root), script(int(seed), int(count), top))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:5]))
