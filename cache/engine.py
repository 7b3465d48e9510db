"""Threads for blocking lake and disk I/O, with results handed to trio in batches.

A thread hop for each request, as `trio.to_thread` makes it, costs half of the client library's
rate; so a thread that ends its job goes on to the next one, and all results that have gathered
wake the trio loop once. Threads wait in a C queue: a Condition takes and drops the interpreter lock
several times for each job.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

import outcome
import trio

log = logging.getLogger(__name__)

# Results that nobody waits for are handed over so often: at a thousand a second, a turn of trio's loop
# for each would cost as much as all that is done with it.
_GATHER_S = 0.003

T = TypeVar("T")
Then = Callable[[outcome.Outcome[Any]], None]


ThenAll = Callable[[list[tuple[Any, outcome.Outcome[Any]]]], None]


class Job:
    """*task* waits for the result, or *then* is called with it, or *gathered* with it and those of others.

    *argument* tells this one from the others then.
    """

    __slots__ = ("argument", "call", "gathered", "result", "task", "then")

    def __init__(
        self,
        call: Callable[[], object],
        task: trio.lowlevel.Task | None = None,
        then: Then | None = None,
        gathered: ThenAll | None = None,
        argument: object = None,
    ) -> None:
        self.call = call
        self.task = task
        self.then = then
        self.gathered = gathered
        self.argument = argument
        self.result: outcome.Outcome[Any] | None = None


class Engine:
    """Runs calls in *threads* threads, demand first; read-ahead leaves *reserved* of them free.

    Invariant: there are as many tokens as jobs that may be taken at once, or more; a thread that finds
    no job for its token drops it. What ends the waiting of a job that may not be taken adds one.
    """

    def __init__(self, name: str, threads: int, reserved: int = 0) -> None:
        assert 0 <= reserved < threads
        self._demand: deque[Job] = deque()
        self._ahead: deque[Job] = deque()
        self._ahead_max = threads - reserved
        self._ahead_running = 0
        self._mutex = threading.Lock()
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._threads = threads
        self._finished: deque[Job] = deque()
        self._gathered: deque[Job] = deque()
        self._is_gathering = False
        self._stopped = False
        self._token = trio.lowlevel.current_trio_token()
        self._workers = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(threads)
        ]
        for worker in self._workers:
            worker.start()

    async def run(self, call: Callable[[], T], *, demand: bool = True) -> T:
        """Return what *call* returns, or raise what it raises.

        When cancelled before a thread took the job, it never runs; after that it runs to its
        end and the result is dropped.
        """
        job = Job(call, trio.lowlevel.current_task())
        self._add(job, demand)

        def abort(_: object) -> trio.lowlevel.Abort:
            with self._mutex:
                job.task = None
                for queue in (self._demand, self._ahead):
                    if job in queue:
                        queue.remove(job)
            return trio.lowlevel.Abort.SUCCEEDED

        result: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return result

    def submit(self, call: Callable[[], object], then: Then, *, demand: bool = True) -> None:
        """Have *call* run, and *then* called with its outcome on trio's thread. *then* must not raise."""
        self._add(Job(call, then=then), demand)

    def submit_gathered(self, call: Callable[[], object], argument: object, then: ThenAll) -> None:
        """Have *call* run, behind what somebody waits for, and *then* called on trio's thread.

        *then* gets the (argument, outcome) of all calls submitted with it that ended together, and must not
        raise. So what follows them can be done for all at once.
        """
        self._add(Job(call, gathered=then, argument=argument), demand=False)

    def _add(self, job: Job, demand: bool) -> None:
        with self._mutex:
            (self._demand if demand else self._ahead).append(job)
        self._tokens.put(None)

    def stop(self) -> None:
        """Let the threads end after the jobs that they are at. Does not wait for them."""
        self._stopped = True
        for _ in range(self._threads):
            self._tokens.put(None)

    def _take(self) -> tuple[Job, bool] | None:
        """Return a job that may be run now, and whether nobody waits for it."""
        with self._mutex:
            if self._demand:
                return self._demand.popleft(), False
            if self._ahead and self._ahead_running < self._ahead_max:
                self._ahead_running += 1
                return self._ahead.popleft(), True
            return None

    def _work(self) -> None:
        while True:
            self._tokens.get()
            if self._is_stopped():
                return
            while (taken := self._take()) is not None:
                try:
                    self._do(*taken)
                except trio.RunFinishedError:
                    return
                del taken  # A thread that waits would keep what its last job holds, 16 MiB of an upload.
                if self._is_stopped():
                    return

    def _do(self, job: Job, is_ahead: bool) -> None:
        job.result = outcome.capture(job.call)
        if is_ahead:
            with self._mutex:
                self._ahead_running -= 1
        self._finish(job, is_ahead and (job.then is not None or job.gathered is not None))

    def _is_stopped(self) -> bool:
        return self._stopped

    def _finish(self, job: Job, may_wait: bool) -> None:
        """Have the result handed over: at once, or with others that *may_wait*. In the job's thread."""
        if not may_wait:
            self._finished.append(job)
            self._token.run_sync_soon(self._hand_over, idempotent=True)
            return
        self._gathered.append(job)
        if not self._is_gathering:
            self._is_gathering = True
            self._token.run_sync_soon(self._start_gathering, idempotent=True)

    def _start_gathering(self) -> None:
        trio.lowlevel.spawn_system_task(self._gather)

    async def _gather(self) -> None:
        """Hand over what gathers, until nothing has come in one interval."""
        while True:
            await trio.sleep(_GATHER_S)
            if not self._gathered:
                self._is_gathering = False
                if not self._gathered:  # A thread may have added one before it could see that.
                    return
                self._is_gathering = True
            self._deliver_gathered()

    def _deliver_gathered(self) -> None:
        batches: dict[ThenAll, list[tuple[Any, outcome.Outcome[Any]]]] = {}
        while self._gathered:
            job = self._gathered.popleft()
            if job.gathered is None:
                self._deliver(job)
            else:
                assert job.result is not None
                batches.setdefault(job.gathered, []).append((job.argument, job.result))
        for then, results in batches.items():
            try:
                then(results)
            except Exception:  # Raised into trio it would end the mover.
                log.exception("what follows %d jobs failed", len(results))

    def _hand_over(self) -> None:
        while self._finished:
            self._deliver(self._finished.popleft())

    def _deliver(self, job: Job) -> None:
        assert job.result is not None
        if job.task is not None:
            task, job.task = job.task, None
            trio.lowlevel.reschedule(task, job.result)
        elif job.then is not None:
            try:
                job.then(job.result)
            except Exception:  # Raised into trio it would end the mover.
                log.exception("what follows a job failed")
