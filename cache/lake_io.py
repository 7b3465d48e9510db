"""Counts and retries lake requests: what every coordinator sends goes through here."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import trio

from cache.engine import Engine
from cache.errors import LakeError, LakeUnavailable
from cache.lake.base import Body, Lake, ListPage, Part
from cache.model import ObjectInfo, ObjectVersion
from cache.policy.retry import RetryPolicy

log = logging.getLogger(__name__)
T = TypeVar("T")

_WARN_EVERY_S = 10.0


class LakeIO:
    """The lake with retries. `requests` and the byte counts are for `sluice status`."""

    def __init__(self, lake: Lake, engine: Engine, retry: RetryPolicy, seed: int = 0) -> None:
        self.lake = lake
        self._engine = engine
        self._retry = retry
        self._random = random.Random(seed or None)
        self.requests: Counter[str] = Counter()
        self.bytes_fetched = 0
        self.bytes_sent = 0
        self._counting = threading.Lock()
        self.retries = 0
        self.failing_since_s: float | None = None
        self.has_given_up = False  # A request used its retries up, and none has succeeded since.
        self._warned_at_s = -_WARN_EVERY_S

    async def list_page(
        self, prefix: str, token: str | None, keys_max: int = 1000, *, delimiter: bool = True
    ) -> ListPage:
        """Return one page, rolled up at "/" or flat. Raises LakeError once the retries are used up."""

        def call() -> ListPage:
            self._count("list")
            return self.lake.list_page(prefix, delimiter=delimiter, token=token, keys_max=keys_max)

        return await self.retrying("list", prefix, lambda: self._engine.run(call))

    async def head(self, key: str) -> ObjectInfo:
        def call() -> ObjectInfo:
            self._count("head")
            return self.lake.head(key)

        return await self.retrying("head", key, lambda: self._engine.run(call))

    # Changes. An answer may be lost: what was asked for can have happened although these raise.

    async def put(
        self,
        key: str,
        body: Body,
        metadata: Mapping[str, str],
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> ObjectInfo:
        def call() -> ObjectInfo:
            self._count("put")
            info = self.lake.put(key, body, metadata=metadata, if_match=if_match, if_none_match=if_none_match)
            self._count_sent(body)
            return info

        return await self.retrying("put", key, lambda: self._engine.run(call))

    async def start_multipart(self, key: str, metadata: Mapping[str, str]) -> str:
        def call() -> str:
            self._count("put")
            return self.lake.start_multipart(key, metadata=metadata)

        return await self.retrying("start of an upload", key, lambda: self._engine.run(call))

    async def put_part(self, key: str, upload_id: str, number: int, body: Body) -> Part:
        def call() -> Part:
            self._count("put")
            part = self.lake.put_part(key, upload_id, number, body)
            self._count_sent(body)
            return part

        return await self.retrying(f"part {number}", key, lambda: self._engine.run(call))

    async def list_parts(self, key: str, upload_id: str) -> list[Part]:
        """Raises ObjectMissing for an upload that the lake does not know (any more)."""

        def call() -> list[Part]:
            self._count("list")
            return self.lake.list_parts(key, upload_id)

        return await self.retrying("list of parts", key, lambda: self._engine.run(call))

    async def complete_multipart(
        self,
        key: str,
        upload_id: str,
        parts: Sequence[Part],
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> ObjectInfo:
        def call() -> ObjectInfo:
            self._count("put")
            return self.lake.complete_multipart(
                key, upload_id, parts, if_match=if_match, if_none_match=if_none_match
            )

        return await self.retrying("end of an upload", key, lambda: self._engine.run(call))

    async def abort_multipart(self, key: str, upload_id: str) -> None:
        def call() -> None:
            self._count("delete")
            self.lake.abort_multipart(key, upload_id)

        await self.retrying("end of an upload", key, lambda: self._engine.run(call))

    async def copy(
        self, source: ObjectVersion, key: str, metadata: Mapping[str, str] | None = None
    ) -> ObjectInfo:
        """Copy on the lake's side, or change the metadata in place. As `Lake.copy`."""

        def call() -> ObjectInfo:
            self._count("copy")
            return self.lake.copy(source, key, metadata=metadata)

        return await self.retrying("copy", source.key, lambda: self._engine.run(call))

    async def delete_many(self, keys: Sequence[str]) -> dict[str, LakeError]:
        """Delete up to a thousand keys in one request; return those that failed, unretried."""

        def call() -> dict[str, LakeError]:
            self._count("delete")
            return self.lake.delete_many(keys)

        return await self._engine.run(call)

    async def run(self, call: Callable[[], T]) -> T:
        """Run a blocking *call* in a lake thread, without retries."""
        return await self._engine.run(call)

    def get(self, version: ObjectVersion, offset: int, length: int) -> Body:
        """Return the bytes of one GET, blocking. For use inside of `retrying`, in a thread."""
        self._count("get")
        body = self.lake.get_range(version, offset, length)
        assert len(memoryview(body)) == length, (version, offset, length)
        with self._counting:
            self.bytes_fetched += length
        return body

    def get_pieces(self, version: ObjectVersion, offset: int, length: int) -> Iterator[Body]:
        """Yield the bytes of one GET as they arrive, blocking. As `get`, and as `Lake.get_pieces`."""
        self._count("get")
        fetched_bytes = 0
        for piece in self.lake.get_pieces(version, offset, length):
            fetched_bytes += memoryview(piece).nbytes
            yield piece
        assert fetched_bytes == length, (version, offset, length, fetched_bytes)
        with self._counting:
            self.bytes_fetched += length

    def _count(self, verb: str) -> None:
        with self._counting:
            self.requests[verb] += 1

    def _count_sent(self, body: Body) -> None:
        with self._counting:
            self.bytes_sent += memoryview(body).nbytes

    async def retrying(self, verb: str, key: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return what *attempt* returns, trying again as the policy says."""
        started_s, tries = time.monotonic(), 0
        while True:
            try:
                result = await attempt()
            except LakeError as error:
                elapsed_s = time.monotonic() - started_s
                tries += 1
                delay_s = self._retry.delay_s(error, tries, elapsed_s, self._random.random())
                self._note_failure(verb, key, error, delay_s)
                if delay_s is None:
                    raise
                self.retries += 1
                await trio.sleep(delay_s)
            else:
                self.note_success()
                return result

    def failing_for_s(self) -> float | None:
        """Return for how long the lake has not answered; None while it does."""
        return None if self.failing_since_s is None else time.monotonic() - self.failing_since_s

    def _note_failure(self, verb: str, key: str, error: LakeError, delay_s: float | None) -> None:
        now_s = time.monotonic()
        if not isinstance(error, LakeUnavailable):
            return
        if self.failing_since_s is None:
            self.failing_since_s = now_s
        self.has_given_up = self.has_given_up or delay_s is None
        if now_s - self._warned_at_s >= _WARN_EVERY_S:
            self._warned_at_s = now_s
            next_step = "given up" if delay_s is None else f"next try in {delay_s:.1f} s"
            log.warning("lake: %s of %r failed (%s), %s", verb, key, error, next_step)

    def note_success(self) -> None:
        """Note that the lake answered. `retrying` does so itself."""
        if self.failing_since_s is not None:
            log.info("lake: answers again after %.0f s", time.monotonic() - self.failing_since_s)
            self.failing_since_s = None
            self.has_given_up = False
