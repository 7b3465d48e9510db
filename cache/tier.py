"""One tier: a directory of files named by object version, and its byte budget.

  objects/ab/<id>   whole objects, immutable           partial/ab/<id>   sparse files
  incoming/         being written; emptied at start

File calls here block and release the interpreter lock; the accounting is for the mover's trio
thread alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import xxhash

from cache.errors import BlockCorrupt, CacheError, CacheFull
from cache.model import BLOCK_BYTES, GROUP_BYTES, MIB, GroupIndex, ObjectVersion, VersionId
from cache.records import (
    PAGE_BYTES,
    BlockChecksums,
    Group,
    VersionRow,
    block_checksums,
    charge,
    whole_checksum,
)

_XATTR = "user.sluice.version"  # msgpack [key, etag, size, xxh3_128 of the block checksums]
# The page cache keeps what one write brings in folios as large as its place and length allow. Of pieces as
# they arrive, some 280 KiB each, most are small: reading 4 KiB at a random place takes 1.25 times as long as
# in a file that was written by the MiB (pread(2) in C, 512 MiB, each way five times in turn).
_WRITE_BYTES = MIB
_PIECES_MAX = 256  # writev(2) takes 1024.
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class TierFiles:
    """Where the bytes are. Used by the mover and, for reading, by every worker."""

    def __init__(self, name: str, path: Path, *, is_memory: bool) -> None:
        self.name = name
        self.path = path
        self.is_memory = is_memory
        self._objects = str(path / "objects")
        self._partial = str(path / "partial")
        self._incoming = path / "incoming"
        self._serial = 0

    def __repr__(self) -> str:
        return f"<tier {self.name} {self.path}>"

    def prepare(self) -> None:
        """Make the directories and empty incoming/. Raises CacheError."""
        try:
            shutil.rmtree(self._incoming, ignore_errors=True)
            self._incoming.mkdir(parents=True)
            for folder in (self._objects, self._partial):
                for i in range(256):
                    os.makedirs(f"{folder}/{i:02x}", exist_ok=True)
        except OSError as error:
            raise CacheError(f"{self.path}: {error.strerror}") from error

    @property
    def label_bytes(self) -> int:
        """What a whole file's label takes on disk: ext4 gives it a block of its own."""
        return 0 if self.is_memory else PAGE_BYTES

    def whole_bytes(self, size_bytes: int) -> int:
        """Return what a whole object of *size_bytes* is charged here."""
        return charge(size_bytes) + self.label_bytes

    def object_path(self, vid: bytes) -> str:
        name = vid.hex()
        return f"{self._objects}/{name[:2]}/{name}"

    def partial_path(self, vid: bytes) -> str:
        name = vid.hex()
        return f"{self._partial}/{name[:2]}/{name}"

    def file_path(self, vid: bytes, *, whole: bool) -> str:
        return self.object_path(vid) if whole else self.partial_path(vid)

    def land_whole(
        self, version: ObjectVersion, vid: bytes, body: bytes | bytearray | memoryview
    ) -> list[int]:
        """Store a whole object and return its block checksums. Raises CacheFull, CacheError."""
        checksums = block_checksums(body)
        with _as_cache_errors(self.path):
            path = self._new_path(vid)
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    _write_all(fd, body, 0)
                    if not self.is_memory:
                        os.setxattr(fd, _XATTR, _label(version, checksums))
                finally:
                    os.close(fd)
                os.rename(path, self.object_path(vid))
            except BaseException:
                _unlink(path)
                raise
        return checksums

    def land_blocks(
        self, vid: bytes, offset: int, pieces: Iterable[bytes | bytearray | memoryview]
    ) -> list[int]:
        """Store *pieces* from *offset*, a block boundary, of the sparse file on; return the checksums.

        Raises what *pieces* raises, CacheFull and CacheError: part of the bytes may be there then.
        """
        checksums = BlockChecksums()
        with _as_cache_errors(self.path):
            fd = os.open(self.partial_path(vid), os.O_WRONLY | os.O_CREAT, 0o600)
        writes = _AlignedWrites(fd, offset)
        try:
            for piece in pieces:
                checksums.add(piece)
                with _as_cache_errors(self.path):
                    writes.add(piece)
            with _as_cache_errors(self.path):
                writes.end()
        finally:
            os.close(fd)
        return checksums.end()

    def make_whole(self, version: ObjectVersion, vid: bytes, checksums: list[int]) -> None:
        """Move a sparse file, all of whose blocks have landed, to objects/."""
        with _as_cache_errors(self.path):
            if not self.is_memory:
                os.setxattr(self.partial_path(vid), _XATTR, _label(version, checksums))
            os.rename(self.partial_path(vid), self.object_path(vid))

    def link_whole(self, version: ObjectVersion, vid: bytes, path: str, checksums: Sequence[int]) -> None:
        """Take over a finished file of this file system: it gets its label and a second name, in objects/."""
        with _as_cache_errors(self.path):
            os.setxattr(path, _XATTR, _label(version, checksums))
            _unlink(self.object_path(vid))  # A crash may have left one.
            os.link(path, self.object_path(vid))

    def hand_over(self, vid: bytes, path: str, file: int, mtime_ns: int) -> None:
        """Give a whole object a second name, *path*, where an empty file is. Raises CacheError.

        It gets that file's mode, and a time. *file*: its number (stat(2): st_ino), 0 if that is not known;
        another one's is not given.
        """
        with _as_cache_errors(self.path):
            source = self.object_path(vid)
            if file and os.stat(source).st_ino != file:
                raise CacheError(f"{source}: was made anew since it was opened")
            mode = stat.S_IMODE(os.stat(path).st_mode)
            os.unlink(path)
            os.link(source, path)
            os.chmod(path, mode)
            os.utime(path, ns=(time.time_ns(), mtime_ns))

    def is_beside(self, path: str) -> bool:
        """Return whether *path* is on this tier's file system."""
        with _as_cache_errors(self.path):
            return not self.is_memory and os.stat(path).st_dev == os.stat(self._incoming).st_dev

    def make_sparse(self, vid: bytes) -> None:
        """Take `make_whole` back, as far as it got."""
        with _as_cache_errors(self.path), contextlib.suppress(FileNotFoundError):
            os.rename(self.object_path(vid), self.partial_path(vid))
        with contextlib.suppress(OSError):  # There may be no label yet; its block is not charged.
            os.removexattr(self.partial_path(vid), _XATTR)

    def punch(self, vid: bytes, blocks: range) -> None:
        """Give the disk space of *blocks* of a sparse file back. No file is no error."""
        with _as_cache_errors(self.path), contextlib.suppress(FileNotFoundError):
            fd = os.open(self.partial_path(vid), os.O_WRONLY)
            try:
                mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
                if _libc.fallocate(fd, mode, blocks.start * BLOCK_BYTES, len(blocks) * BLOCK_BYTES):
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code))
            finally:
                os.close(fd)

    def remove(self, vid: bytes) -> None:
        """Unlink the version's files, where there are any. Raises CacheError."""
        self.unlink(vid, whole=True)
        self.unlink(vid, whole=False)

    def unlink(self, vid: bytes, *, whole: bool) -> None:
        """Unlink one of the version's files, if it is there. Raises CacheError."""
        with _as_cache_errors(self.path):
            _unlink(self.file_path(vid, whole=whole))

    def copy_from(
        self, source: TierFiles, row: VersionRow, vid: bytes, groups: list[tuple[GroupIndex, Group]]
    ) -> None:
        """Copy what *groups* say is there of a version, checked on the way. Raises BlockCorrupt."""
        with _as_cache_errors(self.path):
            path = self._new_path(vid)
            try:
                with (
                    open(source.file_path(vid, whole=row.whole), "rb", buffering=0) as reader,
                    open(path, "xb", buffering=0) as writer,
                ):
                    for index, group in groups:
                        _copy_group(reader.fileno(), writer.fileno(), index, group, reader.name)
                    if row.whole and not self.is_memory:
                        checksums = [checksum for _, group in groups for checksum in group.checksums]
                        os.setxattr(writer.fileno(), _XATTR, _label(row.version, checksums))
                os.rename(path, self.file_path(vid, whole=row.whole))
            except BaseException:
                _unlink(path)
                raise

    def read_label(self, vid: bytes) -> tuple[ObjectVersion, list[int]] | None:
        """Return a whole object's version and block checksums if its bytes bear its label out."""
        path = self.object_path(vid)
        try:
            key, etag, size_bytes, digest = msgspec.msgpack.decode(
                os.getxattr(path, _XATTR), type=tuple[bytes, str, int, bytes]
            )
            version = ObjectVersion(key.decode("utf-8", "surrogateescape"), etag, size_bytes)
            if version.id != vid or os.stat(path).st_size != size_bytes:
                return None
            checksums: list[int] = []
            with open(path, "rb") as reader:
                while chunk := reader.read(GROUP_BYTES):
                    checksums += block_checksums(chunk)
        except (OSError, msgspec.MsgspecError):
            return None
        return (version, checksums) if whole_checksum(checksums) == digest else None

    def stored(self) -> Iterator[tuple[VersionId, bool, int]]:
        """Yield (version id, whole, charged bytes) of every file; unlink what has no such name."""
        with _as_cache_errors(self.path):
            for folder, whole in ((self._objects, True), (self._partial, False)):
                for i in range(256):
                    yield from _stored_in(f"{folder}/{i:02x}", whole)

    def free_bytes(self) -> int:
        """Return what the file system under this tier still has to give."""
        with _as_cache_errors(self.path):
            status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def _new_path(self, vid: bytes) -> str:
        self._serial += 1
        return f"{self._incoming}/{vid.hex()}-{self._serial}"


class TierBudget:
    """Bytes charged to one tier. Invariant: 0 <= used_bytes <= size_bytes, always.

    What is about to be written is charged before, so the disk never holds more than is charged.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.used_bytes = 0

    @property
    def room_bytes(self) -> int:
        return self.size_bytes - self.used_bytes

    def take(self, charged_bytes: int) -> None:
        assert charged_bytes >= 0 and charged_bytes <= self.room_bytes, (charged_bytes, self.room_bytes)
        self.used_bytes += charged_bytes

    def give_back(self, charged_bytes: int) -> None:
        assert 0 <= charged_bytes <= self.used_bytes, (charged_bytes, self.used_bytes)
        self.used_bytes -= charged_bytes


def _stored_in(folder: str, whole: bool) -> Iterator[tuple[VersionId, bool, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            vid = _vid_of(entry.name)
            if vid is None:
                _unlink(entry.path)
                continue
            yield vid, whole, entry.stat().st_blocks * 512


def _copy_group(reader: int, writer: int, index: GroupIndex, group: Group, path: str) -> None:
    offset = index * GROUP_BYTES
    body = memoryview(os.pread(reader, GROUP_BYTES, offset))
    writes = _AlignedWrites(writer, offset)
    for i, expected in enumerate(group.checksums):
        if group.present >> i & 1:
            block = body[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]
            if xxhash.xxh3_64_intdigest(block) != expected:
                raise BlockCorrupt(f"{path}: block {i} of group {index} does not match its checksum")
            writes.add(block)
        else:  # What follows begins behind it.
            writes.end()
            writes = _AlignedWrites(writer, offset + (i + 1) * BLOCK_BYTES)
    writes.end()


def _label(version: ObjectVersion, checksums: Sequence[int]) -> bytes:
    key = version.key.encode("utf-8", "surrogateescape")
    return msgspec.msgpack.encode((key, version.etag, version.size_bytes, whole_checksum(checksums)))


def _vid_of(name: str) -> VersionId | None:
    try:
        vid = bytes.fromhex(name)
    except ValueError:
        return None
    return VersionId(vid) if len(vid) == 16 else None


class _AlignedWrites:
    """Writes pieces of any size from *offset* on, each time up to a multiple of `_WRITE_BYTES`."""

    def __init__(self, fd: int, offset: int) -> None:
        self._fd = fd
        self._offset = offset  # Of what is kept.
        self._kept: list[memoryview] = []
        self._kept_bytes = 0

    def add(self, piece: bytes | bytearray | memoryview) -> None:
        view = memoryview(piece)
        end = self._offset + self._kept_bytes + len(view)
        rest_bytes = end % _WRITE_BYTES
        if end - rest_bytes > self._offset:
            assert rest_bytes <= len(view), "what is kept ends before the next multiple"
            self._keep(view[: len(view) - rest_bytes])
            self.end()
            view = view[len(view) - rest_bytes :]
        self._keep(view)
        if len(self._kept) == _PIECES_MAX:
            self.end()

    def _keep(self, view: memoryview) -> None:
        if view:
            self._kept.append(view)
            self._kept_bytes += len(view)

    def end(self) -> None:
        """Write what is kept."""
        kept, self._kept, self._kept_bytes = self._kept, [], 0
        while kept:
            written = os.pwritev(self._fd, kept, self._offset)
            self._offset += written
            while kept and written >= len(kept[0]):
                written -= len(kept.pop(0))
            if written:
                kept[0] = kept[0][written:]


def _write_all(fd: int, body: bytes | bytearray | memoryview, offset: int) -> int:
    """Return where the next bytes go."""
    view = memoryview(body)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
    return offset


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def _as_cache_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = CacheFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else CacheError
        raise kind(f"{where}: {error.strerror}") from error
