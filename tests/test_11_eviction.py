"""Which item leaves first: the two policies, by themselves and under simulated epochs."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.policy.auto import AutoPolicy
from cache.policy.due import Next
from cache.policy.eviction import EpochPolicy, EvictionPolicy, ItemId, LruPolicy
from cache.policy.policies import make_policy
from cache.policy.queues import PINNED


@pytest.fixture(params=["lru", "epoch", "auto"])
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    """Each of the policies, empty."""
    return make_policy(request.param)


def item(number: int) -> ItemId:
    return ItemId(number.to_bytes(16, "big"))


def group(number: int, group_number: int) -> ItemId:
    return ItemId(item(number) + group_number.to_bytes(4, "big"))


def numbers(items: Iterable[ItemId]) -> list[int]:
    return [int.from_bytes(one[:16], "big") for one in items]


def filled(policy: EvictionPolicy, count: int, *, used: bool = True) -> EvictionPolicy:
    for number in range(count):
        policy.added(item(number), 1, used=used)
    return policy


def fetched(policy: EvictionPolicy, order: Iterable[int], capacity: int) -> int:
    """Return how many of the objects, read in *order*, had to be fetched. All have size 1."""
    count = 0
    for number in order:
        if policy.size_of(item(number)) is not None:
            policy.touched(item(number))
            continue
        count += 1
        for victim in policy.victims(len(policy) + 1 - capacity, ()):
            policy.removed(victim)
        policy.added(item(number), 1, used=True)
        assert len(policy) <= capacity
    return count


def epoch_shares(
    policy: EvictionPolicy, objects: int, share: float, epochs: int, seed: int = 1, first: int = 0
) -> list[float]:
    """Return the part of the set that each shuffled epoch fetched, with *share* of it cacheable."""
    generator = random.Random(seed)
    shares = []
    for _ in range(epochs):
        order = [first + number for number in range(objects)]
        generator.shuffle(order)
        shares.append(fetched(policy, order, int(objects * share)) / objects)
    return shares


def test_lru_lets_the_least_recently_used_go_first() -> None:
    policy = filled(LruPolicy(), 4)
    policy.touched(item(0))
    assert numbers(policy.victims(3, ())) == [1, 2, 3]


def test_lru_counts_an_added_item_as_just_used() -> None:
    policy = filled(LruPolicy(), 3)
    policy.added(item(0), 1, used=False)
    assert numbers(policy.order(9)) == [1, 2, 0]


def test_victims_change_nothing(policy: EvictionPolicy) -> None:
    filled(policy, 5)
    assert policy.victims(3, ()) == policy.victims(3, ())
    assert len(policy) == 5


def test_victims_stop_once_enough_comes_free(policy: EvictionPolicy) -> None:
    for number in range(10):
        policy.added(item(number), 100, used=True)
    assert len(policy.victims(1, ())) == 1
    assert len(policy.victims(101, ())) == 2
    assert policy.victims(0, ()) == []


def test_groups_and_objects_that_stay_are_skipped(policy: EvictionPolicy) -> None:
    filled(policy, 3)
    policy.added(group(7, 0), 1, used=True)
    policy.added(group(7, 1), 1, used=True)
    chosen = policy.victims(99, {item(1), group(7, 0)})
    assert set(chosen) == set(policy.order(99)) - {item(1), group(7, 0)}


def test_unknown_items_are_ignored(policy: EvictionPolicy) -> None:
    filled(policy, 2)
    before = policy.order(9)
    policy.touched(item(99))
    policy.removed(item(99))
    assert policy.order(9) == before
    assert policy.size_of(item(99)) is None


def test_what_this_epoch_used_leaves_before_what_it_still_needs() -> None:
    policy = EpochPolicy()
    filled(policy, 20, used=False)
    for number in range(10):
        policy.touched(item(number))
    assert set(numbers(policy.order(9))) == set(range(9))  # The tenth is in somebody's hands.


def test_the_newest_used_item_leaves_first_so_that_the_others_stay_for_the_next_epoch() -> None:
    policy = filled(EpochPolicy(), 100)
    in_hands = 100 // EpochPolicy._RECENT_SHARE
    assert numbers(policy.order(3)) == [99 - in_hands - i for i in range(3)]


def test_what_was_used_a_moment_ago_leaves_last() -> None:
    policy = EpochPolicy()
    filled(policy, 50, used=False)
    policy.touched(item(3))
    assert numbers(policy.order(50))[-1] == 3


def test_an_epoch_ends_when_enough_items_come_round_again() -> None:
    policy = filled(EpochPolicy(), 400)
    uses = 0
    for number in range(400):
        if policy.epochs:
            break
        policy.touched(item(number))
        uses += 1
    assert 400 // 8 <= uses <= 400 // 8 + 64 + 1


def test_reading_one_item_many_times_over_ends_no_epoch() -> None:
    """Each READ of a large file touches its group: 64 times in a row."""
    policy = filled(EpochPolicy(), 200)
    for number in range(20):
        for _ in range(64):
            policy.touched(item(number))
    assert policy.epochs == 0


def test_items_elsewhere_do_not_delay_the_end_of_an_epoch() -> None:
    policy, other = filled(EpochPolicy(), 100), filled(EpochPolicy(), 100)
    for number in range(100):
        other.touched(item(number))
        policy.touched(item(number))
        for elsewhere in range(1000, 1010):
            policy.touched(item(elsewhere))
    assert policy.epochs == other.epochs == 1


def test_what_a_whole_epoch_did_not_use_leaves_first() -> None:
    policy = EpochPolicy()
    filled(policy, 100, used=False)
    for number in range(50):
        policy.touched(item(number))
    policy.epoch_began()
    assert numbers(policy.order(50)) == list(range(50, 100))


def test_what_a_recognised_epoch_expects_leaves_last_and_is_not_to_spare() -> None:
    policy = filled(EpochPolicy(), 100, used=False)
    assert (policy.spare_bytes, policy.expected_bytes) == (100, 0)
    for number in range(40):
        policy.expect(item(number))
    assert (policy.spare_bytes, policy.expected_bytes) == (60, 40)
    assert set(numbers(policy.order(60))) == set(range(40, 100))
    policy.touched(item(0))
    assert policy.next_of(item(0)) is None and policy.expected_bytes == 39
    for number in range(100):
        policy.release(item(number))
    assert policy.expected_bytes == 0 and set(numbers(policy.order(39))) == set(range(1, 40))


def test_of_what_was_used_a_moment_ago_only_the_newest_leave_after_what_is_expected() -> None:
    policy = filled(EpochPolicy(), 1000, used=False)
    for number in range(50):
        policy.touched(item(number))
    for number in range(50, 1000):
        policy.expect(item(number))
    in_hands = EpochPolicy._IN_HANDS
    assert numbers(policy.order(50 - in_hands)) == list(range(50 - in_hands))
    assert numbers(policy.order(1000))[-in_hands:] == list(range(50 - in_hands, 50))


def test_an_epoch_that_begins_elsewhere_leaves_alone_what_is_expected() -> None:
    policy = filled(EpochPolicy(), 100, used=False)
    policy.expect(item(7))
    policy.epoch_began()
    assert numbers(policy.order(100))[-1] == 7


def test_lru_spares_nothing_to_what_nobody_asked_for() -> None:
    policy = filled(LruPolicy(), 10)
    policy.expect(item(0))
    policy.release(item(0))
    assert (policy.spare_bytes, policy.expected_bytes, policy.next_of(item(0))) == (0, 0, None)
    assert numbers(policy.order(1)) == [0]


@pytest.mark.parametrize(("share", "from_epoch"), [(0.2, 2), (0.5, 1), (0.8, 1)])
@pytest.mark.parametrize("policy_of", [EpochPolicy, AutoPolicy])
def test_shuffled_epochs_fetch_little_more_than_what_does_not_fit(
    share: float, from_epoch: int, policy_of: type[EpochPolicy]
) -> None:
    """The optimum is 1 - share. A first pass over more than twice the tier costs one epoch more."""
    shares = epoch_shares(policy_of(), 1500, share, 7)
    assert shares[0] == 1.0
    for fetched_share in shares[from_epoch:]:
        assert 1 - share - 0.001 <= fetched_share <= 1 - share + 0.035


@pytest.mark.parametrize(("share", "lru_share"), [(0.2, 0.97), (0.5, 0.82), (0.8, 0.48)])
def test_lru_fetches_much_more_of_a_shuffled_epoch(share: float, lru_share: float) -> None:
    assert min(epoch_shares(LruPolicy(), 1500, share, 4)[1:]) > lru_share


def test_another_set_takes_the_place_of_one_that_is_no_longer_read() -> None:
    policy = EpochPolicy()
    epoch_shares(policy, 1000, 0.5, 3)
    shares = epoch_shares(policy, 1000, 0.5, 4, seed=2, first=10_000)
    assert all(fetched_share < 0.58 for fetched_share in shares[2:])


def test_popular_items_are_served_as_well_as_by_lru() -> None:
    """No epochs at all: draws with replacement, by Zipf's law."""
    weights = [1 / rank for rank in range(1, 1001)]
    draws = random.Random(3).choices(range(1000), weights, k=10_000)
    by_epoch, by_lru = (fetched(make_policy(name), draws, 300) for name in ("epoch", "lru"))
    assert by_epoch < 1.05 * by_lru
    assert fetched(make_policy("auto"), draws, 300) < 1.05 * by_lru


def test_of_what_is_used_at_a_known_time_the_last_leaves_first() -> None:
    policy = filled(EpochPolicy(), 8, used=False)
    for number, due in enumerate((700, 100, 500, 300)):
        policy.expect(item(number), Next(due))
    policy.expect(item(4), Next(2000, later=True))
    policy.expect(item(5), Next(1000, later=True))
    assert numbers(policy.order(8)) == [4, 5, 6, 7, 0, 2, 3, 1]
    assert (policy.spare_bytes, policy.expected_bytes) == (4, 4)
    assert policy.next_of(item(5)) == Next(1000, later=True) and policy.next_of(item(6)) is None
    policy.touched(item(4))
    assert policy.next_of(item(4)) is None


def test_what_is_due_after_it_makes_room_for_what_is_due_before() -> None:
    policy = filled(EpochPolicy(), 1000, used=False)
    for number in range(1000):
        policy.expect(item(number), Next(number))
    assert policy.bytes_beyond(0, 10_000) > 800
    assert policy.bytes_beyond(1000, 10_000) == 0
    assert 50 <= policy.bytes_beyond(0, 50) <= 200


def test_with_the_next_order_known_what_is_needed_first_in_the_next_epoch_stays() -> None:
    """No epoch can fetch less than what does not fit. By next use, all that fits is hit at its beginning."""
    generator, count, held = random.Random(4), 1000, 200
    orders = [generator.sample(range(count), count) for _ in range(6)]
    policy = EpochPolicy()
    for epoch, (order, then) in enumerate(pairwise(orders)):
        position = {number: place for place, number in enumerate(then)}
        missed = []
        for number in order:
            missed.append(fetched(policy, [number], held))
            policy.expect(item(number), Next((epoch + 1) * count + position[number], later=True))
        if epoch:
            assert sum(missed) <= count - held + 70 and sum(missed[: held - 70]) == 0


def test_a_scan_takes_only_what_it_brought_itself() -> None:
    policy = filled(AutoPolicy(), 300)
    for number in range(1000, 4000):
        assert fetched(policy, [number], 300)
        if number >= 1032:
            policy.passed(item(number - 32))
    kept = sum(policy.size_of(item(number)) is not None for number in range(300))
    assert kept >= 300 - 64
    by_lru = filled(LruPolicy(), 300)
    fetched(by_lru, range(1000, 4000), 300)
    assert not any(by_lru.size_of(item(number)) for number in range(300))


def test_what_a_scan_met_that_others_use_keeps_its_rank() -> None:
    policy = filled(AutoPolicy(), 100)
    policy.expect(item(7))
    fetched(policy, [3, 50, 3], 100)
    for number in (3, 7):
        policy.passed(item(number))
    policy.passed(item(999))  # Not there (any more).
    assert numbers(policy.order(1)) not in ([3], [7])


def test_files_that_are_read_again_and_again_stay_while_epochs_go_by() -> None:
    generator, policy = random.Random(5), AutoPolicy()
    missed = 0
    for epoch in range(6):
        for step, number in enumerate(generator.sample(range(2000), 2000)):
            fetched(policy, [number], 400)
            if step % 10 == 0:
                missed += fetched(policy, [10_000 + step // 10 % 20], 400) * (epoch > 0)
    assert missed <= 20  # Of 1,000 reads.


def test_what_was_hot_once_leaves_in_the_end() -> None:
    policy = AutoPolicy()
    for number in [*range(10)] * 20 + [*range(100, 300)]:
        fetched(policy, [number], 100)
    assert all(policy.size_of(item(number)) for number in range(10))
    for seed in range(8):
        fetched(policy, random.Random(seed).sample(range(1000, 1300), 300), 100)
    assert not any(policy.size_of(item(number)) for number in range(10))


def test_hot_files_take_at_most_half_of_the_tier() -> None:
    policy = filled(AutoPolicy(), 100)
    for _ in range(9):
        for number in range(80):
            policy.touched(item(number))
    assert policy._hot.size_bytes <= 50


Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "use",
                "ahead",
                "touch",
                "expect",
                "plan",
                "later",
                "pass",
                "release",
                "remove",
                "evict",
                "epoch",
                "pin",
                "unpin",
                "want",
            ]
        ),
        st.integers(0, 40),
        st.integers(1, 9),
    ),
    max_size=200,
)


@pytest.mark.parametrize("name", ["lru", "epoch", "auto"])
@given(steps=STEPS)
def test_a_policy_holds_what_was_added_and_not_removed(name: str, steps: list[Step]) -> None:
    policy, model = make_policy(name), dict[ItemId, int]()
    for verb, number, size_bytes in steps:
        one = item(number)
        if verb in ("use", "ahead"):
            policy.added(one, size_bytes, used=verb == "use")
            model[one] = size_bytes
        elif verb == "touch":
            policy.touched(one)
        elif verb == "expect":
            policy.expect(one)
        elif verb in ("plan", "later"):
            policy.expect(one, Next(size_bytes * 100, later=verb == "later"))
        elif verb == "pass":
            policy.passed(one)
        elif verb == "release":
            policy.release(one)
        elif verb == "remove":
            policy.removed(one)
            model.pop(one, None)
        elif verb in ("pin", "unpin", "want"):
            getattr(policy, verb)(one)
        elif verb == "evict":
            busy = {item(n) for n in range(0, number, 3)}
            victims = policy.victims(size_bytes, busy)
            free = {one: model[one] for one in model if one not in busy and policy.why(one) != PINNED}
            assert len(set(victims)) == len(victims) and set(victims) <= set(free)
            assert sum(map(model.__getitem__, victims)) >= min(size_bytes, sum(free.values()))
            for victim in victims:
                policy.removed(victim)
                del model[victim]
        elif isinstance(policy, EpochPolicy):
            policy.epoch_began()
        assert len(policy) == len(model)
        assert policy.spare_bytes + policy.expected_bytes <= sum(model.values())
        if isinstance(policy, EpochPolicy):
            for queue in policy._queues:
                assert queue.size_bytes == sum(queue.values())
        if isinstance(policy, AutoPolicy):
            assert set(policy._uses) == set(model).difference(policy.pinned())
            assert policy._uses_sum == sum(policy._uses.values())
        assert policy.pinned_bytes == sum(model[one] for one in policy.pinned())
        assert all(policy.why(one) is not None for one in model)
    order = policy.order(1000) + policy.pinned()
    assert len(order) == len(set(order)) and set(order) == set(model)
    assert {one: policy.size_of(one) for one in order} == model


# Pins and wants


def test_what_is_pinned_is_no_victim_until_it_is_unpinned(policy: EvictionPolicy) -> None:
    filled(policy, 10)
    for number in (0, 5):
        policy.pin(item(number))
    assert not {0, 5} & set(numbers(policy.victims(100, ())))
    assert not {0, 5} & set(numbers(policy.order(100)))
    assert (len(policy), policy.pinned_bytes, policy.why(item(5))) == (10, 2, "pinned")
    for change in (
        policy.touched,
        policy.want,
        policy.expect,
        policy.release,
        policy.passed,
        policy.outdated,
    ):
        change(item(5))
    for next in (Next(7), Next(70, later=True)):
        policy.expect(item(5), next)
    assert policy.next_of(item(5)) is None
    policy.added(item(5), 3, used=True)
    assert policy.pinned_bytes == 4 and sorted(numbers(policy.pinned())) == [0, 5]
    policy.unpin(item(5))
    policy.removed(item(0))
    assert (policy.pinned(), policy.pinned_bytes) == ([], 0)
    assert 5 in numbers(policy.victims(100, ()))


def test_outdated_items_leave_first_oldest_first_until_they_are_used(policy: EvictionPolicy) -> None:
    for number in range(6):
        policy.added(item(number), 2, used=False)
    policy.outdated(item(4))
    policy.outdated(item(2))
    policy.outdated(item(99))  # Not there (any more).
    assert numbers(policy.order(2)) == numbers(policy.victims(4, ())) == [4, 2]
    assert policy.why(item(4)) == "a later checkpoint was written since"
    assert (len(policy), policy.size_of(item(4))) == (6, 2)
    policy.touched(item(4))
    assert numbers(policy.order(6))[0] == 2 and policy.why(item(4)) != policy.why(item(2))
    policy.pin(item(2))
    assert 2 not in numbers(policy.order(6)) and policy.pinned_bytes == 2
    policy.outdated(item(2))
    assert policy.why(item(2)) == "pinned"
    policy.removed(item(4))
    assert len(policy) == 5 and policy.size_of(item(4)) is None


@pytest.mark.parametrize("policy", [EpochPolicy(), AutoPolicy()])
def test_an_outdated_item_that_is_read_or_expected_stays(policy: EpochPolicy) -> None:
    for number in range(3):
        policy.added(item(number), 1, used=False)
    policy.expect(item(0))
    policy.touched(item(1))  # A moment ago.
    for number in range(3):
        policy.outdated(item(number))
    assert numbers(policy.order(3))[0] == 2
    assert policy.why(item(0)) == "expected by the running epoch"
    assert policy.why(item(1)) == "used a moment ago"
    policy.removed(item(2))
    assert (len(policy), policy.epochs) == (2, 0)


def test_what_is_outdated_leaves_before_what_a_scan_has_left_behind() -> None:
    policy = AutoPolicy()
    for number in range(200):
        policy.added(item(number), 1, used=True)
    policy.passed(item(3))
    policy.outdated(item(5))
    assert numbers(policy.order(2)) == [5, 3]


def test_pins_of_unknown_items_are_ignored(policy: EvictionPolicy) -> None:
    policy.pin(item(1))
    policy.unpin(item(2))
    policy.want(item(3))
    assert len(policy) == 0 and policy.why(item(1)) is None


def test_what_was_asked_for_leaves_after_what_was_not(policy: EvictionPolicy) -> None:
    filled(policy, 40)
    policy.want(item(0))
    order = numbers(policy.order(40))
    assert order.index(0) > 30


def test_a_policy_says_why() -> None:
    policy = EpochPolicy()
    filled(policy, 40)
    policy.added(item(50), 1, used=False)
    policy.expect(item(7))
    reasons = {policy.why(item(number)) for number in range(40)}
    assert reasons == {"used in this epoch", "used a moment ago", "expected by the running epoch"}
    assert policy.why(item(50)) == "not yet used in this epoch" and policy.is_wanted(item(50))
    policy.epoch_began()
    assert policy.why(item(50)) == "not used in the last epoch"


@pytest.mark.parametrize("policy", [EpochPolicy(), AutoPolicy()])
def test_what_somebody_asked_for_is_idle_only_when_a_whole_epoch_has_passed_it_by(
    policy: EvictionPolicy,
) -> None:
    """An epoch that ends while a command brings what is for the next one says nothing about it."""
    filled(policy, 40)
    for number in range(100, 110):
        policy.added(item(number), 1, used=False)
        policy.want(item(number))
    assert policy.why(item(100)) == "asked for, not yet used" and policy.is_wanted(item(100))
    policy.epoch_began()
    assert policy.why(item(100)) == "not yet used in this epoch" and policy.is_wanted(item(100))
    policy.epoch_began()
    assert policy.why(item(100)) == "not used in the last epoch"


@pytest.mark.parametrize("policy", [EpochPolicy(), AutoPolicy()])
def test_what_somebody_asked_for_keeps_its_turn_in_a_known_order(policy: EvictionPolicy) -> None:
    filled(policy, 40)
    policy.expect(item(0), Next(100))
    policy.want(item(0))
    assert policy.next_of(item(0)) == Next(100) and policy.expected_bytes == 1
    assert policy.why(item(0)) == "expected by the running epoch, in its order"
    policy.expect(item(1), Next(200, later=True))
    assert policy.why(item(1)) == "expected by the next epoch, in its order"


def test_a_pinned_item_that_was_hot_is_held_by_its_pin_alone() -> None:
    policy = AutoPolicy()
    filled(policy, 400)
    for first in range(1, 400, 40):
        policy.touched(item(0))
        for other in range(first, min(first + 40, 400)):
            policy.touched(item(other))
    assert policy.why(item(0)) == "used far more often than the others"
    policy.want(item(0))
    assert policy.why(item(0)) == "used far more often than the others"
    policy.pin(item(0))
    for _ in range(9):
        policy.touched(item(0))
        policy.added(item(0), 2, used=True)
        policy.epoch_began()
    assert (policy.why(item(0)), policy.pinned_bytes) == (PINNED, 2)
    policy.unpin(item(0))
    assert policy.why(item(0)) == "asked for, not yet used"


def test_a_group_that_grows_is_not_used_the_more_for_it() -> None:
    policy = AutoPolicy()
    filled(policy, 100)
    for size_bytes in range(2, 12):
        policy.added(item(7), size_bytes, used=True)
    assert policy.why(item(7)) == "used a moment ago" and policy.size_of(item(7)) == 11


@pytest.mark.parametrize("name", ["lru", "epoch", "auto"])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_told_of_many_at_once_is_what_is_told_of_each(name: str, seed: int) -> None:
    dice = random.Random(f"{name} {seed}")
    many, each = make_policy(name), make_policy(name)
    for _ in range(200):
        items = [item(dice.randrange(100)) for _ in range(dice.randrange(30))]
        nexts = [Next(dice.choice((None, dice.randrange(500))), later=dice.random() < 0.5) for _ in items]
        if dice.random() < 0.5:
            many.touched_all(items)
            for one in items:
                each.touched(one)
        else:
            many.brought([(one, 3, next) for one, next in zip(items, nexts, strict=True)])
            for one, next in zip(items, nexts, strict=True):
                each.added(one, 3, used=False)
                each.expect(one, next)
        for victim in each.victims(dice.randrange(60), ()):
            many.removed(victim)
            each.removed(victim)
        some = item(dice.randrange(100))
        change = dice.choice(("pin", "unpin", "want", "passed", "outdated", "release"))
        for policy in (many, each):
            getattr(policy, change)(some)
        assert many.order(1000) == each.order(1000) and many.pinned() == each.pinned()
        assert [many.why(one) for one in items] == [each.why(one) for one in items]
        assert many.spare_bytes == each.spare_bytes and many.expected_bytes == each.expected_bytes
