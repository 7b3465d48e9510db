"""Random changes against a dictionary as the model, while the uploader sends what it may.

After each step the mount shows what the model says; in the end the lake does, and nothing besides.
"""

from __future__ import annotations

import math
import os
import random
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from cache.dispatching import UploadConfig
from cache.errors import NamespaceError
from cache.model import ROOT_INODE
from cache.policy.writeback import Backoff
from cache.records import DirectoryState
from cache.tree import RENAME_EXCHANGE, RENAME_NOREPLACE
from tests.changing import Files, objects
from tests.wiring import LAKES, Shared, WatchedDirectory, WatchedLake, open_cache, requests_carried_out

SEEDS = int(os.environ.get("SLUICE_MODEL_SEEDS", "12"))
FIRST_SEED = int(os.environ.get("SLUICE_MODEL_FIRST_SEED", "0"))
VERBOSE = "SLUICE_MODEL_VERBOSE" in os.environ
STEPS = 60
NAMES = ("a", "b", "c")
HELD = ("put", "copy", "delete")
_LIMIT_S = 60.0

Tree = dict[str, bytes | None]  # None: a directory.


class Refused(Exception):
    """POSIX refuses it."""


class Model:
    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def _need_parent(self, path: str) -> None:
        above = path.rpartition("/")[0]
        if above and self.tree.get(above, b"") is not None:
            raise Refused(path)

    def make(self, path: str, content: bytes | None) -> None:
        self._need_parent(path)
        if path in self.tree:
            raise Refused(path)
        self.tree[path] = content

    def write(self, path: str, content: bytes, *, append: bool) -> None:
        old = self.tree.get(path)
        if old is None:
            raise Refused(path)
        self.tree[path] = old + content if append else content

    def remove(self, path: str, *, directory: bool) -> None:
        if path not in self.tree or (self.tree[path] is None) != directory or self.below(path):
            raise Refused(path)
        del self.tree[path]

    def directories(self) -> list[str]:
        return sorted(path for path, content in self.tree.items() if content is None)

    def below(self, path: str) -> Tree:
        return {name: content for name, content in self.tree.items() if name.startswith(path + "/")}

    def rename(self, old: str, new: str, flags: int) -> None:
        self._need_parent(new)
        if old not in self.tree or (flags == RENAME_EXCHANGE and new not in self.tree):
            raise Refused(old)
        if old == new and flags != RENAME_NOREPLACE:
            return
        if (new + "/").startswith(old + "/") and self.tree[old] is None:
            raise Refused(new)
        if flags == RENAME_EXCHANGE:
            self._exchange(old, new)
            return
        if new in self.tree:
            if flags or (self.tree[old] is None) != (self.tree[new] is None) or self.below(new):
                raise Refused(new)
            del self.tree[new]
        self._move(old, new)

    def _exchange(self, old: str, new: str) -> None:
        if old.startswith(new + "/"):
            raise Refused(old)
        self._move(old, "\0")
        self._move(new, old)
        self._move("\0", new)

    def _move(self, old: str, new: str) -> None:
        for path in (old, *self.below(old)):
            self.tree[new + path[len(old) :]] = self.tree.pop(path)

    def objects(self) -> tuple[dict[str, bytes], set[str], set[str]]:
        """Return the files; the markers that must be there, and those that may be."""
        files = {path: content for path, content in self.tree.items() if content is not None}
        directories = {path for path, content in self.tree.items() if content is None}
        empty = {f"{path}/" for path in directories if not self.below(path)}
        return files, empty, {f"{path}/" for path in directories}


def is_file(content: bytes | None) -> bool:
    return content is not None


def is_directory(content: bytes | None) -> bool:
    return content is None


class Walk:
    """One random walk. Its steps are kept for the message of a failure."""

    def __init__(self, seed: int, files: Files, model: Model, lake: WatchedLake | WatchedDirectory) -> None:
        self.random = random.Random(seed)
        self.files = files
        self.model = model
        self.lake = lake
        self.steps: list[str] = []
        self.serial = 0

    def path(self, there: Callable[[bytes | None], bool] | None = None) -> str:
        """Return a path, mostly one that there is and whose content *there* likes."""
        liked = [path for path, content in sorted(self.model.tree.items()) if there and there(content)]
        if liked and self.random.random() < 0.9:
            return self.random.choice(liked)
        directories = [
            "",
            *(path + "/" for path, content in sorted(self.model.tree.items()) if content is None),
        ]
        return self.random.choice(directories) + self.random.choice(NAMES)

    def content(self) -> bytes:
        self.serial += 1
        return b"%d." % self.serial

    async def step(self) -> None:
        verbs: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (4, self.create),
            (3, self.mkdir),
            (3, self.write),
            (2, self.append),
            (4, self.unlink),
            (3, self.rmdir),
            (8, self.rename),
            (3, self.send_some),
            (2, self.hold),
            (1, self.expire),
        ]
        weights, calls = zip(*verbs, strict=True)
        await self.random.choices(calls, weights)[0]()
        if VERBOSE:
            table = self.files.cache.table
            self.steps += [f"    {seq} {row}" for seq, row in sorted(table.rows.items())]
            self.steps += [f"    running {table.running}"] if table.running else []
            self.steps += [f"    lake: {' '.join(objects(self.files.cache))}"]
        shown = await self.files.tree()
        assert shown == self.model.tree

    async def both(self, name: str, model: Callable[[], None], verb: Callable[[], Awaitable[object]]) -> None:
        """Do it to both; they agree on whether it is refused."""
        refused = done = False
        try:
            model()
        except Refused:
            refused = True
        self.steps.append(f"{name}{' refused' if refused else ''}")
        try:
            await verb()
            done = True
        except (NamespaceError, KeyError):
            pass
        assert done != refused, self.steps[-1]

    async def create(self) -> None:
        path, body = self.path(), self.content()
        await self.both(
            f"create {path} {body!r}",
            lambda: self.model.make(path, body),
            lambda: self.files.create(path, body),
        )

    async def mkdir(self) -> None:
        path = self.path()
        await self.both(f"mkdir {path}", lambda: self.model.make(path, None), lambda: self.files.mkdir(path))

    async def write(self) -> None:
        path, body = self.path(is_file), self.content()
        await self.both(
            f"write {path} {body!r}",
            lambda: self.model.write(path, body, append=False),
            lambda: self.files.write(path, body),
        )

    async def append(self) -> None:
        path, body = self.path(is_file), self.content()
        await self.both(
            f"append {path} {body!r}",
            lambda: self.model.write(path, body, append=True),
            lambda: self.files.append(path, body),
        )

    async def unlink(self) -> None:
        path = self.path(is_file)
        await self.both(
            f"unlink {path}",
            lambda: self.model.remove(path, directory=False),
            lambda: self.files.unlink(path),
        )

    async def rmdir(self) -> None:
        path = self.path(is_directory)
        await self.both(
            f"rmdir {path}", lambda: self.model.remove(path, directory=True), lambda: self.files.rmdir(path)
        )

    async def rename(self) -> None:
        old = self.path(self.random.choice((is_file, is_directory, is_directory)))
        flags = self.random.choice((0, 0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE))
        new = self.path(self.random.choice((None, None, is_file, is_directory)))
        if flags == RENAME_EXCHANGE:
            new = self.path(self.random.choice((is_file, is_directory)))
        await self.both(
            f"rename {old} {new} {flags}",
            lambda: self.model.rename(old, new, flags),
            lambda: self.files.rename(old, new, flags),
        )

    # The lake

    async def send_some(self) -> None:
        self.steps.append("send some")
        self.release()
        patience_s = self.random.choice((0.002, 0.01, 10.0))
        if self.files.cache.uploader is not None:
            with trio.move_on_after(patience_s):
                await self.files.cache.uploader.drain()

    async def hold(self) -> None:
        verb = self.random.choice(HELD)
        self.steps.append(f"hold {verb}")
        self.lake.gates.setdefault(verb, threading.Event())

    def release(self) -> None:
        for verb in HELD:
            gate = self.lake.gates.pop(verb, None)
            if gate is not None:
                gate.set()

    async def expire(self) -> None:
        """Have all directories listed again."""
        self.steps.append("expire")

        def expire(inode: int) -> None:
            with self.files.cache.index.write() as w:
                w.set_directory(inode, DirectoryState(1.0, 0, 1, 0.0, 1))

        for inode in [
            ROOT_INODE,
            *[await self.files.find(path) for path, body in self.model.tree.items() if body is None],
        ]:
            if self.files.cache.index.directory(inode) is not None:
                expire(inode)


def start() -> Tree:
    return {"a": None, "a/a": None, "a/a/b": b"aab", "a/b": b"ab", "b": b"b", "c": None, "c/a": b"ca"}


def config(seed: int) -> UploadConfig:
    """Every other walk renames and removes what its quiet time has kept from being sent."""
    delay_s = seed % 2 * 0.05
    return UploadConfig(delay_s=delay_s, open_delay_s=0.0, threads=4, cache_id="test", backoff=Backoff())


@pytest.mark.parametrize("kind", LAKES)
@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + SEEDS))
async def test_a_random_walk(tmp_path: Path, kind: str, seed: int) -> None:
    lake, model, steps = LAKES[kind](tmp_path / "lake"), Model(start()), list[str]()
    lake.fill({path: body for path, body in start().items() if body is not None})
    shared = Shared.make()
    try:
        with trio.fail_after(_LIMIT_S):
            for mover in range(3):
                async with open_cache(
                    tmp_path,
                    lake,
                    writable=True,
                    upload=config(seed),
                    shared=shared,
                    first=mover == 0,
                    lake_threads=40,
                ) as cache:
                    walk = Walk(seed * 3 + mover, Files(cache), model, lake)
                    walk.serial, walk.steps = mover * 1000, steps
                    for _ in range(STEPS // 3):
                        await walk.step()
                    walk.release()
                    if mover == 2:
                        assert cache.uploader is not None
                        await cache.uploader.drain()
                        check_lake(cache, model)
                        await walk.files.changes.forget_replaced(math.inf)
                        assert not cache.table.rows, cache.table.rows
                await requests_carried_out(cache)
                steps.append("the next mover")
    except BaseException:
        print("seed", seed, *steps, sep="\n  ")
        print("rows", *cache.table.rows.items(), "running", cache.table.running, sep="\n  ")
        print("queue", *cache.uploader.queue(), sep="\n  ")
        print("objects", *objects(cache).items(), sep="\n  ")
        raise


def check_lake(cache: object, model: Model) -> None:
    files, needed, allowed = model.objects()
    found = objects(cache)  # type: ignore[arg-type]
    assert {key: body for key, body in found.items() if not key.endswith("/")} == files
    markers = {key for key in found if key.endswith("/")}
    assert needed <= markers <= allowed
