"""How long a listing is believed, and which keys a path can show."""

from __future__ import annotations

import pytest

from cache.policy.freshness import FOREVER_S, Freshness
from cache.policy.names import why_no_name

NOW_S = 1_700_000_000.0


def test_what_was_seen_is_good_for_the_rest_of_the_ttl() -> None:
    freshness = Freshness(ttl_s=60, immutable=False)
    assert freshness.remaining_s(NOW_S, NOW_S) == 60
    assert freshness.remaining_s(NOW_S - 45, NOW_S) == 15
    assert freshness.remaining_s(NOW_S - 60, NOW_S) == 0
    assert not freshness.is_fresh(NOW_S - 1000, NOW_S)


def test_what_was_never_seen_is_not_fresh_even_on_immutable_mounts() -> None:
    assert not Freshness(60, immutable=False).is_fresh(0.0, NOW_S)
    assert not Freshness(60, immutable=True).is_fresh(0.0, NOW_S)


def test_immutable_mounts_believe_what_they_saw_once_for_ever() -> None:
    freshness = Freshness(ttl_s=1, immutable=True)
    assert freshness.remaining_s(1.0, NOW_S) == FOREVER_S
    assert not freshness.wants_relist_ahead(NOW_S - 0.9, 0.01, NOW_S)


def test_a_clock_that_was_set_back_expires_what_lies_in_the_future() -> None:
    assert not Freshness(60, immutable=False).is_fresh(NOW_S + 5, NOW_S)


def test_without_a_ttl_nothing_is_fresh() -> None:
    assert not Freshness(0, immutable=False).is_fresh(NOW_S, NOW_S)


@pytest.mark.parametrize(
    ("age_s", "duration_s", "wanted"),
    [
        (10, 0.1, False),  # Long to go yet.
        (50, 0.1, True),  # In the last quarter.
        (61, 0.1, False),  # Expired: whoever comes next lists it.
        (35, 15, True),  # It takes 15 s: begin 30 s before.
        (59, 40, False),  # It takes longer than half of the ttl.
    ],
)
def test_a_directory_in_use_is_listed_again_in_time(age_s: float, duration_s: float, wanted: bool) -> None:
    freshness = Freshness(ttl_s=60, immutable=False)
    assert freshness.wants_relist_ahead(NOW_S - age_s, duration_s, NOW_S) is wanted


@pytest.mark.parametrize(
    "part", ["a", "...", "..a", " ", "a\nb", "ü" * 127, "x" * 255, "\udcff", "*?", "a.rclonelink"]
)
def test_odd_names_can_be_shown(part: str) -> None:
    assert why_no_name(part) is None


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("", "//"),
        (".", "'.'"),
        ("..", "'..'"),
        ("a\0b", "NUL"),
        ("x" * 256, "255 bytes"),
        ("ü" * 128, "255 bytes"),
        ("\udcff" * 256, "255 bytes"),
    ],
)
def test_what_no_path_can_show_has_a_reason(part: str, reason: str) -> None:
    assert reason in (why_no_name(part) or "")
