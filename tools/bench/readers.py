"""Processes that read files as loader processes do, forked and waiting before the clock starts."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tools.bench.figures import MeasurementFailed

READ_BYTES = 1 << 20
ANSWER_S = 600.0  # Longest wait for a reader: a mount that hangs must not hang the benchmark.
END_S = 5.0  # A reader that waits in the kernel dies only when its mount is gone.

Prepare = Callable[[Any], Callable[[], int]]


def read_file(path: str) -> int:
    """Open *path*, read it to its end, close it; return the bytes read. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size_bytes = 0
        while piece := os.read(fd, READ_BYTES):
            size_bytes += len(piece)
        return size_bytes
    finally:
        os.close(fd)


def prepare_files(paths: Sequence[str]) -> Callable[[], int]:
    """Return what reads each of *paths* once and returns the bytes."""
    return lambda: sum(map(read_file, paths))


def shuffled_shares(items: Sequence[str], shares: int, seed: int) -> list[list[str]]:
    """Return *items* in an order that *seed* gives, dealt to *shares*, as samplers deal to ranks."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return [order[share::shares] for share in range(shares)]


def timed(prepare: Prepare, shares: Sequence[Any], expected_bytes: int) -> float:
    """Return the seconds from the word "go" to the end of the last share's work, a process each.

    *prepare* is called with the share before the clock starts, in the share's process; what it returns
    does the work and returns the bytes read. Raises MeasurementFailed unless they add up to
    *expected_bytes*.
    """
    fork = get_context("fork")
    children: list[tuple[BaseProcess, Connection]] = []
    try:
        for share in shares:
            ours, theirs = fork.Pipe()
            child: BaseProcess = fork.Process(target=_child, args=(prepare, share, theirs), daemon=True)
            child.start()
            theirs.close()
            children.append((child, ours))
        for _, connection in children:
            if (said := _answer(connection)) != "ready":
                raise MeasurementFailed(f"a reader process failed: {said}")
        start_s = time.perf_counter()
        for _, connection in children:
            connection.send("go")
        results = [_result(connection) for _, connection in children]
        took_s = time.perf_counter() - start_s
    finally:
        for child, connection in children:
            connection.close()
            child.join(1)
            child.kill()
            child.join(END_S)
    if sum(results) != expected_bytes:
        raise MeasurementFailed(f"{sum(results)} bytes were read instead of {expected_bytes}")
    return took_s


def _child(prepare: Prepare, share: Any, connection: Connection) -> None:
    try:
        work = prepare(share)
        connection.send("ready")
        connection.recv()
        connection.send(work())
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def _answer(connection: Connection) -> Any:
    if not connection.poll(ANSWER_S):
        raise MeasurementFailed(f"a reader process did not end within {ANSWER_S:g} s")
    try:
        return connection.recv()
    except EOFError as error:
        raise MeasurementFailed("a reader process ended without a result") from error


def _result(connection: Connection) -> int:
    result = _answer(connection)
    if not isinstance(result, int):
        raise MeasurementFailed(f"a reader process failed: {result}")
    return result
