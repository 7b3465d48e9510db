"""Orders made here are the libraries': by what these answered once, and by asking those installed.

The recorded answers are of torch 2.13.0, accelerate 1.15.0, webdataset 1.0.2, mosaicml-streaming 0.13.0
and numpy 2.4.6. To check against torch and accelerate themselves, install them beside the tests' packages.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.policy.order.mersenne import DRAWS_MAX, first_draws
from cache.policy.order.samplers import (
    FAMILIES,
    distributed,
    first_places,
    leading_places,
    nth,
    webdataset,
)
from cache.policy.order.spec import Spec, advances_of

Signature = tuple[list[int], int, int]


def signature(order: Iterable[int]) -> Signature:
    """Return an order's first four places, its length, and the CRC-32 of all of it."""
    places = np.array(list(order), "<u4")
    return places[:4].tolist(), len(places), zlib.crc32(places.tobytes())


# Three epochs over 1,000 places under seed 7.
EPOCHS: dict[str, list[Signature]] = {
    "torch": [
        ([615, 284, 599, 580], 1000, 734064792),
        ([866, 704, 726, 91], 1000, 1250880086),
        ([731, 904, 597, 196], 1000, 1449323864),
    ],
    "torch-loader": [
        ([721, 633, 737, 581], 1000, 839004711),
        ([525, 975, 297, 849], 1000, 1891091880),
        ([906, 321, 958, 832], 1000, 360485077),
    ],
    "torch-global": [
        ([663, 200, 203, 491], 1000, 2223381935),
        ([201, 21, 691, 527], 1000, 1071601853),
        ([109, 245, 145, 767], 1000, 193393946),
    ],
    "numpy-legacy": [
        ([778, 334, 271, 802], 1000, 3959005806),
        ([562, 11, 731, 106], 1000, 2155136165),
        ([589, 357, 930, 423], 1000, 4284437000),
    ],
    "numpy": [
        ([816, 923, 151, 900], 1000, 1873325873),
        ([893, 312, 945, 432], 1000, 2045037643),
        ([882, 296, 575, 826], 1000, 4023973045),
    ],
    "python": [
        ([878, 857, 349, 313], 1000, 223193802),
        ([161, 660, 229, 670], 1000, 546470862),
        ([106, 91, 726, 405], 1000, 2178680682),
    ],
}


@pytest.mark.parametrize("family", EPOCHS)
def test_three_epochs_are_those_that_the_library_gave(family: str) -> None:
    assert [signature(order) for order in islice(FAMILIES[family](7, 1000), 3)] == EPOCHS[family]


@pytest.mark.parametrize(
    ("seed", "recorded"),
    [
        (0, ([36044, 49165, 37807, 11341], 50000, 101067437)),
        (67280421310721, ([44710, 12395, 40459, 43538], 50000, 931455464)),
    ],
)
def test_randperm_of_fifty_thousand_is_torchs(seed: int, recorded: Signature) -> None:
    """The second seed, torch's own default, has more than the 32 bits that the generator takes."""
    assert signature(Spec("torch", seed).order(50_000)) == recorded


def test_accelerates_seedable_sampler_adds_the_epoch_to_the_seed() -> None:
    recorded = [
        ([542, 618, 816, 68], 1000, 724366097),
        ([588, 148, 223, 575], 1000, 3778508423),
        ([732, 96, 853, 374], 1000, 3467663342),
    ]
    found = [signature(Spec("torch", 42, epoch, "reseed").order(1000)) for epoch in range(3)]
    assert found == recorded


@pytest.mark.parametrize(
    ("n", "world", "rank", "drop_last", "recorded"),
    [
        (1000, 3, 1, False, ([284, 347, 891, 998], 334, 603127358)),
        (1000, 3, 1, True, ([284, 347, 891, 998], 333, 833891091)),
        (1000, 7, 6, False, ([383, 301, 736, 219], 143, 1192136267)),
        (10, 16, 5, False, ([7], 1, 3163809701)),
    ],
)
def test_a_rank_of_distributed_sampler_reads_its_part(
    n: int, world: int, rank: int, drop_last: bool, recorded: Signature
) -> None:
    """Seed 5, epoch 2. The last has more ranks than files: some files come twice."""
    order = Spec("torch", 5, 2, "reseed").order(n)
    assert signature(distributed(order, world, (rank,), drop_last=drop_last)) == recorded


@pytest.mark.parametrize(
    ("workers", "buffer", "n", "recorded"),
    [
        (1, 100, 300, [([30, 75, 69, 16], 300, 3652083518), ([30, 38, 13, 92], 300, 806484297)]),
        (
            4,
            100,
            1000,
            [([120, 121, 122, 123], 1000, 3155562354), ([120, 121, 122, 123], 1000, 1182752860)],
        ),
        (2, 1000, 3000, [([60, 61, 150, 151], 3000, 696250860), ([60, 61, 76, 77], 3000, 1088807160)]),
    ],
)
def test_webdatasets_shards_come_out_of_its_buffer_as_here(
    workers: int, buffer: int, n: int, recorded: list[Signature]
) -> None:
    assert [signature(order) for order in islice(webdataset(workers, buffer)(3, n), 2)] == recorded


def test_mosaics_shards_are_shuffled_for_the_run_and_again_for_the_epoch() -> None:
    """Recorded from py1s over 200 shards on one canonical node: where each shard comes first."""
    orders = list(islice(FAMILIES["mosaic-shards"](9176, 200), 3))
    assert signature(orders[0]) == ([164, 47, 134, 105], 200, 1260851140)
    assert signature(orders[2]) == ([29, 103, 97, 99], 200, 674356282)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [1, 2, 3, 33, 1024, 1025])
def test_every_order_has_each_place_once(family: str, n: int) -> None:
    for order in islice(FAMILIES[family](11, n), 3):
        assert sorted(order.tolist()) == list(range(n))


@given(seed=st.integers(-(2**80), 2**80), n=st.integers(1, 3000))
def test_random_shuffle_is_pythons_whatever_the_seed_and_the_length(seed: int, n: int) -> None:
    generator, orders = random.Random(seed), FAMILIES["python"](seed, n)
    for _ in range(3):
        listed = list(range(n))
        generator.shuffle(listed)
        assert next(orders).tolist() == listed


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 3000))
def test_numpys_shuffles_of_a_list_and_of_an_array_are_its_permutation(seed: int, n: int) -> None:
    for make in (np.random.RandomState, np.random.default_rng):
        listed, array = list(range(n)), np.arange(n)
        make(seed).shuffle(listed)
        make(seed).shuffle(array)
        assert listed == array.tolist() == make(seed).permutation(n).tolist()


@given(seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), skip=st.integers(0, 40))
def test_the_first_draws_of_many_seeds_are_those_of_each(seeds: list[int], skip: int) -> None:
    count = DRAWS_MAX - skip
    drawn = first_draws(np.array(seeds, np.uint32), skip, count)
    for column, seed in enumerate(seeds):
        alone = np.random.RandomState(seed).randint(0, 2**32, skip + count, np.uint32)
        assert drawn[:, column].tolist() == alone[skip:].tolist()


@pytest.mark.parametrize("n", [2, 5, 33, 40, 1000, 50_000])
def test_first_and_leading_places_are_the_start_of_the_whole_order(n: int) -> None:
    """Small numbers swap a place twice, large ones hardly ever."""
    seeds = np.arange(300, dtype=np.uint32)
    first = first_places(seeds, n, 32)
    for seed in range(0, 300, 7 if n < 5000 else 100):
        whole = Spec("torch", seed).order(n)
        assert first[:, seed].tolist() == whole[: min(32, n - 1)].tolist()
        assert leading_places(seed, n, 200).tolist() == whole[: min(200, n - 1)].tolist()


def test_skipped_draws_are_those_of_the_loader() -> None:
    whole = nth(FAMILIES["torch-loader"](5, 777), 0)
    assert first_places(np.array([5], np.uint32), 777, 32, 2)[:, 0].tolist() == whole[:32].tolist()


@pytest.mark.parametrize("family", ["torch", "numpy", "python"])
def test_each_advance_leads_to_its_own_second_epoch(family: str) -> None:
    first = Spec(family, 3)
    successors = first.successors()
    assert [spec.advance for spec in successors] == list(advances_of(family))
    orders = {spec.advance: spec.order(200).tolist() for spec in successors}
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    assert orders["repeat"] == first.order(200).tolist()
    assert orders["reseed"] == Spec(family, 4).order(200).tolist()


def test_reshuffling_a_list_shuffles_what_was_shuffled_before() -> None:
    generator, files = random.Random(9), list(range(500))
    for epoch in range(4):
        generator.shuffle(files)
        assert Spec("python", 9, epoch, "reshuffle").order(500).tolist() == files


# --- Against the libraries themselves, where they are installed -----------------------------------


class Numbers:
    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, place: int) -> int:
        return place


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", exc_type=ImportError)


@pytest.mark.parametrize("n", [1, 2, 3, 33, 1000, 50_000, 1_281_167])
@pytest.mark.parametrize("seed", [0, 42, 2**40 + 7])
def test_randperm_against_torch(torch: Any, n: int, seed: int) -> None:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert np.array_equal(Spec("torch", seed).order(n), order.numpy())


def test_random_sampler_against_torch(torch: Any) -> None:
    sampler = torch.utils.data.RandomSampler(Numbers(500), generator=torch.Generator().manual_seed(4))
    for order in islice(FAMILIES["torch"](4, 500), 3):
        assert order.tolist() == list(sampler)


@pytest.mark.parametrize("own_generator", [True, False])
def test_a_shuffling_data_loader_against_torch(torch: Any, own_generator: bool) -> None:
    torch.manual_seed(4)
    generator = torch.Generator().manual_seed(4) if own_generator else None
    loader = torch.utils.data.DataLoader(Numbers(500), batch_size=32, shuffle=True, generator=generator)
    for order in islice(FAMILIES["torch-loader" if own_generator else "torch-global"](4, 500), 3):
        assert order.tolist() == [place for batch in loader for place in batch.tolist()]


@pytest.mark.parametrize("n", [10, 999, 1000])
@pytest.mark.parametrize("world", [1, 2, 7, 16])
@pytest.mark.parametrize("drop_last", [True, False])
def test_distributed_sampler_against_torch(torch: Any, n: int, world: int, drop_last: bool) -> None:
    for rank in {0, world - 1}:
        sampler = torch.utils.data.DistributedSampler(Numbers(n), world, rank, seed=3, drop_last=drop_last)
        sampler.set_epoch(5)
        order = Spec("torch", 3, 5, "reseed").order(n)
        assert distributed(order, world, (rank,), drop_last=drop_last).tolist() == list(sampler)


def test_seedable_random_sampler_against_accelerate(torch: Any) -> None:
    accelerate = pytest.importorskip("accelerate.data_loader", exc_type=ImportError)
    sampler = accelerate.SeedableRandomSampler(Numbers(500), data_seed=42)
    for epoch in range(3):
        assert Spec("torch", 42, epoch, "reseed").order(500).tolist() == list(sampler)


def test_shards_against_webdataset() -> None:
    filters = pytest.importorskip("webdataset.filters", exc_type=ImportError)
    for buffer in (100, 1000):
        stage = filters.detshuffle(bufsize=buffer, initial=100, seed=2)
        for order in islice(webdataset(1, buffer)(2, 1500), 3):
            assert order.tolist() == list(stage.run(iter(range(1500))))
