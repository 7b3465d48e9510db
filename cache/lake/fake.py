"""A lake in memory, with faults on demand. It passes the contract tests of the real ones."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from cache.errors import LakeError, LakeUnavailable, ObjectChanged, ObjectExists, ObjectMissing, TruncatedBody
from cache.lake.base import Body, ListPage, Part
from cache.model import ObjectInfo, ObjectVersion

Fault = Callable[[str, str], Exception | Literal["truncate"] | None]
_PIECE_BYTES = 100_000  # No multiple of a block.
_GATE_TIMEOUT_S = 60.0  # A test that forgets to open a gate fails instead of hanging.


@dataclass(slots=True)
class _Stored:
    info: ObjectInfo
    body: bytes


@dataclass(slots=True)
class _Upload:
    key: str
    metadata: dict[str, str]
    parts: dict[int, tuple[Part, bytes]] = field(default_factory=dict)


class FakeLake:
    """Implements `cache.lake.base.Lake`.

    *fault* is asked before every request, as fault(verb, key): an exception is raised, "truncate"
    ends a GET's body early. `gates[verb]`, when set, holds that verb's requests until the event
    is set. `requests` counts each verb, `bytes_fetched` what GETs returned.
    """

    part_bytes_min = 1
    has_directories = False

    def __init__(self, url: str = "fake://lake", fault: Fault | None = None) -> None:
        self.url = url
        self.fault = fault
        self.gates: dict[str, threading.Event] = {}
        self.requests: Counter[str] = Counter()
        self.gets: list[tuple[str, int, int]] = []  # Key, offset, length of each GET, in order.
        self.bytes_fetched = 0
        self.closed = False
        self._mutex = threading.Lock()  # Guards the counts and everything below.
        self._objects: dict[str, _Stored] = {}
        self._names: list[bytes] = []  # The keys' bytes, sorted.
        self._uploads: dict[str, _Upload] = {}
        self._serial = itertools.count(1)

    def check(self) -> None:
        self._meet("check", "")

    def list_page(
        self,
        prefix: str,
        *,
        delimiter: bool,
        token: str | None = None,
        start_after: str = "",
        keys_max: int = 1000,
    ) -> ListPage:
        self._meet("list", prefix)
        after, passed = _encode(start_after), None
        if token is not None:
            after = _encode(token[1:])
            passed = token[1:] if token[0] == "p" else None  # All below it was rolled up already.
        rows: dict[str, ObjectInfo | None] = {}  # In order; None for a common prefix.
        with self._mutex:
            for name in self._names_from(max(after, _encode(prefix))):
                key = _decode(name)
                if not key.startswith(prefix):
                    break
                if name == after or (passed is not None and key.startswith(passed)):
                    continue
                rolled = _rolled_up(key, prefix) if delimiter else ""
                row = rolled or key
                if row not in rows and len(rows) == keys_max:
                    return _page(rows, more=True)
                info = self._objects[key].info
                rows[row] = ObjectInfo(info.version, info.mtime_ns) if not rolled else None
            return _page(rows, more=False)

    def head(self, key: str) -> ObjectInfo:
        self._meet("head", key)
        with self._mutex:
            return self._stored(key).info

    def get_range(self, version: ObjectVersion, offset: int, length: int) -> Body:
        body, truncate = self._found(version, offset, length)
        if truncate:
            raise TruncatedBody(f"{self._where(version.key)}: the body ended early")
        return body

    def get_pieces(self, version: ObjectVersion, offset: int, length: int) -> Iterator[Body]:
        body, truncate = self._found(version, offset, length)
        for start in range(0, length // 2 if truncate else length, _PIECE_BYTES):
            yield body[start : start + _PIECE_BYTES]
        if truncate:
            raise TruncatedBody(f"{self._where(version.key)}: the body ended early")

    def _found(self, version: ObjectVersion, offset: int, length: int) -> tuple[memoryview, bool]:
        """Return the bytes, and whether they are to end early."""
        assert length > 0 and 0 <= offset <= version.size_bytes - length, (version, offset, length)
        truncate = self._meet("get", version.key)
        with self._mutex:
            self.gets.append((version.key, offset, length))
            stored = self._stored(version.key)
            if stored.info.version != version:
                raise ObjectChanged(f"{self._where(version.key)}: has changed in the lake")
            self.bytes_fetched += 0 if truncate else length
            return memoryview(stored.body)[offset : offset + length], truncate

    def put(
        self,
        key: str,
        body: Body,
        *,
        metadata: Mapping[str, str] | None = None,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> ObjectInfo:
        self._meet("put", key)
        with self._mutex:
            return self._store(key, bytes(body), dict(metadata or {}), if_match, if_none_match)

    def start_multipart(self, key: str, *, metadata: Mapping[str, str] | None = None) -> str:
        self._meet("start_multipart", key)
        with self._mutex:
            upload_id = f"upload-{next(self._serial)}"
            self._uploads[upload_id] = _Upload(key, dict(metadata or {}))
            return upload_id

    def put_part(self, key: str, upload_id: str, number: int, body: Body) -> Part:
        assert number >= 1, number
        self._meet("put_part", key)
        with self._mutex:
            content = bytes(body)
            digest = hashlib.md5(content, usedforsecurity=False).hexdigest()  # As S3 has it.
            part = Part(number, f'"{digest}"', len(content))
            self._upload(key, upload_id).parts[number] = (part, content)
            return part

    def list_parts(self, key: str, upload_id: str) -> list[Part]:
        self._meet("list_parts", key)
        with self._mutex:
            parts = self._upload(key, upload_id).parts
            return [parts[number][0] for number in sorted(parts)]

    def complete_multipart(
        self,
        key: str,
        upload_id: str,
        parts: Iterable[Part],
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> ObjectInfo:
        self._meet("complete_multipart", key)
        with self._mutex:
            upload = self._upload(key, upload_id)
            pieces: list[bytes] = []
            for part in sorted(parts, key=lambda part: part.number):
                stored, content = upload.parts.get(part.number, (None, b""))
                if stored is None or stored.etag != part.etag:
                    raise LakeError(f"{self._where(key)}: part {part.number} is not the one that was stored")
                pieces.append(content)
            info = self._store(key, b"".join(pieces), upload.metadata, if_match, if_none_match)
            del self._uploads[upload_id]
            return info

    def abort_multipart(self, key: str, upload_id: str) -> None:
        self._meet("abort_multipart", key)
        with self._mutex:
            self._uploads.pop(upload_id, None)

    def copy(
        self, source: ObjectVersion, key: str, *, metadata: Mapping[str, str] | None = None
    ) -> ObjectInfo:
        self._meet("copy", source.key)
        with self._mutex:
            stored = self._stored(source.key)
            if stored.info.version != source:
                raise ObjectChanged(f"{self._where(source.key)}: has changed in the lake")
            kept = stored.info.metadata if metadata is None else metadata
            return self._store(key, stored.body, dict(kept), None, False)

    def delete_many(self, keys: Iterable[str]) -> dict[str, LakeError]:
        failed: dict[str, LakeError] = {}
        for key in keys:
            try:
                self._meet("delete", key)
            except LakeError as error:
                failed[key] = error
                continue
            with self._mutex:
                if self._objects.pop(key, None) is not None:
                    self._names.remove(_encode(key))
        return failed

    def close(self) -> None:
        self.closed = True

    def fill(self, bodies: Mapping[str, bytes]) -> dict[str, ObjectVersion]:
        """Store many objects at once, uncounted and without faults; return their versions."""
        with self._mutex:
            return {key: self._store(key, body, {}, None, False).version for key, body in bodies.items()}

    def _meet(self, verb: str, key: str) -> bool:
        """Count a request, wait at its gate, and raise its fault. Return whether to truncate."""
        with self._mutex:
            self.requests[verb] += 1
        gate = self.gates.get(verb)
        if gate is not None and not gate.wait(_GATE_TIMEOUT_S):
            raise LakeUnavailable(f"{self._where(key)}: the gate for {verb} was never opened")
        fault = self.fault(verb, key) if self.fault is not None else None
        if isinstance(fault, Exception):
            raise fault
        return fault == "truncate"

    def _store(
        self, key: str, body: bytes, metadata: dict[str, str], if_match: str | None, if_none_match: bool
    ) -> ObjectInfo:
        assert not (if_match and if_none_match)
        present = self._objects.get(key)
        if if_none_match and present is not None:
            raise ObjectExists(f"{self._where(key)}: exists already")
        if if_match is not None and (present is None or present.info.version.etag != if_match):
            raise ObjectChanged(f"{self._where(key)}: has changed in the lake")
        if present is None:
            bisect.insort(self._names, _encode(key))
        version = ObjectVersion(key, f'"{next(self._serial):x}"', len(body))
        info = ObjectInfo(version, time.time_ns(), metadata)
        self._objects[key] = _Stored(info, body)
        return info

    def _stored(self, key: str) -> _Stored:
        stored = self._objects.get(key)
        if stored is None:
            raise ObjectMissing(f"{self._where(key)}: no such object")
        return stored

    def _upload(self, key: str, upload_id: str) -> _Upload:
        upload = self._uploads.get(upload_id)
        if upload is None or upload.key != key:
            raise ObjectMissing(f"{self._where(key)}: no such upload: {upload_id}")
        return upload

    def _names_from(self, first: bytes) -> Iterable[bytes]:
        return itertools.islice(self._names, bisect.bisect_left(self._names, first), None)

    def _where(self, key: str) -> str:
        return f"{self.url}/{key}".encode("utf-8", "backslashreplace").decode()


def _rolled_up(key: str, prefix: str) -> str:
    """Return the common prefix that stands for *key* in a listing with delimiter, or ""."""
    end = key.find("/", len(prefix))
    return "" if end < 0 else key[: end + 1]


def _page(rows: dict[str, ObjectInfo | None], *, more: bool) -> ListPage:
    """Return the page. Its token is "k" or "p" (key or common prefix) and what was listed last."""
    last = next(reversed(rows), "")
    token = f"{'k' if rows.get(last) else 'p'}{last}" if more else None
    infos = [info for info in rows.values() if info is not None]
    return ListPage(infos, [row for row, info in rows.items() if info is None], token)


def _encode(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
