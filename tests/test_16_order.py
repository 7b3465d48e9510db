"""Finding an epoch's order in its first opens, and believing it no longer than it holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.policy.order import told
from cache.policy.order.finder import OPENS_MAX, Finder, Found
from cache.policy.order.following import Following
from cache.policy.order.listings import listings
from cache.policy.order.spec import Spec
from cache.policy.order.upcoming import Order, OrderedUpcoming, order_of_places, order_of_sampler
from cache.policy.sets import Members, SampleSet
from tools.bench.loaders import opens

FILES = 20_000


def image_folder(count: int) -> list[bytes]:
    """Return paths in listing order: classes of fifty images."""
    return [b"class%04d/image_%06d.jpg" % (file // 50, file) for file in range(count)]


def search(finder: Finder, opened: Iterable[int], opens_max: int = OPENS_MAX) -> tuple[Found | None, int]:
    """Return what is found, after how many opens."""
    seen: list[int] = []
    for file in islice(opened, opens_max):
        seen.append(file)
        if finder.wants_look(len(seen)) and (found := finder.find(seen)) is not None:
            return found, len(seen)
    return None, len(seen)


def unused() -> list[bytes]:
    raise AssertionError("the first listing needs no paths")


# --- The finder --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_distributed_samplers_default_is_found_within_64_opens(seed: int) -> None:
    """`sluice bench --only order-found` makes a hundred runs with 50,000 files of it."""
    order = Spec("torch", 0).order(FILES)
    paths = image_folder(FILES)
    found, needed = search(Finder(FILES, lambda: paths), opens(order.tolist(), seed))
    assert found is not None and needed <= 64
    assert np.array_equal(found.files(), order)
    assert found.spec == Spec("torch", 0) and found.listing.name == "names"


def test_the_likeliest_listing_needs_no_paths() -> None:
    order = Spec("torch", 0).order(FILES).tolist()
    found, needed = search(Finder(FILES, unused), iter(order))
    assert found is not None and needed == 16


@pytest.mark.parametrize(
    ("family", "seed"),
    [
        ("torch", 9999),
        ("torch", 20240101 + 17),
        ("torch", 67280421310721 + 3),
        ("torch-loader", 42),
        ("torch-global", 1234),
        ("numpy-legacy", 42),
        ("numpy", 0),
        ("python", 0),
    ],
)
def test_likely_seeds_of_each_family_are_found(family: str, seed: int) -> None:
    order = Spec(family, seed).order(FILES)
    opened = opens(order.tolist(), 1, ranks=1, workers=3, batch=32)
    found, _ = search(Finder(FILES, lambda: image_folder(FILES)), opened)
    assert found is not None and found.spec == Spec(family, seed)


@pytest.mark.parametrize("family", ["webdataset-4-100", "mosaic-shards"])
def test_shuffled_shards_are_found(family: str) -> None:
    order = Spec(family, 42).order(600)
    paths = [b"shard-%06d.tar" % number for number in range(600)]
    opened = opens(order.tolist(), 2, ranks=1, workers=4, batch=1)
    found, _ = search(Finder(600, lambda: paths), opened)
    assert found is not None and found.spec == Spec(family, 42)


@pytest.mark.parametrize("count", [200, 5000, 60_000])
def test_an_order_that_nobody_can_know_is_not_found(count: int) -> None:
    """Not one of the thousands of candidates is believed."""
    order = np.random.default_rng(10**12 + count).permutation(count).tolist()
    finder = Finder(count, lambda: image_folder(count))
    assert search(finder, opens(order, 3))[0] is None
    assert finder.gave_up or len(order) < OPENS_MAX


@pytest.mark.parametrize("order", [list(range(5000)), list(range(4999, -1, -1)), [7] * 300])
def test_what_is_no_shuffle_is_not_taken_for_one(order: list[int]) -> None:
    assert search(Finder(5000, lambda: image_folder(5000)), iter(dict.fromkeys(order)))[0] is None


def test_ranks_that_read_elsewhere_do_not_hide_the_order() -> None:
    order = Spec("torch", 5).order(FILES)
    opened = opens(order.tolist(), 1, ranks=16, workers=4, batch=64, ranks_here=[4, 5, 6, 7])
    found, _ = search(Finder(FILES, lambda: image_folder(FILES)), opened)
    assert found is not None and np.array_equal(found.files(), order)


def test_others_who_read_in_the_set_do_not_hide_the_order() -> None:
    order, generator = Spec("torch", 5).order(FILES), random.Random(3)
    stream = opens(order.tolist(), 1, ranks=1, workers=2, batch=32)
    mixed = (generator.randrange(FILES) if generator.random() < 0.3 else next(stream) for _ in range(256))
    found, _ = search(Finder(FILES, lambda: image_folder(FILES)), dict.fromkeys(mixed))
    assert found is not None and found.spec == Spec("torch", 5)


def test_what_is_expected_is_found_though_its_seed_is_not_likely() -> None:
    spec = Spec("numpy", 987654321, 3, "continue")
    order = spec.order(FILES).tolist()
    assert search(Finder(FILES, lambda: image_folder(FILES)), opens(order, 1))[0] is None
    found, needed = search(Finder(FILES, unused, [spec]), opens(order, 1))
    assert found is not None and found.spec == spec and needed <= 64


# --- Listings ----------------------------------------------------------------------------------

TREE = [
    b"a-b/1.jpg",
    b"a-b/10.jpg",
    b"a-b/2.jpg",
    b"a/1.jpg",
    b"a/1.txt",
    b"a/sub/1.jpg",
    b"a/z.jpg",
    b"top.jpg",
]


def by_names(paths: Sequence[bytes]) -> list[bytes]:
    return sorted(paths, key=lambda path: path.split(b"/"))


def listed(paths: list[bytes], opened: Sequence[int]) -> dict[str, list[bytes]]:
    return {
        one.name: [paths[file] for file in one.files] for one in listings(len(paths), lambda: paths, opened)
    }


def test_the_listings_are_those_that_scripts_make() -> None:
    paths = by_names(TREE)
    found = listed(paths, [0])
    assert found["names"] == paths
    assert found["paths"] == sorted(paths)
    assert found["names of .jpg"] == [path for path in paths if path.endswith(b".jpg")]
    assert found["walk"] == [
        *(b"top.jpg", b"a/1.jpg", b"a/1.txt", b"a/z.jpg", b"a/sub/1.jpg"),
        *(b"a-b/1.jpg", b"a-b/10.jpg", b"a-b/2.jpg"),
    ]
    natural = [path for path in found["natural"] if path.startswith(b"a-b/")]
    assert natural == [b"a-b/1.jpg", b"a-b/2.jpg", b"a-b/10.jpg"]


@pytest.mark.parametrize("name", ["paths", "natural", "names of .jpg"])
def test_an_order_over_another_listing_is_found(name: str) -> None:
    """Directories whose names begin with each other's, images beside labels, numbers without zeros."""
    paths = by_names(
        [
            b"%s/%d.%s" % (top, number, suffix)
            for top in (b"a", b"a-b")
            for number in range(2000)
            for suffix in (b"jpg", b"txt")
        ]
    )
    listing = next(one for one in listings(len(paths), lambda: paths, [0]) if one.name == name)
    order = listing.files[Spec("torch", 42).order(len(listing))].tolist()
    found, _ = search(Finder(len(paths), lambda: paths), opens(order, 5, ranks=1, workers=2, batch=64))
    assert found is not None and found.files().tolist() == order


# --- Following ---------------------------------------------------------------------------------


def follow(following: Following, opened: Iterable[int]) -> int:
    """Note opens until the order is dropped; return how many that took, or all."""
    count = 0
    for file in opened:
        following.note_open(file)
        count += 1
        if not following.holds:
            break
    return count


TWO_RANKS = {"ranks": 2, "workers": 4, "batch": 256}
ONE_READER = {"ranks": 1, "workers": 1, "batch": 1}
MANY_RANKS = {"ranks": 8, "workers": 8, "batch": 64}
RANKS_ELSEWHERE = {"ranks": 16, "workers": 4, "batch": 64, "ranks_here": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("count", "loader"),
    [
        (1000, TWO_RANKS),
        (1000, ONE_READER),
        *((FILES, loader) for loader in (TWO_RANKS, ONE_READER, MANY_RANKS, RANKS_ELSEWHERE)),
    ],
)
def test_the_right_order_holds_to_the_end(count: int, loader: dict[str, Any]) -> None:
    order = Spec("torch", 1).order(count)
    opened = list(opens(order.tolist(), 7, **loader))
    assert follow(Following(order, count), opened) == len(opened)


@pytest.mark.parametrize("count", [1000, 5000, FILES])
@pytest.mark.parametrize("seed", range(5))
def test_a_wrong_order_is_believed_for_at_most_64_opens(count: int, seed: int) -> None:
    right, wrong = Spec("torch", 1).order(count), Spec("torch", 100 + seed).order(count)
    fresh = Following(wrong, count, grace=0)
    assert follow(fresh, opens(right.tolist(), seed, batch=64)) <= 64

    half = count // 2  # It was right until now.
    following = Following(right, count)
    follow(following, opens(right[:half].tolist(), seed, batch=64))
    assert following.holds
    seen = set(right[:half].tolist())
    rest = [file for file in opens(wrong.tolist(), seed, batch=64) if file not in seen]
    assert follow(following, rest) <= 64


def fetched_late(count: int, window: int, loader: dict[str, Any]) -> tuple[float, int]:
    """Return the share of opens that the upcoming files did not foresee, and how many were fetched.

    Every 32 opens what is upcoming is fetched, up to *window* files that nobody opened yet.
    """
    order = Spec("torch", 1).order(count)
    following, wanted, late = Following(order, count), np.ones(count, np.bool_), 0
    ahead: set[int] = set()
    opened = list(opens(order.tolist(), 3, **loader))
    for number, file in enumerate(opened):
        late += number >= 64 and bool(wanted[file])
        following.note_open(file)
        wanted[file] = False
        if number % 32 == 0:
            ahead = following.still_due(ahead)
            coming = following.upcoming(max(0, window - len(ahead)), wanted)
            wanted[coming] = False
            ahead.update(coming)
    return late / len(opened), count - int(wanted.sum())


@pytest.mark.parametrize(
    "loader", [{"ranks": 2, "workers": 4, "batch": 128}, {"ranks": 1, "workers": 4, "batch": 32}]
)
def test_with_room_for_a_tenth_of_the_set_next_to_no_open_comes_unforeseen(loader: dict[str, Any]) -> None:
    late, _ = fetched_late(FILES, FILES // 10, loader)
    assert late < 0.01


def test_what_ranks_elsewhere_read_is_not_fetched_for_long() -> None:
    loader = {"ranks": 16, "workers": 4, "batch": 16, "ranks_here": [0, 1, 2, 3]}
    late, fetched = fetched_late(FILES, FILES // 10, loader)
    assert late < 0.05
    assert fetched < 0.4 * FILES


def test_batches_that_other_processes_read_are_left_out_too() -> None:
    """accelerate deals whole batches: of four processes one reads here."""
    order, batch = Spec("torch", 0).order(FILES), 8
    following = Following(order, FILES)
    for start in range(0, FILES, 4 * batch):
        for file in order[start : start + batch]:
            following.note_open(int(file))
    assert following.share_here() == 0.25


def test_upcoming_files_are_the_ones_behind_the_readers_first() -> None:
    following = Following(np.arange(100, dtype=np.uint32), 100)
    for file in (0, 1, 40, 41):
        following.note_open(file)
    assert following.upcoming(6) == [2, 42, 3, 43, 4, 44]
    wanted = np.ones(100, np.bool_)
    wanted[[2, 3, 43]] = False
    assert following.upcoming(3, wanted) == [42, 4, 44]


def test_a_file_that_the_order_has_twice_counts_once() -> None:
    following = Following(np.array([4, 5, 6, 4], np.uint32), 8)
    following.note_open(4)
    following.note_open(4)
    assert following.opens == 1
    assert following.upcoming(9) == [5, 6, 4] or following.upcoming(9) == [5, 6]
    following.note_open(7)  # Not in it.
    assert [following.due_at(file) for file in (5, 6)] == [1, 2]


@given(
    count=st.integers(1, 200),
    seed=st.integers(0, 99),
    opened=st.lists(st.integers(0, 199), max_size=150),
    limit=st.integers(0, 50),
)
def test_upcoming_is_never_opened_or_unwanted_nor_too_much(
    count: int, seed: int, opened: list[int], limit: int
) -> None:
    following = Following(Spec("torch", seed).order(count), count)
    known = [file for file in opened if file < count]
    for file in known:
        following.note_open(file)
    wanted = np.arange(count) % 3 != 0
    coming = following.upcoming(limit, wanted)
    assert len(coming) <= limit and len(set(coming)) == len(coming)
    assert not set(coming) & set(known)
    assert all(wanted[file] for file in coming)


# --- A set's upcoming files --------------------------------------------------------------------


class InListingOrder:
    def used(self, places: Sequence[int], now_s: float) -> None:
        pass

    def epoch_began(self, epoch: int) -> None:
        pass

    def next_place(self, status: bytearray, frontier: int | None) -> int | None:
        place = status.find(0)
        return None if place < 0 else place


Work = tuple[Callable[[], Order | None], Callable[[Order | None], None]]


def at_once(work: Callable[[], Order | None], then: Callable[[Order | None], None]) -> None:
    then(work())


def upcoming_of(count: int, search: Callable[..., None] = at_once) -> OrderedUpcoming:
    return OrderedUpcoming(count, lambda: image_folder(count), search, InListingOrder())


def taken(upcoming: OrderedUpcoming, status: bytearray, count: int) -> list[int]:
    """Return the next places, marking each as fetched ahead."""
    places = []
    while len(places) < count and (place := upcoming.next_place(status, None)) is not None:
        status[place] = 2
        places.append(place)
    return places


def test_until_the_order_is_known_the_fallback_answers() -> None:
    upcoming, status = upcoming_of(5000), bytearray(5000)
    assert (upcoming.name, upcoming.is_known) == ("unknown", False)
    assert taken(upcoming, status, 3) == [0, 1, 2]


def test_once_it_is_found_what_comes_next_is_what_is_read_next() -> None:
    order = Spec("torch", 3).order(5000).tolist()
    upcoming, status = upcoming_of(5000), bytearray(5000)
    for place in order[:20]:
        upcoming.used([place], 0.0)
        status[place] = 1
    assert upcoming.is_known and upcoming.name == "torch with seed 3"
    assert taken(upcoming, status, 40) == order[20:60]


def test_the_window_moves_with_the_readers() -> None:
    """Asked for all it has, it stays a bounded number of files ahead; each use lets it go on."""
    order = Spec("torch", 3).order(5000).tolist()
    upcoming, status = upcoming_of(5000), bytearray(5000)
    upcoming.lead_s = 0.25
    for number, place in enumerate(order[:20]):
        upcoming.used([place], number / 100)
        status[place] = 1
    ahead = taken(upcoming, status, 5000)
    assert 48 <= len(ahead) <= 300
    for number, place in enumerate(order[20:100], 20):
        upcoming.used([place], number / 100)
        status[place] = 1
    further = taken(upcoming, status, 5000)
    assert 16 <= len(further) <= 250 and not set(further) & set(ahead)


@pytest.mark.parametrize(("rate", "lead_s", "most"), [(100, 0.3, 110), (2000, 0.3, 1300), (2000, 0.02, 130)])
def test_the_window_is_as_small_as_rate_and_latency_allow(rate: int, lead_s: float, most: int) -> None:
    """One reader goes through the order at *rate* files a second: all that it reads was asked for in time."""
    order = Spec("torch", 3).order(5000).tolist()
    upcoming, status, asked_at = upcoming_of(5000), bytearray(5000), dict[int, int]()
    upcoming.lead_s = lead_s
    windows, late = [], 0
    for number, place in enumerate(order[:4000]):
        late += number > 1000 and number - asked_at.get(place, number) < rate * lead_s
        upcoming.used([place], number / rate)
        status[place] = 1
        if upcoming.is_known:
            asked_at |= dict.fromkeys(taken(upcoming, status, 5000), number)
        windows.append(status.count(2))
    assert max(windows[1000:]) <= most and late == 0


@pytest.mark.parametrize("advance", ["reseed", "repeat"])
def test_the_next_epochs_follow_from_the_first(advance: str) -> None:
    """torch's generator anew with the same seed, or set_epoch: the second epoch tells which."""
    upcoming = upcoming_of(5000)
    for epoch in range(4):
        if epoch:
            upcoming.epoch_began(epoch + 1)
        assert upcoming.is_known == (epoch >= 2)  # Then from the first moment on, without a search.
        order = Spec("torch", 11, epoch, advance).order(5000).tolist()
        for place in order[:300]:
            upcoming.used([place], 0.0)
        assert upcoming.is_known
        status = bytearray(5000)
        for place in order[:300]:
            status[place] = 1
        assert taken(upcoming, status, 10) == order[300:310]


@pytest.mark.parametrize("advance", ["reseed", "repeat"])
def test_of_several_next_orders_none_says_what_may_leave_before_opens_confirm_it(advance: str) -> None:
    upcoming = upcoming_of(5000)
    for place in Spec("torch", 11).order(5000).tolist():
        upcoming.used([place], 0.0)
    upcoming.epoch_began(2)
    order = Spec("torch", 11, 1, advance).order(5000).tolist()
    likeliest = Spec("torch", 11, 1, "reseed").order(5000).tolist()
    for place in order[:16]:
        upcoming.used([place], 0.0)
        assert (upcoming.is_known, upcoming.name, upcoming.due(order[100])) == (False, "unknown", None)
    status = bytearray(5000)
    for place in order[:16]:
        status[place] = 1
    assert (taken(upcoming, status, 1) == likeliest[16:17]) == (advance == "reseed")
    for place in order[16:64]:
        upcoming.used([place], 0.0)
    assert upcoming.is_known and upcoming.due(order[100]) == 5100


def test_an_order_that_nobody_finds_is_looked_for_ever_less_often_and_found_all_the_same() -> None:
    looks: list[int] = []

    def search(work: Callable[[], Order | None], then: Callable[[Order | None], None]) -> None:
        looks.append(epoch)
        then(work())

    upcoming = upcoming_of(200, search)
    for epoch in range(40):
        if epoch:
            upcoming.epoch_began(epoch + 1)
        for place in random.Random(f"nobody knows {epoch}").sample(range(200), 200):
            upcoming.used([place], 0.0)
    assert sorted(set(looks)) == [0, 1, 2, 4, 8, 16, 32]
    for epoch in range(40, 49):
        upcoming.epoch_began(epoch + 1)
        for place in Spec("torch", 3, epoch, "repeat").order(200).tolist():
            upcoming.used([place], 0.0)
        assert upcoming.is_known == (epoch >= 48)


def test_an_order_that_stops_holding_is_dropped_and_not_found_again_in_this_epoch() -> None:
    order = Spec("torch", 3).order(5000).tolist()
    other = np.random.default_rng(10**12).permutation(5000).tolist()
    upcoming = upcoming_of(5000)
    for place in order[:500]:
        upcoming.used([place], 0.0)
    assert upcoming.is_known
    rest = [place for place in other if place not in set(order[:500])]
    for place in rest[:64]:
        upcoming.used([place], 0.0)
    assert not upcoming.is_known
    for place in rest[64:1000]:
        upcoming.used([place], 0.0)
    assert not upcoming.is_known


def test_one_search_at_a_time_and_none_for_an_epoch_that_is_over() -> None:
    begun: list[Work] = []
    order = Spec("torch", 3).order(5000).tolist()
    upcoming = upcoming_of(5000, lambda work, then: begun.append((work, then)))
    for place in order[:300]:
        upcoming.used([place], 0.0)
    assert len(begun) == 1
    work, then = begun[0]
    upcoming.epoch_began(2)
    then(work())
    assert not upcoming.is_known


def test_a_told_order_is_followed_from_the_start_and_beats_a_search() -> None:
    upcoming, status = upcoming_of(5000), bytearray(5000)
    places = np.random.default_rng(10**12).permutation(5000).astype(np.uint32)
    upcoming.tell(lambda: order_of_places(places, 5000))
    assert (upcoming.name, upcoming.is_known) == ("told", True)
    assert taken(upcoming, status, 20) == places[:20].tolist()


def told_during_an_epoch(
    count: int, read: int, *, of_next: bool
) -> tuple[OrderedUpcoming, SampleSet, list[int]]:
    """Return what comes of an order that is told when *read* files of an epoch of *count* were read."""
    upcoming = OrderedUpcoming(count, unused, at_once, InListingOrder())
    upcoming.is_needed = False  # Nobody looks for it.
    upcoming.lead_s = 0.02
    samples = SampleSet(1, Members(range(2, count + 2), count), upcoming, deep=True)
    now, later = (np.random.default_rng(seed).permutation(count).astype(np.uint32) for seed in (1, 2))
    read_all(samples, now[:read].tolist(), 100.0)
    for place in range(0, count, 10):
        samples.found_resident(place)
    told = later if of_next else now
    upcoming.tell(lambda: order_of_places(told, count))
    return upcoming, samples, told.tolist()


def read_all(samples: SampleSet, places: list[int], now_s: float) -> None:
    while places:
        places = places[samples.used_all(places, [now_s] * len(places)).uses :]


@pytest.mark.parametrize(("count", "read"), [(2000, 2000), (20_000, 20_000), (20_000, 10_000)])
def test_an_order_that_is_told_for_the_next_epoch_is_believed_then(count: int, read: int) -> None:
    upcoming, samples, order = told_during_an_epoch(count, read, of_next=True)
    assert not upcoming.is_known
    assert upcoming.due_later(order[7]) == upcoming._passes * count + count + 7
    while (place := samples.take()) is not None:
        assert not samples.is_used(place)
    read_all(samples, order[:600], 200.0)
    assert samples.epoch == 2 and upcoming.name == "told"
    samples.look_again()
    assert [samples.take() for _ in range(40)] == order[600:640]


@pytest.mark.parametrize("read", [0, 30, 1000, 4500, 15_000])
def test_an_order_that_is_told_for_the_running_epoch_is_believed_at_once(read: int) -> None:
    upcoming, samples, order = told_during_an_epoch(20_000, read, of_next=False)
    assert upcoming.name == "told"
    assert [samples.take() for _ in range(40)] == order[read : read + 40]


def test_what_was_told_some_time_ago_is_no_order_of_an_epoch_that_does_not_read_it() -> None:
    upcoming = OrderedUpcoming(5000, unused, at_once, InListingOrder())
    upcoming.is_needed = False
    upcoming.used(list(range(0, 5000, 7)), 1.0)
    places = np.random.default_rng(3).permutation(5000).astype(np.uint32)
    upcoming.tell(lambda: order_of_places(places, 5000), is_news=False)
    upcoming.epoch_began(2)
    assert not upcoming.is_known


@pytest.mark.parametrize("world", [1, 2, 8])
def test_opens_of_some_ranks_fit_the_order_of_all(world: int) -> None:
    order, other = (np.random.default_rng(seed).permutation(8000).astype(np.uint32) for seed in (1, 2))
    opened = order[3 % world :: world][:900].tolist()
    random.Random(1).shuffle(opened)
    assert Following(order, 8000).fits(opened)
    assert not Following(other, 8000).fits(opened)


def test_a_told_sampler_leads_from_epoch_to_epoch_for_the_ranks_that_read_here() -> None:
    hint = told.parse(b"sampler=torch seed=9 world=4 ranks=1,3").sampler
    assert hint is not None
    upcoming = upcoming_of(5000)
    upcoming.tell(lambda: order_of_sampler(hint, 5000, lambda: image_folder(5000)))
    for epoch in range(3):
        if epoch:
            upcoming.epoch_began(epoch + 1)
        order = Spec("torch", 9, epoch, "reseed").order(5000)
        here = order.reshape(-1, 4)[:, [1, 3]].reshape(-1).tolist()
        assert taken(upcoming, bytearray(5000), 20) == here[:20]


def test_an_order_is_looked_for_only_while_something_has_to_be_fetched() -> None:
    order = Spec("torch", 3).order(5000).tolist()
    upcoming = upcoming_of(5000)
    upcoming.is_needed = False
    upcoming.used(order[:20], 0.0)
    assert not upcoming.is_known
    upcoming.is_needed = True  # Something has left the tiers.
    upcoming.used(order[20:40], 0.0)
    assert upcoming.name == "torch with seed 3"


def test_an_epoch_that_begins_with_all_of_its_set_resident_needs_no_order() -> None:
    upcoming = upcoming_of(100)
    samples = SampleSet(1, Members(range(2, 102), 100), upcoming, deep=False)
    order, needed = list(range(0, 100, 3)) + list(range(1, 100, 3)) + list(range(2, 100, 3)), []
    for number in range(3):
        for place in order:
            samples.used(place, float(number))
        needed.append(upcoming.is_needed)
    samples.look_again()
    assert samples.epoch == 3 and needed == [True, False, False] and upcoming.is_needed
