"""How large files are read: records, streams and passes, on traces as the kernel sends them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from hypothesis import given
from hypothesis import strategies as st

from cache.model import GIB, KIB, MIB
from cache.policy.amplification import Amplification, Traffic
from cache.policy.hands import _FILES_MAX, _IDLE_S, Hands
from cache.policy.readahead import SequentialReadAhead
from cache.policy.records import REQUEST_BYTES, Access, RecordReads, Want

VID = b"v" * 16
PAGE = 4 * KIB
SIZE = 4 * GIB

Read = tuple[int, int]


def pread(offset: int, length: int) -> Read:
    """Return the one READ that a read(2) at random becomes: its whole pages."""
    start = offset // PAGE * PAGE
    return start, -(-(offset + length) // PAGE) * PAGE - start


def faults(offset: int, length: int) -> Iterator[Read]:
    """Yield the READs of page faults once the kernel has seen that they lie apart: a page each."""
    start, size = pread(offset, length)
    yield from ((page, PAGE) for page in range(start, start + size, PAGE))


def swept(size: int, threads: int, tensors: int, seed: int) -> Iterator[Read]:
    """Yield the READs of threads that fault in a tensor each: 1 MiB at a time, as the kernel reads ahead."""
    generator = random.Random(seed)
    bounds = [size * number // tensors // PAGE * PAGE for number in range(tensors + 1)]
    waiting, at_work = list(range(tensors)), dict[int, int]()
    while waiting or at_work:
        while waiting and len(at_work) < threads:
            tensor = waiting.pop(0)
            at_work[tensor] = bounds[tensor]
        tensor = generator.choice(list(at_work))
        offset = at_work.pop(tensor)
        end = min(offset + MIB, bounds[tensor + 1])
        yield offset, end - offset
        if end < bounds[tensor + 1]:
            at_work[tensor] = end


def told(policy: RecordReads, reads: Iterable[Read], size: int = SIZE, vid: bytes = VID) -> list[Want]:
    return [policy.read(vid, offset, length, size) for offset, length in reads]


def hdf5(records: int, record_bytes: int, seed: int) -> list[int]:
    """Return the offsets of samples that lie behind a header, in shuffled order."""
    order = [2048 + number * record_bytes for number in range(records)]
    random.Random(seed).shuffle(order)
    return order


def amplification(wants: list[Want], reads: list[Read]) -> float:
    """Return what would be fetched over what was read, had each been missing: in whole units or exactly."""
    fetched = 0
    for want in wants:
        unit = 16 * KIB if want.is_exact else MIB
        fetched += -(-want.demand.stop // unit) * unit - want.demand.start // unit * unit
    return fetched / sum(length for _, length in reads)


def test_samples_of_an_hdf5_file_are_fetched_by_themselves() -> None:
    policy = RecordReads()
    reads = [pread(0, 512), *(pread(offset, 100_000) for offset in hdf5(40_000, 100_000, 1)[:500])]
    wants = told(policy, reads)
    assert policy.access(VID) is Access.RANDOM
    assert 98_000 <= policy.record_bytes(VID) <= 108_000
    late = slice(40, None)
    assert all(want.is_exact and not want.may_stream for want in wants[late])
    assert amplification(wants[late], reads[late]) < 1.25


def test_a_first_reads_unit_is_the_usual_one() -> None:
    (want,) = told(RecordReads(), [(GIB, 100_000)])
    assert not want.is_exact and want.demand == range(GIB, GIB + 100_000)


def test_of_tokens_that_are_faulted_in_by_pages_a_whole_record_is_fetched_at_its_first() -> None:
    """16 KiB windows of a mapped token file at random offsets."""
    policy, generator = RecordReads(), random.Random(2)
    starts = [generator.randrange(0, SIZE - 16 * KIB, PAGE) for _ in range(60)]
    for start in starts[:-1]:
        told(policy, faults(start, 16 * KIB))
    assert policy.access(VID) is Access.RANDOM
    first, *rest = told(policy, faults(starts[-1], 16 * KIB))
    assert first.is_exact
    assert first.demand == range(starts[-1], starts[-1] + 16 * KIB)
    assert all(want.demand.stop == first.demand.stop for want in rest)


def test_more_is_expected_of_a_record_that_turns_out_long() -> None:
    policy = RecordReads()
    told(policy, [pread(offset, 8192) for offset in hdf5(100_000, 40_000, 3)[:60]])
    requests, there = 0, 3 * GIB
    for want in told(policy, faults(3 * GIB, 512 * KIB)):
        if want.demand.start >= there:  # Else it was fetched with one before it.
            requests, there = requests + 1, want.demand.stop
    assert requests <= 8
    assert there <= 3 * GIB + MIB


def test_a_parquet_file_is_its_footer_and_then_column_chunks_that_are_read_on() -> None:
    policy, readahead = RecordReads(), SequentialReadAhead(64 * MIB)
    told(policy, [pread(SIZE - 8, 8), pread(SIZE - 70_000, 70_000)])
    asked: list[range] = []
    for chunk in range(6):
        start = 100 * MIB + chunk * 600 * MIB
        for offset in range(start, start + 24 * MIB, MIB):
            want = policy.read(VID, offset, MIB, SIZE)
            if want.may_stream:
                ahead = readahead.read(VID, offset, MIB, SIZE, stalled=False, goes_on=True)
                asked += [ahead] if ahead is not None else []
        assert asked and asked[-1].stop >= start + 24 * MIB, "a chunk is read ahead"
        assert asked[-1].stop <= start + 48 * MIB, "and what lies behind it is not"


def test_small_column_chunks_here_and_there_are_records() -> None:
    policy, generator = RecordReads(), random.Random(4)
    for _ in range(60):
        start = generator.randrange(0, SIZE - MIB, PAGE)
        told(policy, [(start + i * 128 * KIB, 128 * KIB) for i in range(4)])
    assert policy.access(VID) is Access.RANDOM
    assert 384 * KIB <= policy.record_bytes(VID) <= MIB


def test_reading_on_from_the_start_is_a_stream_and_a_pass() -> None:
    policy = RecordReads()
    wants = told(policy, [(offset, 128 * KIB) for offset in range(0, 32 * MIB, 128 * KIB)])
    assert all(not want.is_exact and want.may_stream for want in wants)
    assert policy.access(VID) is Access.STREAM
    assert policy.take_use(VID) is Access.STREAM
    assert policy.take_use(VID) is None  # Once a pass.


def test_each_pass_over_a_shard_is_one_use() -> None:
    policy, size, uses = RecordReads(), 20 * MIB, 0
    for _ in range(3):
        for offset in range(0, size, 128 * KIB):
            policy.read(VID, offset, 128 * KIB, size)
            uses += policy.take_use(VID) is not None
    assert uses == 3


def test_a_look_at_the_head_of_a_file_is_no_pass() -> None:
    policy = RecordReads()
    told(policy, [(0, 128 * KIB), (128 * KIB, 128 * KIB)])
    assert policy.take_use(VID) is None


def test_reads_that_come_out_of_order_are_one_run() -> None:
    policy, generator = RecordReads(), random.Random(5)
    offsets = list(range(0, 64 * MIB, 128 * KIB))
    for start in range(0, len(offsets), 16):
        batch = offsets[start : start + 16]
        generator.shuffle(batch)
        offsets[start : start + 16] = batch
    told(policy, [(offset, 128 * KIB) for offset in offsets])
    assert policy.access(VID) is Access.STREAM
    assert policy.record_bytes(VID) == 0


def test_a_safetensors_load_is_one_sweep_whatever_the_threads() -> None:
    for threads in (1, 4, 16):
        policy, readahead, size = RecordReads(), SequentialReadAhead(80 * MIB), GIB
        fetched, most_ahead, seen = set[int](), 0, set[int]()
        for offset, length in swept(size, threads, 96, seed=threads):
            want = policy.read(VID, offset, length, size)
            assert not want.is_exact
            seen |= set(range(offset // MIB, -(-(offset + length) // MIB)))
            if want.may_stream:
                ahead = readahead.read(VID, offset, length, size, stalled=True, goes_on=True)
                fetched |= (
                    set(range(ahead.start // MIB, -(-ahead.stop // MIB))) if ahead is not None else set()
                )
            most_ahead = max(most_ahead, len(fetched - seen))
        assert policy.access(VID) is Access.STREAM
        assert len(fetched) > 0.8 * size / MIB, "most of it is fetched before its faults"
        assert most_ahead >= 64, "in large windows"


def test_random_records_near_streams_do_not_make_these_random() -> None:
    policy, generator = RecordReads(), random.Random(6)
    told(policy, [pread(generator.randrange(SIZE - MIB), 50_000) for _ in range(60)])
    wants = told(policy, [(GIB + offset, 128 * KIB) for offset in range(0, 16 * MIB, 128 * KIB)])
    assert wants[-1].may_stream and not wants[-1].is_exact


def test_files_beside_those_that_are_read_in_records_are_taken_for_such_at_once() -> None:
    policy = RecordReads()
    for number in range(3):
        reads = [pread(offset, 100_000) for offset in hdf5(1000, 100_000, number)[:40]]
        wants = [policy.read(bytes([number]) * 16, *read, SIZE, "train") for read in reads]
        assert wants[0].is_exact == (number == 2), number
    assert not policy.read(b"o" * 16, *pread(GIB, 100_000), SIZE, "other").is_exact


def test_a_file_that_is_read_on_beside_those_is_a_stream_all_the_same() -> None:
    policy = RecordReads()
    for number in range(2):
        for offset in hdf5(1000, 100_000, number)[:40]:
            policy.read(bytes([number]) * 16, *pread(offset, 100_000), SIZE, "train")
    wants = [policy.read(VID, offset, 128 * KIB, SIZE, "train") for offset in range(0, 8 * MIB, 128 * KIB)]
    assert wants[0].is_exact and wants[-1].may_stream
    assert not policy.read(b"n" * 16, 0, 128 * KIB, SIZE, "train").is_exact  # Nor is the next taken for such.


def test_the_whole_file_is_cheaper_once_as_much_was_paid() -> None:
    policy, size, paid = RecordReads(), 512 * MIB, 0
    for offset in hdf5(5000, 100_000, 7):
        policy.read(VID, *pread(offset, 100_000), size)
        policy.fetched(VID, 112 * KIB)
        paid += 1
        if policy.is_whole_cheaper(VID, size - paid * 112 * KIB):
            break
    assert paid * (112 * KIB + REQUEST_BYTES) <= 1.1 * (size + size / (8 * MIB) * REQUEST_BYTES)
    assert 300 < paid < 1000
    policy.emptied(VID)
    assert not policy.is_whole_cheaper(VID, size // 2)


def test_nothing_is_known_of_a_file_that_nobody_read() -> None:
    policy = RecordReads()
    assert policy.access(VID) is Access.FEW
    assert policy.take_use(VID) is None
    assert not policy.is_whole_cheaper(VID, 0)


@given(st.lists(st.tuples(st.integers(0, 64 * MIB - 1), st.integers(1, 2 * MIB)), max_size=200))
def test_what_is_demanded_holds_what_was_read_and_ends_with_the_file(reads: list[Read]) -> None:
    policy, size = RecordReads(), 64 * MIB
    for offset, length in reads:
        want = policy.read(VID, offset, length, size)
        assert want.demand.start == offset
        assert min(offset + length, size) <= want.demand.stop <= size
        assert len(want.demand) <= max(length, 4 * MIB)


def test_the_tables_stay_bounded() -> None:
    policy, traffic, generator = RecordReads(), Amplification(), random.Random(8)
    for number in range(3 * policy.FILES_MAX):
        policy.read(number.to_bytes(16, "big"), 0, PAGE, SIZE)
    for number in range(2 * traffic.FILES_MAX):
        traffic.fetched(number.to_bytes(16, "big"), 1)
    told(policy, [(generator.randrange(SIZE), PAGE) for _ in range(1000)])
    assert len(policy._files) == policy.FILES_MAX
    assert len(traffic._files) == traffic.FILES_MAX
    assert len(policy._files[VID].runs) <= 24


def test_amplification_is_bytes_fetched_over_bytes_read() -> None:
    amplification = Amplification()
    assert amplification.of(VID) is None
    amplification.fetched(VID, 150)
    assert amplification.of(VID) == Traffic(150, 0)
    assert Traffic(150, 0).amplification is None
    amplification.read(VID, 100)
    total = Traffic(50, 100)
    total.add(Traffic(150, 100))
    assert total.amplification == 1.0


def test_what_is_in_hands_is_let_go_at_its_end_or_when_it_is_forgotten() -> None:
    hands = Hands()
    assert hands.take(b"a", 0.0) == []
    assert hands.take(b"b", 1.0) == []
    hands.seen(b"a", _IDLE_S)  # It is read slowly, and not forgotten.
    assert hands.take(b"c", _IDLE_S + 2) == [b"b"]
    assert hands.ended(b"a") and not hands.ended(b"a") and not hands.ended(b"b")
    gone = [vid for number in range(_FILES_MAX + 5) for vid in hands.take(bytes([number]), _IDLE_S + 2)]
    assert len(hands) == _FILES_MAX and len(gone) == 6
