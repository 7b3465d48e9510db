"""Hints of a coming order: what is read, counted as useless, or refused in one line."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import UsageError
from cache.policy.order import told


def test_paths_are_taken_as_they_are() -> None:
    hint = told.parse(b"a/1.jpg\nb c/\xff=2.jpg\r\n\n/data/x=1\n")
    assert hint.paths == [b"a/1.jpg", b"b c/\xff=2.jpg", b"/data/x=1"]
    assert not hint.useless and hint.sampler is None


def test_lines_of_numbers_are_places_in_the_listing() -> None:
    assert told.parse(b"3\n1\n2\n").indices.tolist() == [3, 1, 2]
    assert told.parse(b"lines=paths\n3\n1\n").paths == [b"3", b"1"]


@pytest.mark.parametrize(
    "text",
    [b"sampler=torch seed=5 epoch=2 world=2", b'{"sampler": "torch", "seed": 5, "epoch": 2, "world": 2}'],
)
def test_a_sampler_is_told_in_one_line(text: bytes) -> None:
    hint = told.parse(text)
    assert hint.sampler == told.ToldSampler("torch", 5, 2, "reseed", world=2, ranks=(0, 1))


def test_a_directory_may_stand_above_a_sampler() -> None:
    for between in (b"\n", b" "):
        hint = told.parse(b"directory=/data/train" + between + b"sampler=torch seed=5\n")
        assert hint.directory == b"/data/train"
        assert hint.sampler == told.ToldSampler("torch", 5, 0, "reseed")


def test_lines_of_no_use_are_counted_by_reason() -> None:
    hint = told.parse(b"a\nb\na\n\x00\x01\n" + b"x" * 5000 + b"\n")
    assert hint.paths == [b"a", b"b"]
    assert hint.useless == {"are there twice": 1, "are no text": 2}
    numbers = told.parse(b"1\n2\nseven\n1\n")
    assert numbers.indices.tolist() == [1, 2]
    assert numbers.useless == {"are there twice": 1, "no numbers": 1}


def test_a_million_lines_are_read() -> None:
    hint = told.parse(b"\n".join(b"class%04d/%07d.jpg" % (i % 1000, i) for i in range(1_000_000)))
    assert len(hint) == 1_000_000 and not hint.useless


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "no line names a file (there are none)"),
        (b"\0\1\2\n" * 3, "no line names a file (3 are no text)"),
        (random.Random(1).randbytes(100_000).replace(b"\n", b"\0"), "no line names a file"),
        (b"sampler=tortch", "sampler=tortch: must be one of torch"),
        (b"sampler=torch seed=x", "seed=x: must be a whole number"),
        (b"sampler=torch seed=-1", "seed=-1: must be a whole number"),
        (b"sampler=torch world=2 ranks=2", "ranks go from 0 to world - 1"),
        (b"sampler=torch world=99999999", "ranks go from 0"),
        (b"sampler=torch advance=often", "advance=often: of torch it is one of reseed"),
        (b"sampler=torch\na/b", "a sampler and lines"),
        (b"sampler=torch seed=0 wrld=3", "unknown: wrld; there are sampler, seed"),
        (b"directory=/d\nsampler=torch sede=0", "unknown: sede"),
        (b"directory=/d\nsampler=torch seed=0\na/b", "a sampler and lines"),
        (b'{"sampler": ', "the first line is no JSON object"),
        (b'{"smapler": "torch"}', "unknown: smapler"),
        (b"lines=words\na", "lines=words: must be paths or indices"),
    ],
)
def test_a_hint_of_no_use_gets_one_line(text: bytes, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        told.parse(text)
    assert said in str(raised.value) and "\n" not in str(raised.value)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_hint_or_one_line(text: bytes) -> None:
    try:
        hint = told.parse(text)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert len(hint) or hint.sampler is not None
