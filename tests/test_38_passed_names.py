"""Names that inodes had: a reader of a directory goes on where it was, whatever happened to that entry."""

from __future__ import annotations

import os
import random
from pathlib import Path

import msgspec
import pytest

from cache import passed_names
from cache.index import Index
from cache.index_writer import IndexWriter
from cache.model import KIND_FILE, ROOT_INODE, Inode
from cache.passed_names import PassedNames, cookie_of, inode_of_cookie
from cache.policy.freshness import Freshness
from cache.records import Node
from fusefs.namespace import Namespace


def test_a_cookie_is_a_positive_offset_that_names_an_inode_under_one_name() -> None:
    for inode in (2, 7, 1 << 39):
        cookies = [cookie_of(inode, name) for name in (b"a", b"b", b"n" * 255)]
        assert len(set(cookies)) == 3
        for cookie in cookies:
            assert 0 < cookie < 1 << 63 and inode_of_cookie(cookie) == inode


def test_what_was_lost_is_known_and_nothing_else() -> None:
    passed = PassedNames()
    names = [(7, b"first"), (8, b"n" * 255), (7, b"second"), (9, b"\xff")]
    passed.note(names)
    for inode, name in names:
        assert passed.name_of(cookie_of(inode, name)) == name
    assert passed.name_of(cookie_of(7, b"third")) is None
    assert passed.name_of(cookie_of(10, b"first")) is None


def test_a_cookie_is_not_found_between_two_others() -> None:
    """Its eight bytes may stand across two cookies."""
    passed = PassedNames()
    roll = random.Random(38)
    passed.note((roll.randrange(1, 1 << 40), b"%d" % number) for number in range(100))
    raw = bytes(passed._cookies[: 8 * 100])
    for at in range(1, 8 * 99):
        if at % 8:
            assert passed.name_of(int.from_bytes(raw[at : at + 8], "little")) is None


def test_the_latest_names_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passed_names, "NAMES", 4)
    passed = PassedNames()
    for inode in range(1, 11):
        passed.note([(inode, b"%d" % inode)])
    assert [passed.name_of(cookie_of(inode, b"%d" % inode)) for inode in range(1, 11)] == [
        *[None] * 6,
        b"7",
        b"8",
        b"9",
        b"10",
    ]


def test_other_processes_see_what_is_noted() -> None:
    passed = PassedNames()
    if not (pid := os.fork()):
        passed.note([(7, b"name")])
        os._exit(0)
    os.waitpid(pid, 0)
    assert passed.name_of(cookie_of(7, b"name")) == b"name"
    passed.note([(8, b"other")])  # As the next mover would: behind what is there.
    assert passed.name_of(cookie_of(7, b"name")) == b"name"


@pytest.mark.parametrize("seed", range(10))
def test_who_reads_a_directory_meets_what_stays_once_and_in_order(tmp_path: Path, seed: int) -> None:
    """Whatever else is renamed and removed between two pieces, the entry that came last among it."""
    roll, passed, index = random.Random(seed), PassedNames(), Index(tmp_path)
    with index.write() as w:
        w.add_root()
        for number in range(300):
            w.attach(Node(ROOT_INODE, b"%03d" % number, KIND_FILE))
    namespace = Namespace(index, None, Freshness(60.0, False), passed)  # type: ignore[arg-type]
    stays = {b"%03d" % number for number in range(0, 300, 7)}
    met: list[bytes] = []
    cookie, last = 0, None
    while piece := namespace.entries(ROOT_INODE, cookie, 10):
        met += [entry.node.name for entry in piece]
        last = roll.choice(piece)  # The kernel may go on behind any of them.
        met = met[: len(met) - len(piece) + piece.index(last) + 1]
        cookie = cookie_of(last.inode, last.node.name)
        victims = [last, *roll.sample(namespace.entries(ROOT_INODE, 0, 1000), 3)]
        with index.write() as w:
            for inode, node in {entry.inode: entry.node for entry in victims}.items():
                if node.name not in stays:
                    change(w, roll, Inode(inode), node)
            passed.note(w.lost_names)
    index.close()
    kept = [name for name in met if name in stays]
    assert kept == sorted(stays), f"seed {seed}"
    assert met == sorted(met), "what was passed comes again"


def change(w: IndexWriter, roll: random.Random, inode: Inode, node: Node) -> None:
    if roll.random() < 0.5:
        w.detach(node.parent, node.name)
        w.forget(inode)
    else:
        w.move(
            inode,
            msgspec.structs.replace(node, name=b"%03d.%d" % (roll.randrange(300), roll.getrandbits(60))),
        )
