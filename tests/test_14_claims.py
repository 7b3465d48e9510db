"""Which pending operation goes before which: against the definition, and in few steps."""

from __future__ import annotations

import random
import stat
from collections.abc import Iterator
from typing import cast

import pytest

from cache.index_writer import IndexWriter
from cache.keys import Claims, KeyTree
from cache.pending import Delete, Mark, Move, Pending, PendingTable, Put, path_of, touched_keys, touched_trees
from cache.records import Attributes

ATTRIBUTES = Attributes(0o644, 1, 1, 0, 0)
ROWS_MAX = 40


class NoWriter:
    """Takes what would go to the index."""

    def put_pending(self, seq: int, packed: bytes) -> None:
        pass

    def remove_pending(self, seq: int) -> None:
        pass


WRITER = cast(IndexWriter, NoWriter())


def put(path: bytes) -> Put:
    return Put(path, 1, stat.S_IFREG, 1, "", ATTRIBUTES)


def random_path(roll: random.Random) -> bytes:
    return b"/".join(roll.choice([b"a", b"b", b"aa"]) for _ in range(roll.randint(1, 4)))


def random_row(roll: random.Random) -> Pending:
    path, other = random_path(roll), random_path(roll)
    return roll.choice(
        [
            put(path),
            Mark(path, 1),
            Delete(path),
            Delete(path + b"/"),
            Move(path, other, 1, stat.S_IFREG),
            Move(path + b"/", other, 1, stat.S_IFDIR),
        ]
    )


def meet(key: bytes, trees: tuple[bytes, ...], other: bytes, other_trees: tuple[bytes, ...]) -> bool:
    """A file is in the way of a directory of its name, and of what is below that."""
    if key.rstrip(b"/") == other.rstrip(b"/"):
        return True
    if (other in other_trees or not other.endswith(b"/")) and key.startswith(other.rstrip(b"/") + b"/"):
        return True
    return (key in trees or not key.endswith(b"/")) and other.startswith(key.rstrip(b"/") + b"/")


def conflict(row: Pending, other: Pending) -> bool:
    trees, other_trees = touched_trees(row), touched_trees(other)
    return any(meet(a, trees, b, other_trees) for a in touched_keys(row) for b in touched_keys(other))


@pytest.mark.parametrize("seed", range(20))
def test_an_operation_waits_for_exactly_those_that_touch_its_place(seed: int) -> None:
    roll, table, running = random.Random(seed), PendingTable(), dict[int, Pending]()
    for _ in range(300):
        seq = roll.choice([*table.rows, None])
        if seq is None or len(table.rows) < ROWS_MAX // 2:
            table.add(WRITER, random_row(roll))
        elif roll.random() < 0.3:
            table.replace(WRITER, seq, random_row(roll))
        elif roll.random() < 0.3 and seq not in running:
            running[seq] = table.rows[seq]
            table.running.begin(seq, table.rows[seq])
        elif running and roll.random() < 0.5:
            table.running.end(ended := roll.choice(list(running)))
            del running[ended]
        elif len(table.rows) > ROWS_MAX // 2:
            table.remove(WRITER, seq)
        check(table, running, random_path(roll))


def check(table: PendingTable, running: dict[int, Pending], path: bytes) -> None:
    assert dict(table.running) == {seq: touched_keys(row) for seq, row in running.items()}
    for seq, row in table.rows.items():
        before = {other for other, earlier in table.rows.items() if other < seq and conflict(row, earlier)}
        before |= {other for other, begun in running.items() if other != seq and conflict(row, begun)}
        assert set(table.blockers(seq)) == before and table.blocked(seq) == bool(before)
    placed = {seq: found for seq, row in table.rows.items() if (found := path_of(row)) is not None}
    below = sorted(seq for seq, found in placed.items() if found.startswith(path + b"/"))
    assert [seq for seq, _ in table.below(path)] == below
    assert table.keeps(path) == bool(below or path in placed.values())
    for key in (path, path + b"/"):
        later = [row for seq, row in table.rows.items() if seq > ROWS_MAX]
        later += [row for seq, row in running.items() if seq != ROWS_MAX]
        assert table.touched_after(ROWS_MAX, key) == any(touches(row, key) for row in later)


def touches(row: Pending, key: bytes) -> bool:
    tree = (key,) if key.endswith(b"/") else ()
    return any(meet(key, tree, other, touched_trees(row)) for other in touched_keys(row))


def test_markers_of_nested_directories_keep_nobody_waiting() -> None:
    table = PendingTable()
    rows = [Mark(b"d", 1), Mark(b"d/e", 2), put(b"d/f"), put(b"d/e/g")]
    seqs = [table.add(WRITER, row) for row in rows]
    for seq in seqs[:2]:
        table.running.begin(seq, table.rows[seq])
    assert not any(map(table.blocked, seqs))
    assert table.blocked(table.add(WRITER, Move(b"d/", b"x", 1, stat.S_IFDIR)))


def removal() -> list[Pending]:
    """`rm -r` of 200 directories with 50 files each."""
    rows: list[Pending] = []
    for directory in range(200):
        rows += [Delete(b"t/d%d/f%d" % (directory, file)) for file in range(50)]
        rows.append(Delete(b"t/d%d/" % directory))
    return [*rows, Delete(b"t/")]


def uploads() -> list[Pending]:
    files = [put(b"t/d%d/f%d" % (number % 200, number)) for number in range(10_000)]
    return [*(Mark(b"t/d%d" % number, number) for number in range(200)), *files]


@pytest.mark.parametrize("rows", [removal(), uploads()], ids=["removal", "uploads"])
def test_what_many_operations_wait_for_is_found_in_few_steps(
    rows: list[Pending], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, on, below = 0, Claims.on, KeyTree.below

    def counted_on(self: Claims, key: bytes, *, whole_tree: bool) -> Iterator[int]:
        nonlocal steps
        for found in on(self, key, whole_tree=whole_tree):
            steps += 1
            yield found

    def counted_below(self: KeyTree, prefix: bytes) -> Iterator[int]:
        nonlocal steps
        for found in below(self, prefix):
            steps += 1
            yield found

    monkeypatch.setattr(Claims, "on", counted_on)
    monkeypatch.setattr(KeyTree, "below", counted_below)
    table = PendingTable()
    left = [table.add(WRITER, row) for row in rows]
    looks = 0
    while left:
        looks += len(left)
        begun = [seq for seq in left if not table.blocked(seq)][:1000]
        for seq in begun:
            table.running.begin(seq, table.rows[seq])
        assert not any(table.blocked(seq) for seq in begun[:50])
        for seq in begun:
            table.running.end(seq)
            table.remove(WRITER, seq)
        left = [seq for seq in left if seq in table.rows]
    assert steps < 5 * looks
