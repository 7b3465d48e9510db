"""The index: namespace and residence in LMDB, and what its transactions promise."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cache.errors import CacheError, UsageError
from cache.index import Index, remove_index
from cache.index_writer import IndexWriter
from cache.model import KIND_DIRECTORY, KIND_FILE, ROOT_INODE, GroupIndex, Inode, ObjectVersion
from cache.records import DirectoryState, Group, HiddenKey, Node, VersionRow


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = Index(tmp_path)
    with index.write() as w:
        w.add_root()
    yield index
    index.close()


def file_node(name: bytes, parent: int = ROOT_INODE, etag: str = "e") -> Node:
    return Node(parent, name, KIND_FILE, 5, 1, etag, ObjectVersion(os.fsdecode(name), etag, 5).id)


def add(index: Index, *names: bytes, parent: int = ROOT_INODE) -> list[Inode]:
    with index.write() as w:
        return [w.attach(file_node(name, parent)) for name in names]


def add_directory(index: Index, name: bytes, parent: int = ROOT_INODE) -> Inode:
    with index.write() as w:
        return w.attach(Node(parent, name, KIND_DIRECTORY))


def test_the_root_is_there_once(index: Index) -> None:
    add(index, b"a")
    with index.write() as w:
        w.add_root()
    root = index.node(ROOT_INODE)
    assert root is not None and root.is_directory
    assert index.path_of(ROOT_INODE) == b""


def test_a_name_leads_to_its_node(index: Index) -> None:
    (inode,) = add(index, b"a")
    assert index.child(ROOT_INODE, b"a") == (inode, file_node(b"a"))
    assert index.node(inode) == file_node(b"a")
    assert index.child(ROOT_INODE, b"b") is None


def test_paths_are_put_together_from_the_parents(index: Index) -> None:
    outer = add_directory(index, b"d")
    inner = add_directory(index, b"\xff", outer)
    (inode,) = add(index, b"f", parent=inner)
    assert index.path_of(inode) == b"d/\xff/f"
    with pytest.raises(CacheError, match="no node"):
        index.path_of(9999)


def test_inodes_are_never_given_twice_even_after_opening_again(index: Index, tmp_path: Path) -> None:
    before = add(index, b"a", b"b")
    with index.write() as w:
        w.detach(ROOT_INODE, b"b")
        w.sweep_detached()
    index.close()
    again = Index(tmp_path)
    after = add(again, b"c")
    again.close()
    assert not set(before) & set(after)


def test_entries_come_in_byte_order_and_go_on_behind_any_name(index: Index) -> None:
    names = [b"a", b"a!", b"aa", b"b", b"\xff"]
    add(index, *reversed(names))
    other = add_directory(index, b"zz")
    add(index, b"elsewhere", parent=other)
    assert [node.name for _, node in index.children(ROOT_INODE, b"", 99)] == [*names[:4], b"zz", names[4]]
    assert [node.name for _, node in index.children(ROOT_INODE, b"a", 2)] == [b"a!", b"aa"]
    assert [node.name for _, node in index.children(ROOT_INODE, b"ab", 1)] == [b"b"]
    assert index.children(ROOT_INODE, b"\xff", 9) == []


def test_a_new_node_under_a_name_detaches_the_old_one(index: Index) -> None:
    (old,) = add(index, b"a")
    (new,) = add(index, b"a")
    assert new != old
    child = index.child(ROOT_INODE, b"a")
    assert child is not None and child[0] == new
    assert index.is_detached(old) and not index.is_detached(new)
    assert index.node(old) is not None


def test_sweeping_forgets_detached_subtrees_and_nothing_else(index: Index) -> None:
    (kept,) = add(index, b"kept")
    gone = add_directory(index, b"gone")
    inner = add_directory(index, b"inner", gone)
    (leaf,) = add(index, b"leaf", parent=inner)
    with index.write() as w:
        w.set_directory(inner, DirectoryState(1.0, 1, 1, 0.1))
        w.hide(inner, HiddenKey(b"gone/inner//", "why"))
        w.detach(ROOT_INODE, b"gone")
    with index.write() as w:
        assert w.sweep_detached() == 3
    assert [index.node(inode) for inode in (gone, inner, leaf)] == [None] * 3
    assert index.node(kept) is not None
    assert index.directory(inner) is None
    assert index.hidden(9) == (0, [])
    entries = index.entries()
    assert (entries["nodes"], entries["children"], entries["detached"]) == (2, 1, 0)


def test_detaching_a_missing_name_is_no_error(index: Index) -> None:
    with index.write() as w:
        w.detach(ROOT_INODE, b"nothing")
    assert index.entries()["detached"] == 0


def test_a_writer_sees_its_own_changes(index: Index) -> None:
    with index.write() as w:
        inode = w.attach(file_node(b"a"))
        assert w.child(ROOT_INODE, b"a") == (inode, file_node(b"a"))
        assert w.count_children(ROOT_INODE) == 1
        assert list(w.names(ROOT_INODE)) == [(inode, b"a")]


def test_an_exception_takes_all_of_a_transaction_back(index: Index) -> None:
    with pytest.raises(RuntimeError), index.write() as w:
        w.attach(file_node(b"a"))
        w.set_meta(b"lake", b"x")
        raise RuntimeError("halfway")
    assert index.child(ROOT_INODE, b"a") is None
    assert index.meta(b"lake") is None


def changed_at(index: Index, inode: int = ROOT_INODE) -> int:
    state = index.directory(inode)
    assert state is not None
    return state.changed_at_ns


@pytest.fixture
def listed(index: Index, monkeypatch: pytest.MonkeyPatch) -> Index:
    """An index whose root was listed with a and b in it, under a clock that counts the calls."""
    ticks = itertools.count(1000)
    monkeypatch.setattr("cache.index_writer.time.time_ns", lambda: next(ticks))
    add(index, b"a", b"b")
    with index.write() as w:
        w.set_directory(ROOT_INODE, DirectoryState(1.0, 2, 1, 0.1, changed_at_ns=5))
    return index


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.attach(file_node(b"new")),
        lambda w: w.attach(file_node(b"a", etag="other")),
        lambda w: w.attach(Node(ROOT_INODE, b"d", KIND_DIRECTORY)),
        lambda w: w.detach(ROOT_INODE, b"a"),
    ],
    ids=["comes", "changes", "directory comes", "goes"],
)
def test_a_directory_changes_when_an_entry_comes_goes_or_shows_another_version(
    listed: Index, change: Callable[[IndexWriter], object]
) -> None:
    with listed.write() as w:
        change(w)
    first = changed_at(listed)
    assert first >= 1000
    with listed.write() as w:
        w.attach(file_node(b"once more"))
    assert changed_at(listed) > first
    state = listed.directory(ROOT_INODE)
    assert state is not None and (state.listed_at_s, state.entries, state.pages) == (1.0, 2, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: None,
        lambda w: w.detach(ROOT_INODE, b"not there"),
        lambda w: w.put_version(b"v" * 16, VersionRow(b"k", "e", 1, 0, True)),
        lambda w: w.hide(ROOT_INODE, HiddenKey(b"k//", "why")),
        lambda w: w.attach(file_node(b"elsewhere", parent=77)),
        lambda w: w.sweep_detached(),
    ],
    ids=["nothing", "missing name", "residence", "hidden key", "another directory", "sweep"],
)
def test_a_directory_stays_unchanged_by_what_does_not_touch_its_entries(
    listed: Index, change: Callable[[IndexWriter], object]
) -> None:
    with listed.write() as w:
        change(w)
    assert changed_at(listed) == 5


def test_a_change_that_is_taken_back_is_none(listed: Index) -> None:
    with pytest.raises(RuntimeError), listed.write() as w:
        w.attach(file_node(b"new"))
        raise RuntimeError("halfway")
    assert changed_at(listed) == 5


def test_a_listing_that_ends_with_its_changes_tells_of_them(listed: Index) -> None:
    """The state is set after the entries, in the same transaction: the change still counts."""
    with listed.write() as w:
        w.attach(file_node(b"new"))
        w.set_directory(ROOT_INODE, DirectoryState(9.0, 3, 1, 0.1, changed_at_ns=5))
    assert changed_at(listed) >= 1000


def test_a_directory_never_listed_gets_no_state_by_a_change(index: Index) -> None:
    add(index, b"a")
    assert index.directory(ROOT_INODE) is None


def test_sweeping_leaves_no_state_of_what_it_forgets(listed: Index) -> None:
    gone = add_directory(listed, b"gone")
    add(listed, b"leaf", parent=gone)
    with listed.write() as w:
        w.set_directory(gone, DirectoryState(1.0, 1, 1, 0.1))
        w.detach(ROOT_INODE, b"gone")
    with listed.write() as w:
        assert w.sweep_detached() == 2
    assert listed.directory(gone) is None


def test_hidden_keys_are_counted_and_cleared_by_directory(index: Index) -> None:
    other = add_directory(index, b"d")
    with index.write() as w:
        for i in range(5):
            w.hide(ROOT_INODE, HiddenKey(b"k%d//" % i, "why"))
        w.hide(ROOT_INODE, HiddenKey(b"k0//", "why"))  # Once more: no other entry.
        w.hide(other, HiddenKey(b"d//", "why"))
    assert index.hidden(2)[0] == 6
    assert len(index.hidden(2)[1]) == 2
    with index.write() as w:
        w.clear_hidden(ROOT_INODE)
        w.clear_hidden(999)
    assert index.hidden(9) == (1, [HiddenKey(b"d//", "why")])


def test_clearing_the_last_directorys_hidden_keys_ends(index: Index) -> None:
    with index.write() as w:
        for i in range(3):
            w.hide(ROOT_INODE, HiddenKey(b"k%d" % i, "why"))
        w.clear_hidden(ROOT_INODE)
    assert index.hidden(9) == (0, [])


def test_residence_is_one_look_at_version_and_groups(index: Index) -> None:
    vid, row = b"v" * 16, VersionRow(b"k", "e", 3 << 23, 1, False)
    group = Group.empty(64, generation=3).with_blocks(0, [7])
    with index.write() as w:
        w.put_version(vid, row)
        w.put_group(vid, 1, group)
    found, groups = index.residence(vid, range(0, 3))
    assert found == row
    assert [one and (one.generation, one.present, one.checksums[0]) for one in groups] == [
        None,
        (3, 1, 7),
        None,
    ]
    assert index.residence(b"w" * 16, range(2)) == (None, [None, None])


def test_groups_come_in_order_and_only_the_versions_own(index: Index) -> None:
    vids = [bytes([i]) * 16 for i in (1, 2, 255)]
    with index.write() as w:
        for vid in vids:
            for number in (300, 2, 0):
                w.put_group(vid, number, Group.empty(64, generation=number))
    for vid in vids:
        assert [(number, group.generation) for number, group in index.groups_of(vid)] == [
            (0, 0),
            (2, 2),
            (300, 300),
        ]


def test_removing_a_version_removes_its_groups_and_no_others(index: Index) -> None:
    vids = [bytes([i]) * 16 for i in (1, 2, 255)]
    with index.write() as w:
        for vid in vids:
            w.put_version(vid, VersionRow(b"k", "e", 1, 0, True))
            for number in range(3):
                w.put_group(vid, number, Group.empty(1))
    with index.write() as w:
        w.remove_group(vids[0], 1)
        w.remove_versions(vids[1:])
    assert [vid for vid, _ in index.versions()] == vids[:1]
    assert [number for number, _ in index.groups_of(vids[0])] == [GroupIndex(0), GroupIndex(2)]
    assert index.entries()["groups"] == 2


def test_another_environment_sees_what_was_committed(index: Index) -> None:
    """As a worker does: a second reader in the same process needs a copy of the data, so read the file."""
    add(index, b"a")
    index.env.sync(True)
    copy = index.path.parent / "copy"
    copy.mkdir()
    index.env.copy(str(copy))
    index.close()
    (index.path.parent / "again").mkdir()
    copy.rename(index.path.parent / "again" / "index.lmdb")
    other = Index(index.path.parent / "again")
    assert other.child(ROOT_INODE, b"a") is not None
    other.close()


def test_a_file_that_is_no_index_is_a_cache_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "index.lmdb").mkdir()
    (tmp_path / "index.lmdb" / "data.mdb").write_bytes(b"not an index" * 10_000)
    with pytest.raises((CacheError, UsageError), match=r"index\.lmdb|--cache"):
        Index(tmp_path)


def test_a_directory_that_refuses_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "index.lmdb").write_bytes(b"a file where the directory goes")
    with pytest.raises((CacheError, UsageError)) as caught:
        Index(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_removing_the_index_leaves_room_for_a_new_one(tmp_path: Path) -> None:
    index = Index(tmp_path)
    add(index, b"a")
    index.close()
    remove_index(tmp_path)
    remove_index(tmp_path)
    again = Index(tmp_path)
    assert again.entries()["nodes"] == 0
    again.close()
