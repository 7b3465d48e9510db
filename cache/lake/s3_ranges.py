"""GETs of byte ranges of a bucket's objects: through obstore where it can serve them, else boto3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from cache.errors import LakeError, ObjectChanged
from cache.lake.base import Body
from cache.lake.s3_client import Connection
from cache.lake.s3_errors import Place, from_obstore, is_obstore_tls_failure, truncated
from cache.model import KIB, ObjectVersion

# What obstore gathers before it hands bytes over. All of 8 MiB at once are copied into memory that was
# never touched before: a page fault for each 4 KiB, a quarter of the mover's processor time for a stream.
_PIECE_BYTES = 256 * KIB


class RangeReader:
    """*translated*: turns what boto3 raises into a LakeError about a key."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        place: Place,
        translated: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._place = place
        self._translated = translated

    def get(self, connection: Connection, version: ObjectVersion, offset: int, length: int) -> Body:
        """As `Lake.get_range`."""
        try:
            result = self._ask(connection, version, offset, length)
            body = None if result is None else memoryview(result.bytes())
        except LakeError:
            raise
        except Exception as error:  # obstore's classes are few and change between releases.
            return self._get_instead(error, connection, version, offset, length)
        if body is None:
            return self._get_plain(connection, version, offset, length)
        if len(body) != length:
            raise truncated(self._place, version.key)
        return body

    def pieces(
        self, connection: Connection, version: ObjectVersion, offset: int, length: int
    ) -> Iterator[Body]:
        """As `Lake.get_pieces`."""
        end, result = offset + length, None
        try:
            if length > _PIECE_BYTES:
                result = self._ask(connection, version, offset, length)
            for piece in () if result is None else result.stream(min_chunk_size=_PIECE_BYTES):
                offset += len(piece)
                yield memoryview(piece)
        except LakeError:
            raise
        except Exception as error:  # What came before it is of this version, too: _ask has looked.
            yield self._get_instead(error, connection, version, offset, end - offset)
            return
        if result is None:
            yield self.get(connection, version, offset, length)
        elif offset != end:
            raise truncated(self._place, version.key)

    def _ask(self, connection: Connection, version: ObjectVersion, offset: int, length: int) -> Any:
        """Return obstore's reply, of which the head is there; None where boto3 has to be asked."""
        name = self._prefix + version.key
        byte_store = connection.byte_store() if can_name(name) else None
        if byte_store is None:
            return None
        options = {"range": (offset, offset + length), "if_match": version.etag}
        result = byte_store.get(byte_store.store, name, options=options)
        verify(self._place, version, result.meta["e_tag"], result.meta["size"])
        if result.range != (offset, offset + length):
            raise truncated(self._place, version.key)
        return result

    def _get_instead(
        self, error: Exception, connection: Connection, version: ObjectVersion, offset: int, length: int
    ) -> bytes:
        """Raise what obstore's *error* means; return the bytes from boto3 where only its answer can tell."""
        known = from_obstore(error, self._place, version.key)
        if known is not None or not length:
            raise known or truncated(self._place, version.key) from error
        plain = self._get_plain(connection, version, offset, length)
        if is_obstore_tls_failure(error):  # It would fail at every GET.
            connection.drop_byte_store("its rules for TLS refuse this server's certificate")
        return plain

    def _get_plain(self, connection: Connection, version: ObjectVersion, offset: int, length: int) -> bytes:
        with self._translated(version.key):
            reply = connection.client.get_object(
                Bucket=self._bucket,
                Key=self._prefix + version.key,
                Range=f"bytes={offset}-{offset + length - 1}",
                IfMatch=version.etag,
            )
            with reply["Body"] as stream:
                verify(self._place, version, reply["ETag"], _whole_size(reply))
                body: bytes = stream.read()
        if len(body) != length:
            raise truncated(self._place, version.key)
        return body


def verify(place: Place, version: ObjectVersion, etag: str | None, size_bytes: int) -> None:
    """Raise ObjectChanged unless the reply is of *version*: some servers ignore If-Match."""
    if quoted(etag or "") != version.etag or size_bytes != version.size_bytes:
        raise ObjectChanged(f"{place.object(version.key)}: has changed in the lake")


def can_name(name: str) -> bool:
    """Return whether obstore, given *name*, asks for exactly this key: it refuses or alters the others."""
    return (
        all(part not in ("", ".", "..") for part in name.split("/"))
        and name.isprintable()  # No control characters, and no surrogates.
    )


def quoted(etag: str) -> str:
    """Return the ETag in its one form: some servers leave the quotes out of some replies' XML."""
    return etag if etag.endswith('"') else f'"{etag}"'


def _whole_size(reply: Any) -> int:
    """Return the object's size from Content-Range, or from the body's when all of it came."""
    content_range: str = reply.get("ContentRange", "")
    total = content_range.rpartition("/")[2]
    return int(total) if total.isdigit() else int(reply["ContentLength"])
