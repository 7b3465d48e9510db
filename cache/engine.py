"""Threads for blocking lake and disk I/O, with results handed to trio in batches.

A thread hop for each request, as `trio.to_thread` makes it, costs half of the client library's
rate; so a thread that ends its job goes on to the next one, and all results that have gathered
wake the trio loop once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import outcome
import trio

T = TypeVar("T")


class Job:
    __slots__ = ("call", "result", "task")

    def __init__(self, call: Callable[[], object], task: trio.lowlevel.Task) -> None:
        self.call = call
        self.task: trio.lowlevel.Task | None = task
        self.result: outcome.Outcome[Any] | None = None


class Engine:
    """Runs calls in *threads* threads, demand first; read-ahead leaves *reserved* of them free."""

    def __init__(self, name: str, threads: int, reserved: int = 0) -> None:
        assert 0 <= reserved < threads
        self._demand: deque[Job] = deque()
        self._ahead: deque[Job] = deque()
        self._ahead_max = threads - reserved
        self._ahead_running = 0
        self._changed = threading.Condition()
        self._finished: deque[Job] = deque()
        self._stopped = False
        self._token = trio.lowlevel.current_trio_token()
        for i in range(threads):
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True).start()

    async def run(self, call: Callable[[], T], *, demand: bool = True) -> T:
        """Return what *call* returns, or raise what it raises.

        When cancelled before a thread took the job, it never runs; after that it runs to its
        end and the result is dropped.
        """
        job = Job(call, trio.lowlevel.current_task())
        with self._changed:
            (self._demand if demand else self._ahead).append(job)
            self._changed.notify()

        def abort(_: object) -> trio.lowlevel.Abort:
            with self._changed:
                job.task = None
                for queue in (self._demand, self._ahead):
                    if job in queue:
                        queue.remove(job)
            return trio.lowlevel.Abort.SUCCEEDED

        result: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return result

    def stop(self) -> None:
        """Let the threads end after the jobs that they are at. Does not wait for them."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _next_job(self) -> tuple[Job, bool] | None:
        with self._changed:
            while not self._stopped:
                if self._demand:
                    return self._demand.popleft(), False
                if self._ahead and self._ahead_running < self._ahead_max:
                    self._ahead_running += 1
                    return self._ahead.popleft(), True
                self._changed.wait()
            return None

    def _work(self) -> None:
        while (taken := self._next_job()) is not None:
            job, is_ahead = taken
            job.result = outcome.capture(job.call)
            if is_ahead:
                with self._changed:
                    self._ahead_running -= 1
                    self._changed.notify()
            self._finished.append(job)
            try:
                self._token.run_sync_soon(self._hand_over, idempotent=True)
            except trio.RunFinishedError:
                return

    def _hand_over(self) -> None:
        while self._finished:
            job = self._finished.popleft()
            if job.task is not None:
                assert job.result is not None
                task, job.task = job.task, None
                trio.lowlevel.reschedule(task, job.result)
