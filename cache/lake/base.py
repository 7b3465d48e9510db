"""What the rest of the project asks of an object store.

All verbs block and may be called from many threads at once. Keys are relative to the lake's
prefix, never start with "/" because of us, and are `str` with surrogate escapes for bytes that
are no UTF-8. No verb retries: `policy/retry.py` decides that, for the caller. Each verb raises
only `cache.errors.LakeError` and its subclasses.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cache.errors import LakeError
from cache.model import ObjectInfo, ObjectVersion

Body = bytes | bytearray | memoryview  # Read-only, contiguous, one byte an item.


@dataclass(frozen=True, slots=True)
class ListPage:
    """One page of a listing. *prefixes* end in "/"; *next_token* is None on the last page."""

    objects: list[ObjectInfo]
    prefixes: list[str]
    next_token: str | None


@dataclass(frozen=True, slots=True)
class Part:
    """One uploaded part of a multipart upload; *number* counts from 1.

    *crc32*: of its bytes, see `crc32_text`; a listing of the parts may leave it out.
    """

    number: int
    etag: str
    size_bytes: int
    crc32: str = field(default="", compare=False)


def crc32_text(content: Body) -> str:
    """Return the CRC32 as S3 writes it: base64 of the four bytes, the highest first."""
    return base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode()


class Lake(Protocol):
    url: str
    part_bytes_min: int  # Of every part but the last.
    has_directories: bool  # Whether one can be there, and listed, without an object or marker.

    def check(self) -> None:
        """Raise the LakeError that a mount would meet first: bucket, credentials, region, TLS."""

    def list_page(
        self,
        prefix: str,
        *,
        delimiter: bool,
        token: str | None = None,
        start_after: str = "",
        keys_max: int = 1000,
    ) -> ListPage:
        """Return one page of the keys below *prefix*, in the lake's own order.

        With *delimiter*, keys with a "/" after *prefix* are rolled up into `prefixes`. Pass the
        last page's `next_token` as *token* to go on. A prefix with no keys gives an empty page.
        """

    def head(self, key: str) -> ObjectInfo:
        """Return the object's version, time and metadata. Raises ObjectMissing, AccessDenied."""

    def get_range(self, version: ObjectVersion, offset: int, length: int) -> Body:
        """Return exactly the *length* bytes at *offset* of this very version (If-Match).

        The range lies within the version's size and is not empty. Raises ObjectChanged when
        the key now holds another version, ObjectMissing, and TruncatedBody rather than
        return fewer bytes.
        """

    def get_pieces(self, version: ObjectVersion, offset: int, length: int) -> Iterator[Body]:
        """Yield the same bytes in order, in pieces of any size, as they arrive. Raises as `get_range` does.

        It may raise after some pieces: what was yielded counts only once all has been. A piece stays as
        it is for as long as somebody has it: several are written at once.
        """

    def put(
        self,
        key: str,
        body: Body,
        *,
        metadata: Mapping[str, str] | None = None,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> ObjectInfo:
        """Store *body* atomically. Raises ObjectChanged (*if_match*), ObjectExists (*if_none_match*)."""

    def start_multipart(self, key: str, *, metadata: Mapping[str, str] | None = None) -> str:
        """Return the upload id. The caller completes or aborts it."""

    def put_part(self, key: str, upload_id: str, number: int, body: Body) -> Part:
        """Store a part. *body* is the caller's again afterwards."""

    def list_parts(self, key: str, upload_id: str) -> list[Part]:
        """Return the parts stored so far, by number. Raises ObjectMissing for an unknown upload.

        Fill in what is missing of their checksums before they are handed to `complete_multipart`.
        """

    def complete_multipart(
        self,
        key: str,
        upload_id: str,
        parts: Iterable[Part],
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> ObjectInfo: ...

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Forget the upload and its parts. An unknown upload is no error."""

    def copy(
        self, source: ObjectVersion, key: str, *, metadata: Mapping[str, str] | None = None
    ) -> ObjectInfo:
        """Copy on the lake's side. Raises ObjectChanged, ObjectMissing.

        The copy has the source's metadata, or *metadata* instead where that is given: then *key* may
        be the source's own.
        """

    def delete_many(self, keys: Iterable[str]) -> dict[str, LakeError]:
        """Delete the keys (any number); return those that failed. A missing key is no failure."""

    def close(self) -> None: ...
