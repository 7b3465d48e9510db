"""Which files are checkpoints of one series, and which are outdated."""

from __future__ import annotations

import random

import pytest

from cache.policy.series import Checkpoints, series_of


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("ckpt-100.pt", "ckpt-200.pt"),
        ("ckpt-900.pt", "ckpt-1000.pt"),
        ("step_0900/model.pt", "step_1000/model.pt"),
        (
            "run1/checkpoint-500/model-00001-of-00002.safetensors",
            "run1/checkpoint-1000/model-00001-of-00002.safetensors",
        ),
        ("epoch=3-step=900.ckpt", "epoch=4-step=1200.ckpt"),
        ("lit/epoch=3-step=100.ckpt", "lit/epoch=3-step=200.ckpt"),
        ("global_step100/mp_rank_00_model_states.pt", "global_step200/mp_rank_00_model_states.pt"),
        ("iter_0000100/mp_rank_01/model_optim_rng.pt", "iter_0000200/mp_rank_01/model_optim_rng.pt"),
        ("MyModel_Epoch3.pth", "MyModel_Epoch10.pth"),
        ("step100/__0_0.distcp", "step200/__0_0.distcp"),
    ],
)
def test_checkpoints_of_one_training_are_a_series(earlier: str, later: str) -> None:
    first, second = series_of(earlier.encode()), series_of(later.encode())
    assert first is not None and second is not None
    assert first[0] == second[0] and first[1] < second[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "checkpoint-500/model-00001-of-00002.safetensors",
            "checkpoint-500/model-00002-of-00002.safetensors",
        ),
        ("global_step100/mp_rank_00_model_states.pt", "global_step100/mp_rank_01_model_states.pt"),
        ("ckpt-100-rank0.pt", "ckpt-100-rank1.pt"),
        ("step100/__0_0.distcp", "step100/__1_0.distcp"),
        ("seed_1/ckpt-100.pt", "seed_2/ckpt-200.pt"),
        ("ckpt-100.pt", "ckpt-200.optimizer"),
    ],
)
def test_shards_and_runs_are_none_of_each_others_series(one: str, other: str) -> None:
    first, second = series_of(one.encode()), series_of(other.encode())
    assert first is not None and second is not None and first[0] != second[0]


@pytest.mark.parametrize(
    "path", ["train/00001.tar", "model.pt", "shard-00001.tar", "footstep.wav", "lockstep_7.txt", "2024/a1"]
)
def test_other_numbers_say_nothing(path: str) -> None:
    assert series_of(path.encode()) is None


def test_a_later_checkpoint_makes_the_one_before_outdated() -> None:
    checkpoints = Checkpoints()
    assert checkpoints.stored(b"ckpt-100.pt", b"a", 1) is None
    assert checkpoints.stored(b"ckpt-200.pt", b"b", 2) == b"a"
    assert checkpoints.stored(b"other/ckpt-300.pt", b"x", 3) is None
    assert checkpoints.stored(b"ckpt-300.pt", b"c", 4) == b"b"


def test_one_that_is_stored_late_is_outdated_itself() -> None:
    checkpoints = Checkpoints()
    assert checkpoints.stored(b"ckpt-200.pt", b"b", 2) is None
    assert checkpoints.stored(b"ckpt-100.pt", b"a", 1) == b"a"
    assert checkpoints.stored(b"ckpt-300.pt", b"c", 3) == b"b"


def test_a_checkpoint_that_is_written_again_is_not_outdated_by_itself() -> None:
    checkpoints = Checkpoints()
    assert checkpoints.stored(b"ckpt-1.pt", b"a", 1) is None
    assert checkpoints.stored(b"ckpt-1.pt", b"b", 2) is None
    assert checkpoints.stored(b"ckpt-2.pt", b"c", 3) == b"b"


def test_a_training_that_begins_anew_makes_nothing_outdated_that_was_just_written() -> None:
    checkpoints = Checkpoints()
    assert checkpoints.stored(b"ckpt-900.pt", b"old", 1) is None
    assert checkpoints.stored(b"ckpt-100.pt", b"new", 2) is None
    assert checkpoints.stored(b"ckpt-200.pt", b"next", 3) == b"new"


def test_series_that_were_not_heard_of_for_long_are_forgotten() -> None:
    checkpoints = Checkpoints()
    for number in range(5000):
        assert checkpoints.stored(b"run%d/ckpt-1.pt" % number, b"v", number) is None
    assert len(checkpoints._latest) < 5000
    assert checkpoints.stored(b"run0/ckpt-2.pt", b"w", 9999) is None
    assert checkpoints.stored(b"run4999/ckpt-2.pt", b"w", 9999) == b"v"


def test_a_checkpoint_that_is_renamed_to_its_name_makes_the_one_before_outdated() -> None:
    checkpoints = Checkpoints()
    for step, vid, outdated in ((100, b"a", None), (200, b"b", b"a"), (300, b"c", b"b")):
        assert checkpoints.stored(b"latest.tmp", vid, step) is None
        assert checkpoints.stored(b"ckpt-%d.pt" % step, vid, step) == outdated


@pytest.mark.parametrize(
    "temporary", ["step_%d/model.tmp", "tmp_step_%d/model", "ckpt.tmp-%d", "tmp-ckpt-%d"]
)
def test_what_is_written_under_a_temporary_name_makes_nothing_outdated(temporary: str) -> None:
    """The last whole checkpoint is not the temporary one's predecessor before that has its name."""
    checkpoints = Checkpoints()
    for step, vid, outdated in ((100, b"a", None), (200, b"b", b"a"), (300, b"c", b"b")):
        assert checkpoints.stored((temporary % step).encode(), vid, step) is None
        assert checkpoints.stored(b"step_%d/model" % step, vid, step) == outdated


def test_a_temporary_one_that_was_left_behind_is_outdated_by_the_next() -> None:
    checkpoints = Checkpoints()
    assert checkpoints.stored(b"tmp-ckpt-100", b"a", 1) is None
    assert checkpoints.stored(b"tmp-ckpt-200", b"b", 2) == b"a"


def test_what_leaves_its_series_is_not_outdated_by_it() -> None:
    checkpoints = Checkpoints()
    assert checkpoints.stored(b"ckpt-100.pt", b"a", 1) is None
    assert checkpoints.stored(b"best.pt", b"a", 1) is None
    assert checkpoints.stored(b"ckpt-200.pt", b"b", 2) is None
    assert checkpoints.stored(b"ckpt-300.pt", b"c", 3) == b"b"


def test_a_checkpoint_is_never_outdated_by_itself() -> None:
    """The same bytes at the same temporary key are one version; and another number may be given later."""
    checkpoints = Checkpoints()
    assert checkpoints.stored(b"ckpt-100.pt", b"a", 1) is None
    assert checkpoints.stored(b"ckpt-300.pt", b"a", 1) is None
    assert checkpoints.stored(b"ckpt-200.pt", b"a", 1) is None
    assert checkpoints.stored(b"ckpt-250.pt", b"b", 2) == b"a"


def test_a_version_is_the_latest_of_one_series_at_most() -> None:
    checkpoints, dice = Checkpoints(), random.Random(1)
    for number in range(5000):
        path = b"run%d/%s%d" % (dice.randrange(2000), dice.choice((b"ckpt-", b"x")), number)
        vid = b"%d" % dice.randrange(500)
        checkpoints.stored(path, vid, dice.randrange(100))
        series = {vid: series for series, (_, _, vid) in checkpoints._latest.items()}
        assert series == checkpoints._series and len(series) == len(checkpoints._latest) <= 1024
