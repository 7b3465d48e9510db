"""Recovery that is killed at any of its steps, and run again."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from cache.errors import SluiceError, UsageError
from cache.journal import Journal
from cache.model import (
    KIND_DIRECTORY,
    KIND_FIFO,
    KIND_FILE,
)
from cache.pending import (
    Delete,
    Local,
    Mark,
    Move,
    Orphan,
    Pending,
    Put,
    Restate,
)
from tests.recovering import (
    ATTRIBUTES,
    OTHERS,
    Home,
    put,
    replace,
    sealed,
    without_inodes,
)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    home.stop()


EVERYTHING: dict[int, Pending] = {
    1: sealed(b"d/sealed", 1),
    2: put(b"d/synced", 2, synced_bytes=4),
    3: put(b"d/never", 3),
    4: put(b"d/never-empty", 4),
    5: Orphan(600, 5),
    6: Mark(b"m", 601, ATTRIBUTES),
    7: Move(b"t/", b"moved", 602, KIND_DIRECTORY),
    8: Delete(b"x", 603),
    9: Local(b"fifo", 604, KIND_FIFO, OTHERS),
    10: Restate(b"far", 605, KIND_FILE, OTHERS, 5),
    11: sealed(b"d/missing", 0x99),
}


class Killed(Exception):
    """Stands for SIGKILL: raised in the place of a step."""


def fill(home: Home) -> None:
    for number in (1, 2, 3, 5, 6):
        home.stage(number)
    home.stage(4, b"")
    home.stage(7)
    os.link(home.staging.path(7), home.path / "adopted")
    home.write_journal(EVERYTHING)


STEPS = (
    "cache.staging.os.truncate",
    "cache.staging.os.utime",
    "cache.staging.os.rename",
    "cache.staging.os.unlink",
    "cache.staging.os.fsync",
    "cache.staging.os.fdatasync",
    "cache.recovery.Planter.plant",
    "cache.recovery.IndexWriter.set_meta",
    "cache.index.Index.write",
    "cache.journal.Journal.write",
    "cache.pending.PendingTable.load",
)


class Killer:
    """Counts the steps of a recovery; at step *at* it ends, before or after that step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, *, after: bool) -> None:
        self.count = 0
        for name in STEPS:
            owner, attribute = _resolve(name)
            monkeypatch.setattr(owner, attribute, self._wrapped(getattr(owner, attribute), at, after))

    def _wrapped(self, step: object, at: int, after: bool) -> object:
        assert callable(step)

        def call(*args: object, **keywords: object) -> object:
            self.count += 1
            if self.count == at and not after:
                raise Killed
            result = step(*args, **keywords)
            if self.count == at and after:
                raise Killed
            return result

        return call


def _resolve(name: str) -> tuple[object, str]:
    parts = name.split(".")
    owner: object = importlib.import_module(".".join(parts[:2]))
    for part in parts[2:-1]:
        owner = getattr(owner, part)
    return owner, parts[-1]


def outcome(home: Home) -> object:
    nodes = {
        path: replace(node, mtime_ns=0) if path in ("d/synced", "d/missing") else node
        for path, node in home.tree().items()
    }
    rows = {
        seq: replace(row, sealed_at_s=0.0, mtime_ns=0) if isinstance(row, Put) else row
        for seq, row in without_inodes(home.rows()).items()
    }
    for seq, row in home.rows().items():
        if not isinstance(row, Delete | Orphan):
            assert home.node(os.fsdecode(row.path))[0] == row.inode, seq
    return nodes, rows, home.staged(), home.lost(), (home.path / "adopted").exists()


def steps_of_a_recovery(path: Path) -> int:
    home = Home(path)
    fill(home)
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch, 0, after=False)
        home.start()
    home.stop()
    return killer.count


@pytest.mark.parametrize("power", [True, False], ids=["killed", "power lost too"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_step_and_run_again_it_ends_the_same(tmp_path: Path, after: bool, power: bool) -> None:
    """Twice in a row: the second recovery is killed too, at the same step."""
    steps = steps_of_a_recovery(tmp_path / "count")
    whole = Home(tmp_path / "whole")
    fill(whole)
    lines = whole.start().read_only_because
    expected = outcome(whole)
    whole.stop()
    assert steps > 20
    for at in range(1, steps + 1):
        home = Home(tmp_path / f"at{at}")
        fill(home)
        for _ in range(2):
            with pytest.MonkeyPatch.context() as patch:
                Killer(patch, at, after=after)
                try:
                    home.start()
                except (Killed, SluiceError):
                    pass
            home.stop()
            if not power:
                home.lose_power()
        found = home.start().read_only_because
        assert outcome(home) == expected, at
        assert len(found) == len(lines) == 1
        home.stop()


def test_recovering_again_without_power_changes_nothing(home: Home) -> None:
    fill(home)
    home.start()
    before = outcome(home)
    home.restart_without_power()
    assert outcome(home) == before


def test_a_journal_of_another_version_stops_recovery_before_anything_is_touched(home: Home) -> None:
    fill(home)
    with lmdb.open(str(home.path / "journal.lmdb"), max_dbs=2) as env:
        meta = env.open_db(b"meta")
        with env.begin(write=True, db=meta) as txn:
            txn.put(b"format", b"sluicefs-journal 9")
    before = home.staged()
    with pytest.raises(UsageError, match="sluicefs-journal 9"):
        Journal(home.path, "store")
    assert home.staged() == before and home.lost() == {}
