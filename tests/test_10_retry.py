"""The retry policy: a pure function of error, attempt, time and a random draw."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import (
    AccessDenied,
    LakeMisconfigured,
    LakeUnavailable,
    ObjectChanged,
    ObjectExists,
    ObjectMissing,
    SlowDown,
    TruncatedBody,
)
from cache.policy.retry import RetryPolicy

POLICY = RetryPolicy()
NEARLY_ONE = 0.999999


@pytest.mark.parametrize(
    "error", [ObjectMissing, ObjectChanged, ObjectExists, AccessDenied, LakeMisconfigured, ValueError]
)
def test_what_asking_again_cannot_mend_is_given_up_at_once(error: type[Exception]) -> None:
    assert POLICY.delay_s(error("no"), 1, 0.0, 0.5) is None


@pytest.mark.parametrize("error", [LakeUnavailable, TruncatedBody, SlowDown])
def test_what_may_pass_is_retried(error: type[Exception]) -> None:
    assert POLICY.delay_s(error("later"), 1, 0.0, 0.5) is not None


def test_the_backoff_doubles_up_to_the_longest() -> None:
    delays = [POLICY.delay_s(LakeUnavailable(), attempt, 0.0, NEARLY_ONE) for attempt in range(1, 9)]
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0], rel=1e-4)


def test_jitter_spreads_the_wait_down_to_zero() -> None:
    assert POLICY.delay_s(LakeUnavailable(), 3, 0.0, 0.0) == 0.0
    assert POLICY.delay_s(LakeUnavailable(), 3, 0.0, 0.5) == pytest.approx(0.2)


def test_slow_down_waits_longer_and_never_less_than_half() -> None:
    assert POLICY.delay_s(SlowDown(), 1, 0.0, 0.0) == pytest.approx(0.5)
    assert POLICY.delay_s(SlowDown(), 2, 0.0, NEARLY_ONE) == pytest.approx(2.0, rel=1e-4)


def test_the_budget_ends_it_before_a_wait_that_would_pass_it() -> None:
    policy = RetryPolicy(budget_s=10.0)
    assert policy.delay_s(LakeUnavailable(), 7, 9.0, 0.1) == pytest.approx(0.5)
    assert policy.delay_s(LakeUnavailable(), 7, 9.0, 0.5) is None
    assert policy.delay_s(LakeUnavailable(), 1, 10.0, 0.0) is None


def test_no_budget_means_one_attempt() -> None:
    assert RetryPolicy(budget_s=0.0).delay_s(LakeUnavailable(), 1, 0.0, 0.0) is None


@given(
    attempt=st.integers(1, 10**9),
    elapsed_s=st.floats(0, 1e6),
    jitter=st.floats(0, 1, exclude_max=True),
    slow=st.booleans(),
)
def test_a_wait_is_bounded_and_ends_within_the_budget(
    attempt: int, elapsed_s: float, jitter: float, slow: bool
) -> None:
    error = SlowDown() if slow else LakeUnavailable()
    delay_s = POLICY.delay_s(error, attempt, elapsed_s, jitter)
    if delay_s is not None:
        assert 0 <= delay_s <= POLICY.longest_s
        assert elapsed_s + delay_s < POLICY.budget_s


def test_a_request_that_always_fails_ends_within_its_budget_after_a_handful_of_attempts() -> None:
    generator, elapsed_s, attempt = random.Random(7), 0.0, 1
    while (delay_s := POLICY.delay_s(LakeUnavailable(), attempt, elapsed_s, generator.random())) is not None:
        elapsed_s += delay_s
        attempt += 1
    assert elapsed_s < POLICY.budget_s
    assert 8 <= attempt <= 40
