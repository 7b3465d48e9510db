"""What real loaders read, recorded by tests/traces/record.py, is recognised and its order found."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cache.policy.order.finder import OPENS_MAX, Finder, Found
from cache.policy.order.following import Following
from cache.policy.sets import Pattern
from tests.test_15_sets import Tree, Watcher

TRACES = Path(__file__).parent / "traces"
CLASS_FILES = 40  # As record.py makes them.
SHUFFLED = ["map-style", "distributed-2", "distributed-4"]


def recorded(name: str) -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(gzip.decompress((TRACES / f"{name}.json.gz").read_bytes()))
    return trace


def opens(trace: dict[str, Any]) -> list[int]:
    """Return the files in the order of their first uses."""
    return list(dict.fromkeys(use[0] for use in trace["uses"]))


def watched(trace: dict[str, Any], tree: Tree, files: list[int]) -> Watcher:
    """Return what the recogniser makes of the trace, at the times at which its uses were seen."""
    watcher = Watcher(tree)
    for use, at_ms in zip(trace["uses"], trace["at_ms"], strict=True):
        watcher.watch([files[use[0]]], start_s=at_ms / 1000)
    return watcher


def found(trace: dict[str, Any], paths: list[bytes]) -> tuple[Found, int]:
    """Return the order that the first opens show, and after how many."""
    opened, finder = opens(trace)[:OPENS_MAX], Finder(len(paths), lambda: paths)
    for number in range(1, len(opened) + 1):
        if finder.wants_look(number) and (order := finder.find(opened[:number])) is not None:
            return order, number
    raise AssertionError(f"no order found in {len(opened)} opens")


def class_paths(count: int) -> list[bytes]:
    return [b"class%02d/%04d.jpg" % divmod(number, CLASS_FILES) for number in range(count)]


@pytest.mark.parametrize("name", SHUFFLED)
def test_an_epoch_of_torchs_loaders_is_one_set_read_shuffled(name: str) -> None:
    trace, tree = recorded(name), Tree()
    top, files = tree.classes(trace["files"] // CLASS_FILES, CLASS_FILES)
    watcher = watched(trace, tree, files)
    assert (watcher.only.root, watcher.only.epoch) == (top.inode, 1)
    assert watcher.found_after[0] <= 64
    assert watcher.only.pattern is Pattern.SHUFFLED
    assert watcher.only.used_count == trace["files"]


@pytest.mark.parametrize("name", SHUFFLED)
def test_the_order_of_torchs_samplers_is_found_and_holds_to_the_end(name: str) -> None:
    trace = recorded(name)
    order, needed = found(trace, class_paths(trace["files"]))
    family = "torch-loader" if name == "map-style" else "torch"  # A loader's own generator draws first.
    assert (order.spec.family, order.spec.seed, needed <= 64) == (family, 0, True)
    opened = opens(trace)
    following = Following(order.files(), trace["files"], opened=opened[:needed], grace=0)
    for file in opened[needed:]:
        following.note_open(file)
        assert following.holds
    assert following.opens == trace["files"]


@pytest.mark.parametrize("name", SHUFFLED)
def test_what_torchs_loaders_read_next_was_foreseen(name: str) -> None:
    """With a window of 128 files, next to none is opened that was not asked for before."""
    trace = recorded(name)
    order, needed = found(trace, class_paths(trace["files"]))
    opened, asked, missed = opens(trace), set[int](), 0
    following = Following(order.files(), trace["files"], opened=opened[:needed], grace=0)
    for file in opened[needed:]:
        asked.update(following.upcoming(128))
        missed += file not in asked
        following.note_open(file)
    assert missed <= 8


def test_shards_in_a_shuffled_order_are_a_set() -> None:
    trace, tree = recorded("shards"), Tree()
    directory = tree.directory(entries=trace["files"])
    watcher = watched(trace, tree, tree.files(directory, trace["files"]))
    assert watcher.only.pattern is Pattern.SHUFFLED and watcher.only.used_count == 256


def test_the_order_of_webdatasets_shards_is_found() -> None:
    trace = recorded("shards")
    order, needed = found(trace, [b"%04d.tar" % number for number in range(trace["files"])])
    assert needed <= 64
    assert (order.spec.family, order.spec.seed) == ("webdataset-1-100", 0)
    following = Following(order.files(), trace["files"], grace=0)
    for file in opens(trace):
        following.note_open(file)
        assert following.holds


@pytest.mark.parametrize("name", ["hdf5", "tokens"])
def test_random_records_of_one_large_file_are_no_epoch(name: str) -> None:
    trace, tree = recorded(name), Tree()
    directory = tree.directory(entries=1)
    watcher = watched(trace, tree, tree.files(directory, 1))
    assert not watcher.sets
    assert sorted(use[1] for use in trace["uses"]) == [0, 1, 2, 3]  # Groups of 8 MiB.
