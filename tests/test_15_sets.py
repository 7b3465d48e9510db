"""Sample sets and epochs are recognised in generated traces, and what is none is told apart."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.policy.recognise import EVIDENCE, Candidate, Directory, Recogniser
from cache.policy.sets import DONE, OPEN, ListingOrder, Members, Pattern, SampleSet

SIZE = 110_000
ROOT = Directory(1, 10, None)


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """A generator whose seed is the test's name, printed so that a failure tells it."""
    print(f"seed: {request.node.name!r}")
    return random.Random(request.node.name)


class Tree:
    """Directories and files with inodes in the order in which they were made."""

    def __init__(self) -> None:
        self.directories = {1: ROOT}
        self.home: dict[int, Directory] = {}  # File -> where it is.
        self._inode = 1

    def directory(self, parent: Directory = ROOT, entries: int = 0) -> Directory:
        self._inode += 1
        made = self.directories[self._inode] = Directory(self._inode, entries, parent)
        return made

    def files(self, directory: Directory, count: int) -> list[int]:
        made = list(range(self._inode + 1, self._inode + 1 + count))
        self._inode += count
        self.home |= dict.fromkeys(made, directory)
        return made

    def classes(self, count: int, files: int, parent: Directory = ROOT) -> tuple[Directory, list[int]]:
        """Return a directory of class directories, as an ImageFolder is, and all of its files."""
        top = self.directory(parent, entries=count)
        below = [self.files(self.directory(top, entries=files), files) for _ in range(count)]
        return top, [inode for part in below for inode in part]

    def members(self, candidate: Candidate) -> Members:
        found = [inode for inode, home in self.home.items() if self._is_in(home, candidate)]
        return Members(sorted(found), len(found) * SIZE)

    def _is_in(self, home: Directory, candidate: Candidate) -> bool:
        above = home.chain() if candidate.deep else [home]
        return any(directory.inode == candidate.root for directory in above)


class Watcher:
    """What the coordinator does with uses, without its I/O."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.recogniser = Recogniser()
        self.sets: list[SampleSet] = []
        self.uses = 0
        self.found_after: list[int] = []  # For each set, how many uses had been seen.

    def watch(self, trace: Iterable[int], every_s: float = 0.01, start_s: float = 0.0) -> None:
        for number, inode in enumerate(trace):
            self.uses += 1
            self._use(inode, start_s + number * every_s)

    def _use(self, inode: int, now_s: float) -> None:
        for samples in self.sets:
            place = samples.members.place(inode)
            if place is not None:
                samples.used(place, now_s)
                return
        candidate = self.recogniser.used(inode, self.tree.home[inode], now_s)
        if candidate is None:
            return
        members = self.tree.members(candidate)
        if len(members) < 32:
            self.recogniser.refuse(candidate, now_s)
            return
        samples = SampleSet(candidate.root, members, ListingOrder(), deep=candidate.deep)
        for use in self.recogniser.claim(candidate):
            place = members.place(use.inode)
            assert place is not None
            samples.used(place, use.at_s)
        self.sets.append(samples)
        self.found_after.append(self.uses)

    @property
    def only(self) -> SampleSet:
        assert len(self.sets) == 1, self.sets
        return self.sets[0]

    def of(self, directory: Directory) -> SampleSet:
        (found,) = (samples for samples in self.sets if samples.root == directory.inode)
        return found


def shuffled(files: Sequence[int], dice: random.Random) -> list[int]:
    order = list(files)
    dice.shuffle(order)
    return order


def by_workers(order: Sequence[int], workers: int, batch: int, dice: random.Random) -> Iterator[int]:
    """Yield *order* as loader workers read it: each takes whole batches in turn, all at their own pace."""
    batches = [list(order[start : start + batch]) for start in range(0, len(order), batch)]
    queues = [[inode for part in batches[worker::workers] for inode in part] for worker in range(workers)]
    ends = [0] * workers
    while any(end < len(queue) for end, queue in zip(ends, queues, strict=True)):
        worker = dice.choice([w for w in range(workers) if ends[w] < len(queues[w])])
        yield queues[worker][ends[worker]]
        ends[worker] += 1


def mixed(dice: random.Random, *traces: Iterable[int]) -> Iterator[int]:
    """Yield the traces' uses interleaved at random, each trace in its own order."""
    running = [iter(trace) for trace in traces]
    while running:
        chosen = dice.choice(running)
        inode = next(chosen, None)
        if inode is None:
            running.remove(chosen)
        else:
            yield inode


def taken(samples: SampleSet) -> list[int]:
    """Take all that may be fetched ahead now."""
    places = []
    while (place := samples.take()) is not None:
        places.append(place)
    return places


# --- Which directory is the set -----------------------------------------------------------------


@pytest.mark.parametrize("count", [40, 300, 5000])
def test_a_shuffled_directory_is_an_epoch_after_a_few_uses(count: int, dice: random.Random) -> None:
    tree = Tree()
    directory = tree.directory(entries=count)
    watcher = Watcher(tree)
    watcher.watch(shuffled(tree.files(directory, count), dice)[: 2 * EVIDENCE])
    assert watcher.only.root == directory.inode and watcher.found_after[0] <= EVIDENCE
    assert (watcher.only.epoch, watcher.only.pattern) == (1, Pattern.SHUFFLED)
    assert watcher.only.used_count == 2 * EVIDENCE


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000])
def test_a_tree_of_classes_is_one_set_and_its_other_half_another(classes: int, dice: random.Random) -> None:
    tree = Tree()
    top = tree.directory(entries=2)
    train, files = tree.classes(classes, 2000 // classes + 20, top)
    validation, others = tree.classes(classes, 40, top)
    watcher = Watcher(tree)
    watcher.watch(by_workers(shuffled(files, dice), 4, 32, dice))
    assert watcher.only.root == train.inode and watcher.only.deep
    watcher.watch(by_workers(shuffled(others, dice), 4, 32, dice))
    assert [samples.root for samples in watcher.sets] == [train.inode, validation.inode]


def test_a_tree_of_unequal_classes_is_one_set(dice: random.Random) -> None:
    tree = Tree()
    top = tree.directory(entries=200)
    files: list[int] = []
    for rank in range(1, 201):
        files += tree.files(tree.directory(top, entries=3), 3000 // rank + 3)
    watcher = Watcher(tree)
    watcher.watch(by_workers(shuffled(files, dice), 8, 16, dice))
    assert watcher.only.root == top.inode and len(watcher.only.members) == len(files)


def test_files_spread_over_two_levels_of_hash_directories_are_one_set(dice: random.Random) -> None:
    tree = Tree()
    top = tree.directory(entries=16)
    files: list[int] = []
    for _ in range(16):
        middle = tree.directory(top, entries=16)
        for _ in range(16):
            files += tree.files(tree.directory(middle, entries=10), 10)
    watcher = Watcher(tree)
    watcher.watch(shuffled(files, dice)[:300])
    assert watcher.only.root == top.inode


def test_two_jobs_on_two_datasets_are_two_sets(dice: random.Random) -> None:
    tree = Tree()
    one, files = tree.classes(50, 40)
    other = tree.directory(entries=1500)
    others = tree.files(other, 1500)
    watcher = Watcher(tree)
    watcher.watch(mixed(dice, shuffled(files, dice), shuffled(others, dice)))
    assert {samples.root for samples in watcher.sets} == {one.inode, other.inode}
    assert all(samples.epoch == 1 for samples in watcher.sets)


def test_two_ranks_with_four_workers_each_share_one_epoch(dice: random.Random) -> None:
    tree = Tree()
    top, files = tree.classes(20, 100)
    watcher = Watcher(tree)
    for epoch in range(1, 4):
        order = shuffled(files, dice)
        ranks = (by_workers(order[rank::2], 4, 8, dice) for rank in range(2))
        watcher.watch(mixed(dice, *ranks), start_s=1000.0 * epoch)
        assert watcher.of(top).epoch == epoch
        assert watcher.of(top).used_count >= len(files) - 64


def test_uses_far_apart_in_time_make_no_set(dice: random.Random) -> None:
    tree = Tree()
    files = tree.files(tree.directory(entries=1000), 1000)
    watcher = Watcher(tree)
    watcher.watch(shuffled(files, dice)[:100], every_s=60.0)
    assert watcher.sets == []


def test_what_was_no_set_is_not_asked_for_again_and_again(dice: random.Random) -> None:
    tree = Tree()
    files = tree.files(tree.directory(entries=20), 20)
    recogniser, proposed = Recogniser(), 0
    for number in range(20):
        candidate = recogniser.used(files[number], tree.home[files[number]], number * 0.1)
        if candidate is not None:
            proposed += 1
            recogniser.refuse(candidate, number * 0.1)
    assert proposed == 1


def test_memory_of_the_recogniser_is_bounded(dice: random.Random) -> None:
    tree = Tree()
    recogniser = Recogniser()
    for _ in range(3000):
        directory = tree.directory(entries=1)
        (inode,) = tree.files(directory, 1)
        candidate = recogniser.used(inode, directory, 0.0)
        if candidate is not None:
            recogniser.refuse(candidate, 0.0)
    assert len(recogniser._uses) == len(recogniser._seen) <= 256
    assert len(recogniser._refused) <= 1024


# --- Epochs -------------------------------------------------------------------------------------


def one_set(count: int) -> tuple[Watcher, list[int]]:
    tree = Tree()
    files = tree.files(tree.directory(entries=count), count)
    return Watcher(tree), files


def test_each_pass_is_an_epoch_told_within_a_few_uses(dice: random.Random) -> None:
    watcher, files = one_set(3000)
    for epoch in range(1, 6):
        order = shuffled(files, dice)
        watcher.watch(order[:100])
        assert watcher.only.epoch == epoch
        watcher.watch(order[100:])
        assert watcher.only.used_count >= 2999


@pytest.mark.parametrize("dropped", [1, 31, 200])
def test_an_epoch_of_which_the_sampler_dropped_the_last_ends(dropped: int, dice: random.Random) -> None:
    watcher, files = one_set(3000)
    for epoch in range(1, 5):
        order = shuffled(files, dice)[:-dropped]
        watcher.watch(order[:400])
        assert watcher.only.epoch == epoch
        watcher.watch(order[400:])


def test_samples_that_pad_the_epoch_start_no_other(dice: random.Random) -> None:
    """DistributedSampler repeats the first ones at the end, to deal all ranks as many."""
    watcher, files = one_set(3001)
    for epoch in range(1, 4):
        order = shuffled(files, dice)
        watcher.watch(order + order[:7])
        assert watcher.only.epoch == epoch


def test_epochs_of_which_the_page_cache_answers_most_are_counted(dice: random.Random) -> None:
    watcher, files = one_set(4000)
    watcher.watch(shuffled(files, dice))
    for epoch in range(2, 6):
        seen = [inode for inode in shuffled(files, dice) if dice.random() < 0.4]
        watcher.watch(seen[: len(seen) // 2])
        assert watcher.only.epoch == epoch
        watcher.watch(seen[len(seen) // 2 :])


def test_uses_of_the_last_epoch_that_are_told_late_are_none_of_the_next(dice: random.Random) -> None:
    samples = SampleSet(1, Members(range(2, 402), 400 * SIZE), ListingOrder(), deep=False)
    first, second = shuffled(range(400), dice), shuffled(range(400), dice)
    late = [place for place in first[-60:] if place not in second[:40]]
    for number, place in enumerate(first):
        if place not in late:
            samples.used(place, 100 + number * 0.001)
    for number, place in enumerate(second[:40]):
        samples.used(place, 101 + number * 0.001)
    assert samples.epoch == 2
    used = samples.used_count
    for number, place in enumerate(late):
        samples.used(place, 100.9 + number * 0.001)
    assert samples.is_late(100.9) and not samples.is_late(101) and used == samples.used_count
    assert not any(samples.is_used(place) for place in late)
    samples.used(late[0], 50.0)  # The clock was set back.
    assert samples.is_used(late[0])


def test_training_and_validation_alternate(dice: random.Random) -> None:
    tree = Tree()
    top = tree.directory(entries=2)
    train, validation = tree.directory(top, 2000), tree.directory(top, 300)
    files, others = tree.files(train, 2000), tree.files(validation, 300)
    watcher = Watcher(tree)
    for epoch in range(1, 5):
        watcher.watch(by_workers(shuffled(files, dice), 4, 16, dice))
        watcher.watch(by_workers(others, 4, 16, dice))  # Validation is not shuffled.
        assert watcher.of(train).epoch == watcher.of(validation).epoch == epoch
    assert watcher.of(train).pattern is Pattern.SHUFFLED
    assert watcher.of(validation).pattern is Pattern.SCAN


def test_one_file_read_in_many_pieces_is_one_use(dice: random.Random) -> None:
    watcher, files = one_set(500)
    watcher.watch(inode for inode in shuffled(files, dice)[:400] for _ in range(9))
    assert (watcher.only.epoch, watcher.only.used_count) == (1, 400)


# --- What is no shuffled epoch ------------------------------------------------------------------


def test_a_copy_of_a_tree_is_a_scan_of_what_comes_next() -> None:
    tree = Tree()
    top, files = tree.classes(40, 20)
    watcher = Watcher(tree)
    watcher.watch(files[:400])
    samples = watcher.of(top)
    assert samples.pattern is Pattern.SCAN
    places = taken(samples)
    assert places == list(range(400, 400 + len(places))) and 0 < len(places) <= 256


@pytest.mark.parametrize("step", [1, 2])
def test_a_loader_that_does_not_shuffle_is_a_scan(step: int, dice: random.Random) -> None:
    """With step 2: every second file is a label that somebody else reads."""
    watcher, files = one_set(4000)
    watcher.watch(by_workers(files[: 1500 * step : step], 4, 32, dice))
    assert watcher.only.pattern is Pattern.SCAN
    assert min(taken(watcher.only)) >= 1300 * step


def test_a_scan_after_an_epoch_and_an_epoch_after_a_scan_are_told_apart(dice: random.Random) -> None:
    watcher, files = one_set(2000)
    watcher.watch(shuffled(files, dice))
    watcher.watch(files)
    assert watcher.only.pattern is Pattern.SCAN and watcher.only.epoch == 2
    watcher.watch(shuffled(files, dice)[:500])
    assert watcher.only.pattern is Pattern.SHUFFLED and watcher.only.epoch == 3


def test_popular_files_are_no_epoch_and_nothing_is_fetched_for_them(dice: random.Random) -> None:
    watcher, files = one_set(5000)
    weights = [1 / rank**1.5 for rank in range(1, 5001)]
    watcher.watch(dice.choices(files, weights, k=6000))
    assert watcher.only.pattern is Pattern.REUSED
    assert taken(watcher.only) == []


def test_a_shuffle_is_never_taken_for_a_scan() -> None:
    """Over many seeds and sizes: what follows by chance is far from enough."""
    for seed in range(300):
        dice = random.Random(seed)
        watcher, files = one_set(dice.choice([33, 50, 100, 700]))
        for inode in shuffled(files, dice):
            watcher.watch([inode])
            assert not watcher.sets or watcher.only.pattern is not Pattern.SCAN, f"seed {seed}"


# --- What to fetch ------------------------------------------------------------------------------


def test_what_is_fetched_ahead_grows_with_what_was_used_and_reaches_the_whole_set(
    dice: random.Random,
) -> None:
    watcher, files = one_set(3000)
    order = shuffled(files, dice)
    watcher.watch(order[:EVIDENCE])
    first = taken(watcher.only)
    assert len(first) == 32 * EVIDENCE
    watcher.watch(order[EVIDENCE:100])
    everything = first + taken(watcher.only)
    used = {watcher.only.members.place(inode) for inode in order[:100]}
    assert len(everything) == len(set(everything)) and used | set(everything) == set(range(3000))
    assert watcher.only.is_all_fetched


def test_nothing_is_fetched_twice_in_an_epoch_nor_what_is_resident(dice: random.Random) -> None:
    watcher, files = one_set(1000)
    order = shuffled(files, dice)
    watcher.watch(order[:50])
    samples = watcher.only
    for place in range(0, 1000, 2):
        samples.found_resident(place)
    fetched = taken(samples)
    assert all(place % 2 for place in fetched)
    samples.put_back(fetched[0])
    assert taken(samples) == [fetched[0]]
    samples.need_not(fetched[1])
    assert taken(samples) == []


def test_where_nothing_has_left_the_second_epoch_fetches_nothing(dice: random.Random) -> None:
    watcher, files = one_set(500)
    watcher.watch(shuffled(files, dice))
    watcher.watch(shuffled(files, dice)[:100])
    assert watcher.only.epoch == 2 and taken(watcher.only) == []
    watcher.only.look_again()
    assert len(taken(watcher.only)) == 500 - watcher.only.used_count >= 400


def test_an_order_that_is_known_is_followed_without_caution(dice: random.Random) -> None:
    class Known(ListingOrder):
        name, is_known = "told", True

        def next_place(self, status: bytearray, frontier: int | None) -> int | None:
            return next((place for place in order if status[place] == OPEN), None)

    order = shuffled(range(400), dice)
    samples = SampleSet(1, Members(range(2, 402), 400 * SIZE), Known(), deep=False)
    for place in order[:EVIDENCE]:
        samples.used(place, 0.0)
    assert taken(samples) == order[EVIDENCE:]


def test_a_finder_of_orders_is_told_every_first_use_of_each_epoch(dice: random.Random) -> None:
    told: list[tuple[str, int]] = []

    class Listener(ListingOrder):
        def used(self, places: Sequence[int], now_s: float) -> None:
            told.extend(("used", place) for place in places)

        def epoch_began(self, epoch: int) -> None:
            told.append(("epoch", epoch))

    samples = SampleSet(1, Members(range(2, 102), 100 * SIZE), Listener(), deep=False)
    first, second = shuffled(range(100), dice), shuffled(range(100), dice)
    for place in first + second:
        samples.used(place, 0.0)
    at = told.index(("epoch", 2))
    assert [place for _, place in told[:at]] == first
    assert {place for _, place in told[at + 1 :]} >= set(second) - set(first[-25:])


def test_a_set_that_grew_goes_on_with_its_epoch(dice: random.Random) -> None:
    watcher, files = one_set(600)
    watcher.watch(shuffled(files, dice)[:200])
    old = watcher.only
    members = Members([*range(1000, 1100), *old.members.inodes], 700 * SIZE)
    grown = old.succeeded_by(members, ListingOrder(), now_s=9.0)
    assert (grown.epoch, grown.used_count, grown.pattern) == (1, 200, old.pattern)
    assert set(grown.used_places()) == {place + 100 for place in old.used_places()}
    assert min(taken(grown)) == 0


@pytest.mark.parametrize("ascending", [True, False])
def test_a_member_is_found_by_its_inode(ascending: bool, dice: random.Random) -> None:
    inodes = dice.sample(range(10_000), 500)
    inodes = sorted(inodes) if ascending else inodes
    members = Members(inodes, 0)
    assert [members.place(inode) for inode in inodes] == list(range(500))
    assert members.place(10_001) is None and members.place(-1 + min(inodes)) is None


def test_a_million_members_take_less_than_twenty_bytes_each() -> None:
    samples = SampleSet(1, Members(range(2, 1_000_002), SIZE * 10**6), ListingOrder(), deep=True)
    parts = (samples.members.inodes, samples.status, samples._used, samples._again)
    assert sum(map(sys.getsizeof, parts)) < 20 * 10**6


STEPS = st.lists(st.tuples(st.sampled_from(["use", "take", "resident"]), st.integers(0, 39)), max_size=300)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_a_set_keeps_its_invariants_whatever_happens(steps: list[tuple[str, int]]) -> None:
    samples = SampleSet(1, Members(range(2, 42), 40 * SIZE), ListingOrder(), deep=False)
    now_s = 0.0
    for verb, place in steps:
        now_s += 1.0
        if verb == "use":
            samples.used(place, now_s)
        elif verb == "resident":
            samples.found_resident(place)
        elif (chosen := samples.take()) is not None:
            assert not samples.is_used(chosen)
            (samples.put_back if place % 2 else samples.need_not)(chosen)
        assert samples.used_count == sum(map(samples.is_used, range(40)))
        assert all(samples.status[used] == DONE for used in samples.used_places())
        assert samples.pattern in Pattern


@pytest.mark.parametrize("large", [False, True])
def test_uses_told_together_are_noted_as_one_after_the_other(dice: random.Random, large: bool) -> None:
    """Whatever is told together: an epoch's end in the middle of it, late uses, repeats."""

    class Listener(ListingOrder):
        def __init__(self) -> None:
            self.told: list[object] = []

        def used(self, places: Sequence[int], now_s: float) -> None:
            self.told += places

        def epoch_began(self, epoch: int) -> None:
            self.told.append(("epoch", epoch, self.is_needed))

    def made() -> tuple[SampleSet, Listener]:
        listener = Listener()
        return SampleSet(1, Members(range(2, 202), 200 * SIZE), listener, deep=False, large=large), listener

    together, told_together = made()
    alone, told_alone = made()
    uses = [place for _ in range(4) for place in shuffled([*range(200), *range(10)], dice)]
    times = [number * 0.01 - 0.4 * (dice.random() < 0.1) for number in range(len(uses))]
    begun = 0
    while uses:
        count = dice.randrange(1, 140)
        noted = together.used_all(uses[:count], times[:count])
        begun += noted.has_begun
        for place, now_s in zip(uses[: noted.uses], times[: noted.uses], strict=True):
            assert not alone.is_late(now_s) or place in noted.late
            begun -= alone.used(place, now_s)
        uses, times = uses[noted.uses :], times[noted.uses :]
        assert begun == 0 and together.epoch == alone.epoch and together.pattern == alone.pattern
        assert together.status == alone.status and together.used_count == alone.used_count
        if not large:
            assert together.take() == alone.take()
    assert together.epoch >= 4 and told_together.told == told_alone.told
