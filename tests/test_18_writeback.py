"""What is sent when, in which pieces and how fast: pure decisions."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from cache.errors import AccessDenied, LakeUnavailable
from cache.metadata import (
    METADATA_BYTES_MAX,
    SentId,
    attributes_of,
    checksum_text,
    is_restated,
    metadata_of,
    restated,
    with_id,
)
from cache.model import BLOCK_BYTES, MIB, OBJECT_BYTES_MAX, ObjectInfo, ObjectVersion, ceil_div
from cache.policy.writeback import Backoff, Quiet, Schedule, Slots, TokenBucket, part_bytes
from cache.records import Attributes


@pytest.mark.parametrize("size_bytes", [16 * MIB + 1, 1 << 30, 150_000 * MIB, OBJECT_BYTES_MAX])
def test_parts_are_few_enough_for_s3_and_whole_blocks(size_bytes: int) -> None:
    length = part_bytes(size_bytes)
    assert ceil_div(size_bytes, length) <= 10_000 and length >= 16 * MIB
    assert length % BLOCK_BYTES == 0 and length <= 5 << 30


def test_parts_are_no_smaller_than_the_lake_takes() -> None:
    assert part_bytes(20 * MIB, 32 * MIB) == 32 * MIB


def test_a_file_is_due_when_it_was_quiet_for_long_enough() -> None:
    quiet = Quiet(closed_s=2.0, open_s=30.0)
    assert quiet.due_s(100.0, 101.0, is_open=False, hurried=False) == 102.0
    assert quiet.due_s(100.0, 101.0, is_open=True, hurried=False) == 130.0
    assert 100.0 < quiet.due_s(100.0, 101.0, is_open=True, hurried=True) < 100.5
    assert quiet.due_s(9e9, 101.0, is_open=False, hurried=False) == 103.0  # The clock was set back.


def test_what_can_be_mended_is_tried_soon_and_what_cannot_rarely() -> None:
    backoff = Backoff(first_s=1.0, longest_s=60.0)
    delays = [backoff.delay_s(LakeUnavailable(""), attempt, 0.5) for attempt in range(1, 100)]
    assert delays[0] == 0.75 and delays == sorted(delays) and delays[-1] == 45.0
    assert backoff.delay_s(AccessDenied(""), 1, 0.5) == 600.0


def test_the_bucket_keeps_the_rate_over_all_who_take() -> None:
    bucket = TokenBucket(100, burst_s=0.0)
    waits = [bucket.take(50, 10.0) for _ in range(4)]
    assert waits == [0.0, 0.5, 1.0, 1.5]
    assert bucket.take(50, 20.0) == 0.0
    assert TokenBucket(None).take(1 << 60, 0.0) == 0.0


def granted(slots: Slots) -> list[object]:
    found = []
    while (ticket := slots.grant()) is not None:
        found.append(ticket)
    return found


def test_small_and_large_files_both_go_on() -> None:
    slots = Slots(8)
    for number in range(100):
        slots.ask(("small", number))
        slots.ask(("part", number), part_of="big")
    kinds = [kind for kind, _ in granted(slots)]  # type: ignore[misc]
    assert len(kinds) == 8 and 2 <= kinds.count("small") <= 6
    for kind in kinds:
        slots.release(large=kind == "part")
    alone = Slots(8)
    for number in range(100):
        alone.ask(number, part_of="big")
    assert len(granted(alone)) == 8


def test_large_files_take_turns() -> None:
    slots = Slots(6)
    for number in range(10):
        slots.ask(("a", number), part_of="a")
    for number in range(10):
        slots.ask(("b", number), part_of="b")
    assert [file for file, _ in granted(slots)] == ["a", "b"] * 3  # type: ignore[misc]


def test_one_slot_alternates_between_small_and_large() -> None:
    slots = Slots(1)
    for number in range(4):
        slots.ask(("small", number))
        slots.ask(("part", number), part_of="big")
    kinds = []
    for _ in range(6):
        (ticket,) = granted(slots)
        kinds.append(ticket[0])  # type: ignore[index]
        slots.release(large=ticket[0] == "part")  # type: ignore[index]
    assert kinds.count("small") == kinds.count("part") == 3


def test_a_ticket_that_is_withdrawn_is_never_granted() -> None:
    slots = Slots(1)
    slots.ask("a", part_of="x")
    slots.ask("b")
    slots.withdraw("a", part_of="x")
    assert granted(slots) == ["b"]


@pytest.mark.parametrize("seed", range(5))
def test_slots_never_exceed_their_number_and_nobody_is_forgotten(seed: int) -> None:
    generator = random.Random(seed)
    slots, running, waiting = Slots(5), [], set()
    for number in range(500):
        file = generator.choice([None, "a", "b", "c"])
        slots.ask((number, file), part_of=file)
        waiting.add((number, file))
        for ticket in granted(slots):
            waiting.remove(ticket)
            running.append(ticket)
        assert len(running) <= 5
        if running and generator.random() < 0.6:
            slots.release(large=running.pop(generator.randrange(len(running)))[1] is not None)  # type: ignore[index]
    while running:
        slots.release(large=running.pop()[1] is not None)  # type: ignore[index]
        for ticket in granted(slots):
            waiting.remove(ticket)
            running.append(ticket)
    assert not waiting


def test_the_schedule_tells_what_is_due_and_forgets_what_was_moved() -> None:
    schedule = Schedule()
    schedule.put(1, 10.0)
    schedule.put(2, 5.0)
    schedule.put(1, 3.0)
    schedule.put(3, 4.0)
    schedule.remove(3)
    assert len(schedule) == 2 and schedule.next_s() == 3.0
    assert schedule.pop_due(4.0) == [1] and schedule.pop_due(100.0) == [2]
    assert schedule.next_s() is None


# Metadata


def test_attributes_come_back_from_metadata() -> None:
    attributes = Attributes(0o640, 5, 6, 99, xattrs={b"user.a": b"\0\xff"})
    metadata = metadata_of(attributes, 1_700_000_000_123_456_789)
    assert metadata["mtime"] == "1700000000.123456789" and metadata["mode"] == "640"
    found, mtime_ns = attributes_of({name.title(): value for name, value in metadata.items()}, 99)
    assert found == attributes and mtime_ns == 1_700_000_000_123_456_789


def test_xattrs_that_do_not_fit_are_left_out() -> None:
    attributes = Attributes(0o640, 5, 6, 99, xattrs={b"user.a": b"x" * 1900})
    metadata = with_id(metadata_of(attributes, 1), SentId("a" * 40, "b" * 20), checksum_text([1]))
    assert "sluice-xattrs" not in metadata
    assert sum(len(name) + len(value) for name, value in metadata.items()) <= METADATA_BYTES_MAX


@pytest.mark.parametrize(
    "metadata", [{}, {"mode": "x"}, {"mtime": "-1"}, {"mtime": "a.b"}, {"mode": "644", "sluice-xattrs": "?"}]
)
def test_metadata_that_makes_no_sense_counts_as_absent(metadata: dict[str, str]) -> None:
    attributes, mtime_ns = attributes_of(metadata, 0)
    assert mtime_ns == 0 and (attributes is None or attributes.xattrs == {})


SOURCE = ObjectVersion("d/file", '"1"', 10)


def test_restating_keeps_what_others_wrote() -> None:
    present = {"Owner": "me", "mode": "644", "uid": "1", "gid": "1", "mtime": "5.0", "sluice-id": "a.b"}
    changed = restated(present, Attributes(0o600, 2, 3, 0), 0, SOURCE)
    assert changed.pop("sluice-restated")
    assert changed == {
        "owner": "me",
        "mode": "600",
        "uid": "2",
        "gid": "3",
        "mtime": "5.0",
        "sluice-id": "a.b",
    }


def test_what_restating_made_says_of_which_version_it_is_made() -> None:
    metadata = restated({"owner": "me"}, Attributes(0o600, 2, 3, 0), 7, SOURCE)
    made = ObjectInfo(ObjectVersion("d/file", '"2"', 10), 1, metadata)
    assert is_restated(made, SOURCE)
    again = restated(metadata, Attributes(0o640, 2, 3, 0), 7, made.version)
    assert is_restated(replace(made, metadata=again), made.version)
    assert not is_restated(replace(made, metadata=again), SOURCE)


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {}},
        {"metadata": {"sluice-restated": ""}},
        {"version": ObjectVersion("d/other", '"2"', 10)},
        {"version": ObjectVersion("d/file", '"2"', 11)},
    ],
)
def test_what_somebody_else_wrote_is_not_taken_for_restated(change: dict[str, Any]) -> None:
    metadata = restated({"owner": "me"}, Attributes(0o600, 2, 3, 0), 7, SOURCE)
    made = ObjectInfo(ObjectVersion("d/file", '"2"', 10), 1, metadata)
    assert not is_restated(replace(made, **change), SOURCE)
    for name in metadata:
        assert not is_restated(replace(made, metadata={**metadata, name: "8.0"}), SOURCE)


def test_a_mark_that_has_no_room_is_left_out() -> None:
    present = {"owner": "x" * (METADATA_BYTES_MAX - 60)}
    assert "sluice-restated" not in restated(present, Attributes(0o600, 2, 3, 0), 7, SOURCE)
