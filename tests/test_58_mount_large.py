"""Large files of samples on real mounts of a real S3 server: shards, records at random, mapped files."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cache.model import MIB
from tests.mounting import LiveMount, Mounting, Prefix, content, sluice, until

SHARDS, SHARD = 7, 9 * MIB + 4321
RECORD = 100_000
WITH_AND_WITHOUT_OPENS = pytest.mark.parametrize("profile", ["dataset", "checkpoint"])


def name(number: int) -> str:
    return f"train/shard-{number:03}.tar"


@pytest.fixture
def shards(prefix: Prefix) -> Prefix:
    for number in range(SHARDS):
        prefix.put(name(number), content(SHARD, number))
    return prefix


def mounted(mounting: Mounting, lake: Prefix, *options: str, **settings: Any) -> LiveMount:
    return mounting.mount(lake.url, *lake.options, *options, **settings)


def entry(mount: LiveMount, path: str) -> dict[str, Any]:
    (found,) = mount.ls(str(mount.directory / path))
    return found


def is_whole(mount: LiveMount, path: str) -> bool:
    found = entry(mount, path)
    return bool(found["cached_bytes"] == found["size_bytes"])


def read_records(mount: LiveMount, path: str, body: bytes, numbers: list[int]) -> None:
    """Read the records past the page cache, and check them."""
    with (mount.directory / path).open("rb", buffering=0) as file:
        for number in numbers:
            offset = number * RECORD
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), RECORD, offset) == body[offset : offset + RECORD], number


def shuffled(records: int, seed: int) -> list[int]:
    order = list(range(records))
    random.Random(seed).shuffle(order)
    return order


@WITH_AND_WITHOUT_OPENS
def test_records_out_of_a_file_larger_than_the_cache_cost_little_more_than_their_bytes(
    mounting: Mounting, prefix: Prefix, profile: str
) -> None:
    size = 160 * MIB
    body = content(size)
    prefix.put("data.h5", body)
    mount = mounted(mounting, prefix, f"--profile={profile}", size="64M")
    records = size // RECORD
    read_records(mount, "data.h5", body, shuffled(records, 1))
    fetched = mount.status()["lake_io"]["bytes_fetched"]
    assert fetched / (records * RECORD) <= 1.5
    shown = entry(mount, "data.h5")
    assert shown["access"] == "random records"
    assert shown["fetched_bytes"] == fetched
    assert records * RECORD <= shown["read_bytes"] <= 1.1 * records * RECORD
    assert shown["amplification"] == round(fetched / shown["read_bytes"], 3)
    assert shown["cached_bytes"] <= 64 * MIB
    text = sluice("ls", mount.directory / "data.h5").stdout
    assert "random records of " in text and f"{shown['amplification']:.2f}" in text
    assert mount.status()["sets"] == []  # One file is no set.


def test_a_file_that_fits_is_fetched_whole_once_its_records_have_cost_as_much(
    mounting: Mounting, prefix: Prefix
) -> None:
    size = 48 * MIB
    body = content(size)
    prefix.put("data.h5", body)
    mount = mounted(mounting, prefix)
    order = shuffled(size // RECORD, 2)
    read_records(mount, "data.h5", body, order[:10])
    assert not is_whole(mount, "data.h5")
    read_records(mount, "data.h5", body, order[10:120])
    until(lambda: is_whole(mount, "data.h5"), "all of the file is cached")
    assert mount.status()["lake_io"]["bytes_fetched"] == size
    before = mount.requests()["get"]
    read_records(mount, "data.h5", body, order[120:])
    assert mount.requests()["get"] == before


@WITH_AND_WITHOUT_OPENS
def test_the_next_shards_are_fetched_ahead(mounting: Mounting, shards: Prefix, profile: str) -> None:
    mount = mounted(mounting, shards, f"--profile={profile}", "--ttl=600")
    for number in (0, 1):
        assert mount.read(name(number)) == content(SHARD, number)
    until(lambda: is_whole(mount, name(2)) and is_whole(mount, name(3)), "the next two shards are cached")
    for number in range(2, SHARDS):
        assert mount.read(name(number)) == content(SHARD, number)
    (shown,) = mount.status()["sets"]
    assert (shown["path"], shown["files"], shown["large"]) == ("train", SHARDS, True)
    assert shown["fetched_ahead_bytes"] >= 2 * SHARD and shown["wasted_bytes"] == 0
    assert mount.status()["lake_io"]["bytes_fetched"] == SHARDS * SHARD
    text = sluice("status", mount.directory).stdout
    assert "set train: " in text or "set train" in text
    assert "read amplification" in text


def test_shards_of_a_set_larger_than_the_cache_are_read_epoch_after_epoch(
    mounting: Mounting, prefix: Prefix
) -> None:
    count = 12
    for number in range(count):
        prefix.put(name(number), content(SHARD, number))
    mount = mounted(mounting, prefix, "--ttl=600", size="64M")
    for seed in (1, 2):
        for number in shuffled(count, seed):
            assert mount.read_anew(name(number)) == content(SHARD, number)
    assert mount.status()["lake_io"]["bytes_fetched"] <= 2 * count * SHARD
    (tier,) = mount.status()["tiers"]
    assert tier["used_bytes"] <= tier["size_bytes"]


def test_a_shard_that_is_replaced_in_mid_epoch_is_read_as_it_is_now(
    mounting: Mounting, shards: Prefix
) -> None:
    mount = mounted(mounting, shards, "--ttl=0")
    for number in (0, 1):
        assert mount.read(name(number)) == content(SHARD, number)
    until(lambda: is_whole(mount, name(2)), "the next shard is cached")
    shards.put(name(2), content(SHARD, 99))
    shards.put(name(5), content(SHARD + 1, 98))
    for number in (2, 3, 4, 5, 6):
        expected = {2: content(SHARD, 99), 5: content(SHARD + 1, 98)}.get(number) or content(SHARD, number)
        assert mount.read(name(number)) == expected, number


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_file_larger_than_the_cache_is_read_on_in_large_requests(
    mounting: Mounting, prefix: Prefix, workers: str
) -> None:
    size = 150 * MIB
    body = content(size)
    prefix.put("large.bin", body)
    mount = mounted(mounting, prefix, f"--workers={workers}", size="64M")
    for _ in range(2):  # The second time, the tier is full from the beginning.
        before = mount.requests()["get"]
        assert mount.read_anew("large.bin") == body
        assert mount.requests()["get"] - before <= size // (2 * MIB)
    (tier,) = mount.status()["tiers"]
    assert 32 * MIB <= tier["used_bytes"] <= tier["size_bytes"]


def test_a_file_that_threads_fault_in_by_page_is_fetched_once_in_large_requests(
    mounting: Mounting, prefix: Prefix
) -> None:
    """As safetensors loads: tensors of a mapped file, several at a time."""
    size, tensors = 96 * MIB, 24
    body = content(size)
    prefix.put("model.safetensors", body)
    mount = mounted(mounting, prefix)
    mapped = np.memmap(mount.directory / "model.safetensors", np.uint8, "r")
    parts = [mapped[size * i // tensors : size * (i + 1) // tensors] for i in range(tensors)]
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda part: np.array(part, copy=True), parts))
    assert np.concatenate(loaded).tobytes() == body
    status = mount.status()["lake_io"]
    assert status["bytes_fetched"] == size
    assert status["requests"]["get"] <= 3 * size // (8 * MIB) + tensors
