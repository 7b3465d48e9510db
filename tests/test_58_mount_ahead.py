"""Sample sets on real mounts: the rest of an epoch is fetched ahead, and `sluice status` tells of it."""

from __future__ import annotations

import random
import re
import subprocess
from itertools import islice
from typing import Any

import pytest

from tests.mounting import Folder, LiveMount, Mounting, content, kill_each, sluice, until

CLASSES, FILES, SIZE = 5, 80, 20_000
PATHS = [f"train/c{label}/{number:03}" for label in range(CLASSES) for number in range(FILES)]
WITH_AND_WITHOUT_OPENS = pytest.mark.parametrize("profile", ["auto", "checkpoint"])


@pytest.fixture
def train(folder: Folder) -> Folder:
    for seed, path in enumerate(PATHS):
        folder.put(path, content(SIZE, seed))
    return folder


def shuffled(seed: int) -> list[str]:
    order = list(PATHS)
    random.Random(seed).shuffle(order)
    return order


def read(mount: LiveMount, paths: list[str]) -> None:
    """Read the files past the page cache, and check them."""
    for path in paths:
        assert mount.read_anew(path) == content(SIZE, PATHS.index(path)), path


def the_set(mount: LiveMount) -> dict[str, Any]:
    shown = mount.status()["sets"]
    return dict(shown[0]) if shown else {}


@WITH_AND_WITHOUT_OPENS
def test_the_rest_of_an_epoch_is_fetched_ahead(mounting: Mounting, train: Folder, profile: str) -> None:
    mount = mounting.mount(train.url, f"--profile={profile}", "--ttl=600")
    order = shuffled(1)
    read(mount, order[:60])
    until(lambda: the_set(mount).get("cached_share") == 1.0, "all of the set is cached")
    assert mount.requests()["get"] == len(PATHS)
    shown = the_set(mount)
    assert (shown["path"], shown["files"], shown["bytes"]) == ("train", 400, 400 * SIZE)
    assert (shown["epoch"], shown["wasted_bytes"]) == (1, 0)
    assert shown["order"] in ("unknown", "python with seed 1")  # It is found from the opens, if in time.
    read(mount, order[60:])
    assert mount.requests()["get"] == len(PATHS)


@WITH_AND_WITHOUT_OPENS
def test_epochs_are_counted_where_every_read_is_a_hit(
    mounting: Mounting, train: Folder, profile: str
) -> None:
    """One worker tells of hits in their order; several mix those of a quarter of a second."""
    mount = mounting.mount(train.url, f"--profile={profile}", "--ttl=600", "--workers=1")
    for epoch in (1, 2, 3):
        read(mount, shuffled(epoch))
        until(lambda: the_set(mount).get("epoch") == epoch, f"epoch {epoch} is seen")  # noqa: B023
    assert mount.requests()["get"] == len(PATHS)


@pytest.mark.parametrize("mode", ["none", "file"])
def test_read_ahead_of_sets_can_be_switched_off(mounting: Mounting, train: Folder, mode: str) -> None:
    mount = mounting.mount(train.url, f"--read-ahead={mode}", "--ttl=600")
    read(mount, shuffled(1)[:60])
    status = mount.status()
    assert (status["lake_io"]["requests"]["get"], status["sets"]) == (60, [])


def test_a_copy_of_the_tree_is_a_scan(mounting: Mounting, train: Folder) -> None:
    mount = mounting.mount(train.url, "--ttl=600")
    done = subprocess.run(
        ["cp", "-r", mount.directory / "train", mount.home / "copy"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    for seed, path in enumerate(PATHS):
        copied = mount.home / "copy" / path.removeprefix("train/")
        assert copied.read_bytes() == content(SIZE, seed), path
    assert mount.requests()["get"] == len(PATHS)
    assert {shown["pattern"] for shown in mount.status()["sets"]} == {"scan"}


def test_status_shows_sets_to_people(mounting: Mounting, train: Folder) -> None:
    mount = mounting.mount(train.url, "--ttl=600")
    read(mount, shuffled(1)[:60])
    until(lambda: the_set(mount).get("cached_share") == 1.0, "all of the set is cached")
    shown = sluice("status", mount.directory).stdout
    assert "set train" in shown and "epoch 1, " in shown and "100% cached of 400 files" in shown
    assert re.search(r"shuffled, order .+; read-ahead: done", shown), shown


def test_a_mover_that_is_replaced_recognises_the_set_anew(mounting: Mounting, train: Folder) -> None:
    mount = mounting.mount(train.url, "--ttl=600")
    read(mount, shuffled(1)[:60])
    until(lambda: the_set(mount).get("cached_share") == 1.0, "all of the set is cached")
    (mover,) = mount.pids()["mover"]
    kill_each([mover])
    order = iter(shuffled(2) + shuffled(3))

    def knows_the_set() -> bool:
        """Of what is told while there is no mover it never hears: read on."""
        read(mount, list(islice(order, 80)))
        return bool(the_set(mount).get("epoch"))

    until(knows_the_set, "the new mover knows the set")
    assert mount.requests()["get"] == 0
