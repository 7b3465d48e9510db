"""The parts that the benchmarks stand on: what they count, and the server that they list."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.bench import memory
from tools.bench.epoch_bytes import prepare_past_page_cache
from tools.bench.figures import Figure, MeasurementFailed, Target, alternate
from tools.bench.list_server import GeneratedKeys, list_page, list_server
from tools.bench.readers import prepare_files, shuffled_shares, timed
from tools.bench.report import table


def test_generated_keys_are_in_byte_order_and_all_different() -> None:
    keys = list(GeneratedKeys(2500, 10))
    assert keys == sorted(set(keys))
    assert len(keys) == 2500


def pages(keys: list[str], prefix: str, delimiter: str, count_max: int) -> tuple[list[str], list[str]]:
    """Return all keys and all common prefixes, page after page."""
    found: list[str] = []
    prefixes: list[str] = []
    after: str | None = ""
    while after is not None:
        page = list_page(keys, prefix, delimiter, after, count_max)
        assert len(page.keys) + len(page.prefixes) <= count_max
        found += page.keys
        prefixes += page.prefixes
        after = page.next_after
    return found, prefixes


@pytest.mark.parametrize("count_max", [1, 2, 3, 1000])
def test_a_listing_in_pages_is_the_whole_listing(count_max: int) -> None:
    keys = sorted(["a", "b/1", "b/2", "b/c/3", "b0", "d/4", "e"])
    assert pages(keys, "", "", count_max) == (keys, [])
    assert pages(keys, "", "/", count_max) == (["a", "b0", "e"], ["b/", "d/"])
    assert pages(keys, "b/", "/", count_max) == (["b/1", "b/2"], ["b/c/"])
    assert pages(keys, "b", "", count_max) == (["b/1", "b/2", "b/c/3", "b0"], [])
    assert pages(keys, "x", "/", count_max) == ([], [])


def test_boto3_lists_the_server() -> None:
    with list_server(2500, 100) as endpoint:
        client = endpoint.boto3()
        flat = client.get_paginator("list_objects_v2").paginate(Bucket="lake")
        assert [item["Key"] for page in flat for item in page["Contents"]] == list(GeneratedKeys(2500, 100))
        top = client.list_objects_v2(Bucket="lake", Delimiter="/")
        assert len(top["CommonPrefixes"]) == 25
        assert client.head_object(Bucket="lake", Key="000000/00000000.jpg")["ContentLength"] == 0
        client.close()


def test_readers_read_everything_once(tmp_path: Path) -> None:
    paths = [str(tmp_path / str(i)) for i in range(10)]
    for path in paths:
        Path(path).write_bytes(b"x" * 1000)
    shares = shuffled_shares(paths, 3, seed=1)
    assert sorted(path for share in shares for path in share) == paths
    assert shares != shuffled_shares(paths, 3, seed=2)
    assert timed(prepare_files, shares, expected_bytes=10_000) > 0


def test_readers_past_the_page_cache_read_everything(tmp_path: Path) -> None:
    paths = [str(tmp_path / str(i)) for i in range(4)]
    for path in paths:
        Path(path).write_bytes(b"x" * 1000)
    assert timed(prepare_past_page_cache, [paths[:2], paths[2:]], expected_bytes=4000) > 0


def test_readers_that_read_too_little_or_fail_are_no_result(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(MeasurementFailed, match="1 bytes were read instead of 2"):
        timed(prepare_files, [[str(tmp_path / "a")]], expected_bytes=2)
    with pytest.raises(MeasurementFailed, match="FileNotFoundError"):
        timed(prepare_files, [[str(tmp_path / "b")]], expected_bytes=0)


def test_rounds_alternate_who_begins() -> None:
    calls: list[str] = []

    def side(name: str, value: float) -> float:
        calls.append(name)
        return value

    ours, baseline = alternate(lambda _: side("a", 1.0), lambda _: side("b", 2.0), 3, "test")
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert (ours, baseline) == ([1.0] * 3, [2.0] * 3)


def test_a_figure_compares_rounds_of_the_same_number() -> None:
    figure = Figure("f", "claim", "s", [1.0, 20.0, 3.0], Target(at_most=1.5), "other", [1.0, 10.0, 3.0])
    assert figure.ratio == 1.0
    assert figure.is_met
    assert not Figure("f", "claim", "B", [2.0], Target(at_most=1.0)).is_met
    assert "MISSED" in table([Figure("f", "claim", "B", [2.0], Target(at_most=1.0))])


def test_memory_of_this_process_grows_with_its_heap() -> None:
    before = memory.of_process(os.getpid())
    held = bytearray(64 << 20)
    held[::4096] = b"x" * len(held[::4096])
    after = memory.of_process(os.getpid())
    assert after.private_bytes - before.private_bytes > 60 << 20
    assert after.anonymous_bytes - before.anonymous_bytes > 60 << 20
    assert memory.of_process(2**22 + 1) == memory.Memory()
