"""What the index stores and what goes over the socket: packing, counting and framing."""

from __future__ import annotations

import random
from array import array
from itertools import pairwise

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from cache import errors, messages
from cache.messages import Answer, Asked, FrameReader, Invalidate
from cache.model import (
    BLOCK_BYTES,
    GROUP_BLOCKS,
    GROUP_BYTES,
    GroupIndex,
    ObjectVersion,
    blocks_in_group,
    group_count,
)
from cache.records import (
    PAGE_BYTES,
    BlockChecksums,
    Group,
    VersionRow,
    block_checksums,
    charge,
    decode_version,
    encode,
    group_key,
    range_mask,
)

SIZES = st.one_of(
    st.integers(1, 3 * GROUP_BYTES),
    st.sampled_from(
        [1, PAGE_BYTES, BLOCK_BYTES - 1, BLOCK_BYTES, GROUP_BYTES, GROUP_BYTES + 1, 3 * GROUP_BYTES]
    ),
)


@given(
    generation=st.integers(0, 2**64 - 1),
    checksums=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=GROUP_BLOCKS),
    present=st.integers(0, 2**64 - 1),
)
def test_a_group_survives_packing(generation: int, checksums: list[int], present: int) -> None:
    present &= (1 << len(checksums)) - 1
    group = Group.unpack(Group(generation, present, array("Q", checksums)).pack())
    assert (group.generation, group.present, list(group.checksums)) == (generation, present, checksums)


@given(size=SIZES, data=st.data())
def test_present_bytes_count_the_object_and_not_the_blocks(size: int, data: st.DataObject) -> None:
    """Against the plain count, for every group: the last block of the last one is short."""
    for number in range(group_count(size)):
        blocks = blocks_in_group(size, GroupIndex(number))
        present = data.draw(st.integers(0, (1 << blocks) - 1))
        group = Group(0, present, array("Q", bytes(8 * blocks)))
        start = number * GROUP_BYTES
        expected = sum(
            min(BLOCK_BYTES, size - start - i * BLOCK_BYTES) for i in range(blocks) if present >> i & 1
        )
        assert group.present_bytes(number, size) == expected
        assert group.charged_bytes(number, size) == charge(expected)
        assert group.is_complete == (present == (1 << blocks) - 1)


@given(size=SIZES)
def test_a_complete_object_is_charged_the_same_by_groups_as_whole(size: int) -> None:
    charged = 0
    for number in range(group_count(size)):
        blocks = blocks_in_group(size, GroupIndex(number))
        charged += Group.empty(blocks).with_blocks(0, [1] * blocks).charged_bytes(number, size)
    assert charged == charge(size)


def test_blocks_are_added_and_the_rest_stays() -> None:
    group = Group.empty(10, generation=7).with_blocks(2, [20, 30]).with_blocks(9, [90])
    assert group.present == 0b10_0000_1100
    assert list(group.checksums) == [0, 0, 20, 30, 0, 0, 0, 0, 0, 90]
    assert group.generation == 7


def test_a_mask_that_exceeds_the_groups_blocks_is_refused() -> None:
    with pytest.raises(AssertionError):
        Group(0, 0b100, array("Q", [1, 2]))


def test_the_mask_of_a_range_includes_both_ends() -> None:
    assert range_mask(0, 0) == 1
    assert range_mask(3, 5) == 0b111000
    assert range_mask(0, 63) == 2**64 - 1


@pytest.mark.parametrize("length", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES])
def test_each_block_has_its_checksum(length: int) -> None:
    body = bytes(i % 251 for i in range(length))
    expected = [xxhash.xxh3_64_intdigest(body[i : i + BLOCK_BYTES]) for i in range(0, length, BLOCK_BYTES)]
    assert block_checksums(body) == expected
    assert block_checksums(memoryview(bytearray(body))) == expected


@given(st.lists(st.integers(0, 3 * BLOCK_BYTES), max_size=8), st.randoms())
def test_pieces_of_any_size_have_the_checksums_of_the_whole(
    sizes: list[int], generator: random.Random
) -> None:
    pieces, checksums = [generator.randbytes(size) for size in sizes], BlockChecksums()
    for piece in pieces:
        checksums.add(memoryview(piece))
    assert checksums.end() == block_checksums(b"".join(pieces))


def test_a_version_row_keeps_keys_that_are_no_utf8() -> None:
    version = ObjectVersion("d/\udcff\udc80.bin", '"e"', 5)
    key = version.key.encode("utf-8", "surrogateescape")
    row = decode_version(encode(VersionRow(key, version.etag, version.size_bytes, 1, True)))
    assert row.version == version
    assert row.version.id == version.id


def test_versions_differ_by_key_etag_and_size() -> None:
    one = ObjectVersion("k", "e", 1)
    assert (
        len(
            {
                one.id,
                ObjectVersion("l", "e", 1).id,
                ObjectVersion("k", "f", 1).id,
                ObjectVersion("k", "e", 2).id,
            }
        )
        == 4
    )
    assert len(one.id) == 16
    assert len(group_key(one.id, 70_000)) == 20


MESSAGES = [
    Asked(1, messages.Lookup(1, b"n\xff")),
    Asked(2, messages.List(7)),
    Asked(3, messages.Fetch(7, 1 << 40, 4096)),
    Asked(4, messages.ReadThrough(7, 0, 1)),
    Asked(5, messages.Corrupt(b"v" * 16, 3)),
    Asked(0, messages.Used([b"v" * 16, b"v" * 20], [7, 2**40], [1.5, 1.75])),
    Asked(0, messages.ReadSeen([(7, 0, 1)])),
    Asked(0, messages.RelistAhead(1)),
]


def test_every_request_survives_the_socket() -> None:
    reader = FrameReader()
    frames = reader.feed(b"".join(map(messages.frame, MESSAGES)))
    assert [messages.decode_asked(frame) for frame in frames] == MESSAGES


def test_answers_and_invalidations_survive_the_socket() -> None:
    sent = [
        Answer(9, body=b"x" * 1000),
        Answer(1, "CacheFull", "why", 1),
        Invalidate([(1, b"a"), (2, b"\xff")]),
    ]
    frames = FrameReader().feed(b"".join(map(messages.frame, sent)))
    assert [messages.decode_from_mover(frame) for frame in frames] == sent


@given(
    sizes=st.lists(st.integers(0, 5000), max_size=10),
    cuts=st.lists(st.integers(0, 60_000), max_size=30),
)
def test_frames_come_out_whole_however_the_stream_is_cut(sizes: list[int], cuts: list[int]) -> None:
    sent = [Answer(i, body=bytes([i]) * size) for i, size in enumerate(sizes)]
    stream = b"".join(map(messages.frame, sent))
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    reader, received = FrameReader(), []
    for start, end in pairwise(edges):
        received += reader.feed(stream[start:end])
    assert [messages.decode_from_mover(frame) for frame in received] == sent
    assert reader.feed(b"") == []


def test_a_stream_byte_by_byte_gives_its_frames() -> None:
    stream, reader, received = b"".join(map(messages.frame, MESSAGES)), FrameReader(), []
    for i in range(len(stream)):
        received += reader.feed(stream[i : i + 1])
    assert len(received) == len(MESSAGES)


def test_a_frame_over_the_limit_is_an_error_before_its_bytes_come() -> None:
    with pytest.raises(ValueError, match="frame of"):
        FrameReader().feed((messages.FRAME_BYTES_MAX + 1).to_bytes(4, "little"))


@pytest.mark.parametrize("kind", [errors.ObjectChanged, errors.CacheFull, errors.SluiceError])
def test_an_error_is_the_same_on_the_other_side(kind: type[errors.SluiceError]) -> None:
    with pytest.raises(kind, match=r"^the text$") as caught:
        messages.raise_failure(messages.failure(1, kind("the text")))
    assert type(caught.value) is kind


def test_an_error_may_name_what_is_no_utf8() -> None:
    """The mover could not tell it, ended, and so did the next one, which was asked again."""
    answer = messages.failure(1, errors.NameRefused("d/\udcfe: the lake takes only UTF-8"))
    (packed,) = messages.FrameReader().feed(messages.frame(answer))
    assert messages.decode_from_mover(packed) == answer
    with pytest.raises(errors.NameRefused, match=r"d/\\udcfe: the lake"):
        messages.raise_failure(answer)


def test_an_error_that_this_side_does_not_know_is_still_an_error() -> None:
    with pytest.raises(errors.SluiceError, match="new"):
        messages.raise_failure(Answer(1, error="FromTheFuture", text="new"))
