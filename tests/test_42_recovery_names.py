"""The namespace that recovery makes anew from the rows of the journal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.index import Index
from cache.model import (
    KIND_DIRECTORY,
    KIND_FIFO,
    KIND_FILE,
    KIND_SYMLINK,
    ROOT_INODE,
    ObjectVersion,
)
from cache.pending import (
    CONFLICT,
    SEALED,
    Delete,
    Local,
    Mark,
    Move,
    Pending,
    Put,
    Restate,
)
from cache.records import Node
from tests.recovering import (
    ATTRIBUTES,
    LINK,
    OTHERS,
    Home,
    perhaps_sent,
    replace,
    sealed,
    without_inodes,
)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    home.stop()


# The namespace that is rebuilt


def test_directories_symlinks_and_fifos_are_there_again(home: Home) -> None:
    rows: dict[int, Pending] = {
        1: Mark(b"d/e", 700, ATTRIBUTES),
        2: Mark(b"plain", 701),
        3: Put(b"d/link", 702, KIND_SYMLINK, 0, "", LINK, SEALED),
        4: Local(b"d/fifo", 703, KIND_FIFO, OTHERS),
        5: Delete(b"d/gone", 704),
    }
    home.write_journal(rows)
    assert home.start().read_only_because == []
    found = home.rows()
    assert without_inodes(found) == perhaps_sent(rows) and found[5].inode == 0
    assert home.node("d/e") == (found[1].inode, replace(home.node("d/e")[1], attributes=ATTRIBUTES))
    assert home.node("d/link") == (found[3].inode, replace(home.node("d/link")[1], attributes=LINK))
    assert home.node("d/link")[1].kind == KIND_SYMLINK
    fifo = home.node("d/fifo")[1]
    assert (fifo.kind, fifo.attributes, home.node("d/fifo")[0]) == (KIND_FIFO, OTHERS, found[4].inode)
    assert {path for path, node in home.tree().items() if node.is_directory} == {"d", "d/e", "plain"}


def test_what_was_moved_is_shown_under_its_new_path_with_its_origin(home: Home) -> None:
    version = ObjectVersion("old/f", '"e"', 9)
    rows: dict[int, Pending] = {
        1: Move(b"tree/", b"new/tree", 700, KIND_DIRECTORY),
        2: Move(b"old/f", b"new/tree/f", 701, KIND_FILE, '"e"', 9),
        3: Move(b"done", b"there", 702, KIND_FILE, '"x"', 1, copied=True),
        4: Mark(b"new/tree", 700, ATTRIBUTES),
    }
    home.write_journal(rows)
    home.start()
    found = home.rows()
    inode, node = home.node("new/tree/f")
    assert (node.origin, node.etag, node.size_bytes, node.vid) == (b"old/f", '"e"', 9, version.id)
    assert found[2].inode == inode and node.mtime_ns > 0
    inode, node = home.node("new/tree")
    assert (node.origin, node.attributes) == (b"tree/", ATTRIBUTES)
    assert found[1].inode == found[4].inode == inode
    inode, node = home.node("there")
    assert found[3].inode == inode and (node.etag, node.origin, node.staged) == ("", b"", 0)
    assert home.index is not None
    assert home.index.key_of(home.node("new/tree/f")[0]) == b"old/f"
    assert home.index.key_of(home.node("new/tree")[0]) == b"tree"


def test_attributes_that_the_lake_has_yet_to_get_wait_for_the_object(home: Home) -> None:
    home.stage(1)
    rows: dict[int, Pending] = {
        1: sealed(b"written", 1),
        2: Restate(b"written", 700, KIND_FILE, OTHERS, 55),
        3: Restate(b"far/away", 701, KIND_FILE, OTHERS, 56),
        4: Restate(b"far", 702, KIND_DIRECTORY, ATTRIBUTES),
    }
    home.write_journal(rows)
    home.start()
    found = home.rows()
    assert found[1].inode == found[2].inode == home.node("written")[0]
    written = home.node("written")[1]
    assert (written.staged, written.attributes, written.mtime_ns) == (1, OTHERS, 55)
    inode, node = home.node("far/away")
    assert found[3].inode == inode
    assert (node.attributes, node.etag, node.seen_at_s) == (OTHERS, "", 0.0)
    assert home.node("far")[1].attributes == ATTRIBUTES


def test_paths_under_each_other_come_together_in_any_order(home: Home) -> None:
    home.stage(1)
    home.write_journal(
        {1: sealed(b"a/b/f", 1), 2: Mark(b"a/b", 700, ATTRIBUTES), 3: Move(b"x/", b"a", 701, KIND_DIRECTORY)}
    )
    home.start()
    assert home.tree().keys() == {"a", "a/b", "a/b/f"}
    assert home.node("a")[1].origin == b"x/" and home.node("a/b")[1].attributes == ATTRIBUTES


def test_an_index_without_the_mark_keeps_what_it_knows_of_the_lake(home: Home) -> None:
    """It is from before there was anything to write, or from a read-only mount after a power loss."""
    index = Index(home.path)
    with index.write() as w:
        w.add_root()
        directory = w.attach(Node(ROOT_INODE, b"d", KIND_DIRECTORY))
        w.attach(Node(directory, b"known", KIND_FILE, 1, 1, '"e"', b"v" * 16))
        w.put_pending(9, b"of a recovery that was killed")
    index.close()
    home.stage(1)
    home.write_journal({1: sealed(b"d/new", 1)})
    home.start()
    assert home.tree().keys() == {"d", "d/known", "d/new"}
    assert list(home.rows()) == [1] and home.node("d")[0] == directory


# Nodes that several rows stand for


def test_of_several_moves_the_last_says_where_it_is_and_the_first_where_the_lake_has_it(home: Home) -> None:
    """Two directories, and two files, that changed places."""
    first = ObjectVersion("f", '"f"', 4)
    rows: dict[int, Pending] = {
        1: Move(b"a/", b".sluice-exchange-5", 5, KIND_DIRECTORY),
        2: Move(b"b/", b"a", 6, KIND_DIRECTORY),
        3: Move(b".sluice-exchange-5/", b"b", 5, KIND_DIRECTORY),
        4: Move(b"f", b".sluice-exchange-7", 7, KIND_FILE, '"f"', 4),
        5: Move(b"g", b"f", 8, KIND_FILE, '"g"', 4),
        6: Move(b".sluice-exchange-7", b"g", 7, KIND_FILE, '"f"', 4),
    }
    home.write_journal(rows)
    home.start()
    assert home.tree().keys() == {"a", "b", "f", "g"}
    origins = {path: node.origin for path, node in home.tree().items()}
    assert origins == {"a": b"b/", "b": b"a/", "f": b"g", "g": b"f"}
    assert home.node("g")[1].vid == first.id
    found = home.rows()
    assert without_inodes(found) == without_inodes(rows)
    assert found[1].inode == found[3].inode == home.node("b")[0]
    assert found[4].inode == found[6].inode == home.node("g")[0]


def test_a_move_that_was_made_already_is_not_where_the_next_begins(home: Home) -> None:
    rows: dict[int, Pending] = {
        1: Move(b"a/", b"b", 5, KIND_DIRECTORY, copied=True),
        2: Move(b"b/", b"c", 5, KIND_DIRECTORY),
    }
    home.write_journal(rows)
    home.start()
    assert {path: node.origin for path, node in home.tree().items()} == {"c": b"b/"}


def test_what_a_later_move_of_its_directory_carries_along_is_there(home: Home) -> None:
    """What a move brings to a directory goes on with it, and is where the lake has it now until then."""
    home.stage(1)
    rows: dict[int, Pending] = {
        1: Move(b"x", b"old/x", 6, KIND_FILE, '"x"', 1),
        2: Move(b"old/", b"new", 5, KIND_DIRECTORY),
        3: sealed(b"old/f", 1),
        4: Move(b"new/sub/", b"out", 7, KIND_DIRECTORY),
        5: Move(b"new/y", b"y", 8, KIND_FILE, '"y"', 1),
        6: Move(b"new/", b"newer", 5, KIND_DIRECTORY),
        7: Move(b"new/z", b"z", 9, KIND_FILE, '"z"', 1),
        8: Delete(b"z"),
        9: Move(b"p", b"q", 0, KIND_FILE),
    }
    home.write_journal(rows)
    home.start()
    assert home.tree().keys() == {"newer", "newer/x", "old", "old/f", "out", "y"}
    origins = {path: home.node(path)[1].origin for path in ("newer", "newer/x", "out", "y")}
    assert origins == {"newer": b"old/", "newer/x": b"x", "out": b"old/sub/", "y": b"old/y"}
    assert without_inodes(home.rows()) == perhaps_sent(rows)


def test_what_takes_the_name_of_a_directory_that_was_moved_and_removed_is_not_where_that_was(
    home: Home,
) -> None:
    """Else what lies below it would be looked for there once its own moves are made."""
    rows: dict[int, Pending] = {
        1: Move(b"x/", b"c", 0, KIND_DIRECTORY),
        2: Delete(b"c/"),
        3: Move(b"y/", b"a/sub", 4, KIND_DIRECTORY, to=b"c/sub"),
        4: Move(b"c/", b"a", 5, KIND_DIRECTORY),
        5: Mark(b"a", 5, is_new=True),
    }
    home.write_journal(rows)
    home.start()
    assert home.node("a")[1].origin == b"c/" and home.node("a/sub")[1].origin == b"y/"


def test_what_waits_for_somebody_is_not_carried_along(home: Home) -> None:
    home.stage(1)
    rows: dict[int, Pending] = {
        1: sealed(b"d/f", 1, state=CONFLICT),
        2: Local(b"d/fifo", 6, KIND_FIFO, OTHERS),
        3: Move(b"d/", b"e", 5, KIND_DIRECTORY),
    }
    home.write_journal(rows)
    home.start()
    assert home.tree().keys() == {"d", "d/f", "d/fifo", "e"}


@pytest.mark.parametrize("is_intact", [True, False])
def test_what_was_to_be_sent_may_have_been(home: Home, is_intact: bool) -> None:
    """Of the index, which is lost, not of the journal: that learns it a little later."""
    home.stage(1)
    rows: dict[int, Pending] = {1: sealed(b"f", 1), 2: Mark(b"d", 700, is_new=True)}
    home.write_journal(rows)
    home.start(is_intact=is_intact)
    found = home.rows()
    assert isinstance(found[1], Put) and found[1].upload_key == b"f"
    assert isinstance(found[2], Mark) and not found[2].is_new


@pytest.mark.parametrize("is_intact", [True, False])
def test_after_a_power_loss_the_ctime_of_what_was_sent_says_nothing_of_the_bytes(
    home: Home, is_intact: bool
) -> None:
    home.stage(1)
    row = sealed(b"f", 1, uploaded=b"mark", upload_ctime_ns=5, upload_id="u", upload_key=b"f")
    home.write_journal({1: row})
    home.start(is_intact=is_intact)
    (found,) = without_inodes(home.rows()).values()
    expected = row if is_intact else replace(row, uploaded=b"", upload_ctime_ns=0)
    assert found == replace(expected, inode=0)
