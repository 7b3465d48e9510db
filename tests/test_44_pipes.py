"""The FIFOs of a read-only mount: who reads them, and for how long. Here they lie in a plain directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from cache.errors import TextRefused
from cache.pipes import Pipes

ORDER = b"order"


class Heard:
    """Takes the texts; refuses what begins with `no`."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []

    async def take(self, name: bytes, text: bytes) -> None:
        assert name == ORDER
        if text.startswith(b"no"):
            raise TextRefused("not that")
        self.texts.append(text)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "order")
    return tmp_path / "order"


def write(fifo: Path, text: bytes) -> None:
    """Open it without waiting for a reader. Raises OSError (ENXIO) when there is none."""
    fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(fd, text)
    finally:
        os.close(fd)


def has_reader(fifo: Path) -> bool:
    try:
        write(fifo, b"")
    except OSError as error:
        assert error.errno == errno.ENXIO
        return False
    return True


async def until(condition: Callable[[], bool], clock_s: float = 10.0) -> None:
    with trio.fail_after(clock_s):
        while not condition():  # noqa: ASYNC110 (the kernel tells nobody)
            await trio.sleep(0.005)


async def test_a_text_is_heard_whole_when_its_writer_has_gone(fifo: Path, heard: Heard) -> None:
    async with trio.open_nursery() as nursery:
        pipes = Pipes(nursery, fifo.parent, heard.take, 1 << 20)
        await pipes.looked_up(ORDER)
        fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        os.write(fd, b"one ")
        await trio.sleep(0.1)
        assert heard.texts == []
        os.write(fd, b"two")
        os.close(fd)
        await until(lambda: heard.texts == [b"one two"])
        await until(lambda: not has_reader(fifo))


async def test_what_is_refused_or_too_long_is_not_used_and_costs_no_later_text(
    fifo: Path, heard: Heard
) -> None:
    async with trio.open_nursery() as nursery:
        pipes = Pipes(nursery, fifo.parent, heard.take, 100)
        for text in (b"no", b"x" * 101, b"yes"):
            await pipes.looked_up(ORDER)
            write(fifo, text)
            await until(lambda: not has_reader(fifo))
    assert heard.texts == [b"yes"]


async def test_letting_go_ends_readers_without_a_writer_at_once(fifo: Path, heard: Heard) -> None:
    async with trio.open_nursery() as nursery:
        pipes = Pipes(nursery, fifo.parent, heard.take, 100)
        await pipes.looked_up(ORDER)
        assert has_reader(fifo)
        with trio.fail_after(3):  # It would stay for five seconds.
            await pipes.let_go()
        assert not has_reader(fifo)


async def test_letting_go_ends_a_reader_that_is_just_being_opened(fifo: Path, heard: Heard) -> None:
    """As one is after a mover's death: `sluice umount` found the mount busy."""
    async with trio.open_nursery() as nursery:
        pipes = Pipes(nursery, fifo.parent, heard.take, 100)
        opened = trio.Event()

        async def look_up() -> None:
            await pipes.looked_up(ORDER)
            opened.set()

        nursery.start_soon(look_up)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(4):  # Before it would end by itself.
            await pipes.let_go()
            await opened.wait()
            assert not has_reader(fifo)


async def test_letting_go_waits_for_a_writer(fifo: Path, heard: Heard) -> None:
    async with trio.open_nursery() as nursery:
        pipes = Pipes(nursery, fifo.parent, heard.take, 100)
        await pipes.looked_up(ORDER)
        fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        os.write(fd, b"begun")
        await trio.sleep(0.05)
        with trio.move_on_after(0.3) as waiting:
            await pipes.let_go()
        assert waiting.cancelled_caught
        os.close(fd)
        with trio.fail_after(5):
            await pipes.let_go()
    assert heard.texts == [b"begun"]


async def test_what_is_no_fifo_is_not_read(tmp_path: Path, heard: Heard) -> None:
    (tmp_path / "order").write_bytes(b"text")
    async with trio.open_nursery() as nursery:
        await Pipes(nursery, tmp_path, heard.take, 100).looked_up(ORDER)
        await trio.sleep(0.1)
    assert heard.texts == []
