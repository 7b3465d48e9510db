"""A local directory as a lake, with the semantics of a bucket.

An ETag is made of a file's time, size and inode number. Files are replaced by rename, never
written in place, under a lock file that makes conditional puts atomic between processes.
What a bucket can hold and a directory can't: keys with empty, "." or ".." parts, names over 255
bytes, and a key that is also another's directory. Putting those fails; reading them finds nothing.
`.sluice-lake/` in the root holds the lock, uploads, files on their way in, and metadata where the
filesystem has no extended attributes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

from cache.config import LakeConfig
from cache.errors import (
    AccessDenied,
    LakeError,
    LakeMisconfigured,
    LakeUnavailable,
    ObjectChanged,
    ObjectExists,
    ObjectMissing,
    TruncatedBody,
)
from cache.lake.base import Body, ListPage, Part
from cache.lake.directory_files import copy_bytes, read, stamp, sweep, sync_directory, write
from cache.lake.directory_listing import Tree
from cache.model import ObjectInfo, ObjectVersion

_HIDDEN = b".sluice-lake"
_LEFTOVER_AGE_S = 86400.0
_XATTR = "user.sluice.metadata"
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_UNAVAILABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EMFILE,
    errno.ENFILE,
}
_NO_XATTR = {errno.ENOTSUP, errno.ENODATA, errno.ENOSPC, errno.E2BIG, errno.ERANGE, errno.EPERM}


class DirectoryLake:
    """Implements `cache.lake.base.Lake`. Keys that end in "/" are directories: put makes one."""

    part_bytes_min = 1
    has_directories = True

    def __init__(self, config: LakeConfig) -> None:
        if not os.path.isabs(config.url):
            raise LakeMisconfigured(f"{config.url}: neither s3://BUCKET nor an absolute path of a directory")
        self.url = config.url
        self._root = os.path.realpath(_encode(config.url))
        self._tree = Tree(self._root, _HIDDEN)
        self._identity = self._root_identity()
        self._swept = False  # Of what writers that were killed left in incoming/.

    def check(self) -> None:
        self._check_root()
        if not os.access(self._root, os.R_OK | os.X_OK):
            raise AccessDenied(f"{self.url}: may not be read by this user; check its permissions")

    def list_page(
        self,
        prefix: str,
        *,
        delimiter: bool,
        token: str | None = None,
        start_after: str = "",
        keys_max: int = 1000,
    ) -> ListPage:
        try:
            with self._translated(prefix):
                keys, next_token = self._tree.page(
                    _encode(prefix),
                    delimiter=delimiter,
                    token=token,
                    start_after=_encode(start_after),
                    keys_max=keys_max,
                )
                names = [_decode(key) for key in keys]
        except ObjectMissing:
            return ListPage([], [], None)
        infos = (self._listed(name) for name in names if not name.endswith("/"))
        prefixes = [name for name in names if name.endswith("/")]
        return ListPage([info for info in infos if info is not None], prefixes, next_token)

    def head(self, key: str) -> ObjectInfo:
        with self._translated(key):
            if key.endswith("/"):
                return self._directory_info(key)
            with self._opened(key) as fd:
                return _info(key, os.fstat(fd), self._metadata(key, fd))

    def get_range(self, version: ObjectVersion, offset: int, length: int) -> Body:
        assert length > 0 and 0 <= offset <= version.size_bytes - length, (version, offset, length)
        with self._translated(version.key), self._opened(version.key) as fd:
            self._verify(version, fd)
            body = read(fd, offset, length)
            self._verify(version, fd)  # Written in place meanwhile: neither version's bytes.
        if len(body) != length:
            raise TruncatedBody(f"{self._where(version.key)}: the file ended early")
        return body

    def get_pieces(self, version: ObjectVersion, offset: int, length: int) -> Iterator[Body]:
        yield self.get_range(version, offset, length)

    def put(
        self,
        key: str,
        body: Body,
        *,
        metadata: Mapping[str, str] | None = None,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> ObjectInfo:
        if key.endswith("/") and not body:
            return self._put_directory(key, if_none_match=if_none_match)
        with self._translated(key, writing=True), self._incoming() as (fd, path):
            write(fd, body)
            return self._commit(key, fd, path, dict(metadata or {}), if_match, if_none_match)

    def start_multipart(self, key: str, *, metadata: Mapping[str, str] | None = None) -> str:
        self._path(key, writing=True)
        upload_id = secrets.token_hex(16)
        with self._translated(key, writing=True):
            directory = self._own_directory(b"uploads", upload_id.encode())
            with open(os.path.join(directory, b"upload.json"), "x", encoding="ascii") as file:
                json.dump({"key": key, "metadata": dict(metadata or {})}, file)
        return upload_id

    def put_part(self, key: str, upload_id: str, number: int, body: Body) -> Part:
        assert number >= 1, number
        directory, _ = self._upload(key, upload_id)
        with self._translated(key, writing=True), self._incoming() as (fd, path):
            write(fd, body)
            status = stamp(fd)
            os.fsync(fd)
            os.rename(path, os.path.join(directory, b"%05d" % number))
            sync_directory(directory)
            return Part(number, _etag(status), status.st_size)

    def list_parts(self, key: str, upload_id: str) -> list[Part]:
        directory, _ = self._upload(key, upload_id)
        with self._translated(key):
            names = sorted(name for name in os.listdir(directory) if name.isdigit())
            states = [os.stat(os.path.join(directory, name)) for name in names]
        return [
            Part(int(name), _etag(status), status.st_size) for name, status in zip(names, states, strict=True)
        ]

    def complete_multipart(
        self,
        key: str,
        upload_id: str,
        parts: Iterable[Part],
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> ObjectInfo:
        directory, metadata = self._upload(key, upload_id)
        with self._translated(key, writing=True), self._incoming() as (fd, path):
            for part in sorted(parts, key=lambda part: part.number):
                self._append_part(key, fd, directory, part)
            info = self._commit(key, fd, path, metadata, if_match, if_none_match)
        shutil.rmtree(directory, ignore_errors=True)
        return info

    def abort_multipart(self, key: str, upload_id: str) -> None:
        with suppress(ObjectMissing):
            directory, _ = self._upload(key, upload_id)
            with self._translated(key, writing=True):
                shutil.rmtree(directory)

    def copy(
        self, source: ObjectVersion, key: str, *, metadata: Mapping[str, str] | None = None
    ) -> ObjectInfo:
        if metadata is not None and key == source.key:
            return self._restate(source, dict(metadata))
        with self._translated(source.key), self._opened(source.key) as source_fd:
            self._verify(source, source_fd)
            metadata = self._metadata(source.key, source_fd) if metadata is None else dict(metadata)
            with self._translated(key, writing=True), self._incoming() as (fd, path):
                copy_bytes(source_fd, fd, source.size_bytes)
                self._verify(source, source_fd)
                return self._commit(key, fd, path, dict(metadata), None, False)

    def delete_many(self, keys: Iterable[str]) -> dict[str, LakeError]:
        failed: dict[str, LakeError] = {}
        for key in keys:
            try:
                self._delete(key)
            except ObjectMissing:
                pass
            except LakeError as error:
                failed[key] = error
        return failed

    def close(self) -> None:
        pass

    def _restate(self, source: ObjectVersion, metadata: dict[str, str]) -> ObjectInfo:
        """Change the metadata alone. Bytes and time, and so the ETag, stay what they are."""
        with self._translated(source.key, writing=True), self._locked(), self._opened(source.key) as fd:
            self._verify(source, fd)
            self._store_metadata(source.key, fd, source.etag, metadata)
            os.fsync(fd)
            return _info(source.key, os.fstat(fd), metadata)

    def _delete(self, key: str) -> None:
        path = self._path(key)
        with self._translated(key), self._locked():
            if key.endswith("/"):
                try:
                    os.rmdir(path)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
            else:
                sidecar = self._sidecar(key, _etag(os.stat(path, follow_symlinks=False)))
                os.unlink(path)
                with suppress(FileNotFoundError):
                    os.unlink(sidecar)
            sync_directory(os.path.dirname(path.rstrip(b"/")))

    def _commit(
        self,
        key: str,
        fd: int,
        path: bytes,
        metadata: dict[str, str],
        if_match: str | None,
        if_none_match: bool,
    ) -> ObjectInfo:
        """Move the finished file at *path* to its key, if the conditions hold, and make that durable."""
        assert not (if_match and if_none_match)
        target = self._path(key, writing=True)
        status = stamp(fd)
        if metadata:
            self._store_metadata(key, fd, _etag(status), metadata)
        os.fsync(fd)
        with self._locked():
            self._make_directories(os.path.dirname(target))
            present = self._present_etag(key)
            if if_none_match and present is not None:
                raise ObjectExists(f"{self._where(key)}: exists already")
            if if_match is not None and present != if_match:
                raise ObjectChanged(f"{self._where(key)}: has changed in the lake")
            os.rename(path, target)
            sync_directory(os.path.dirname(target))
        if present is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._sidecar(key, present))
        return _info(key, status, metadata)

    def _put_directory(self, key: str, *, if_none_match: bool) -> ObjectInfo:
        path = self._path(key, writing=True).rstrip(b"/")
        with self._translated(key, writing=True):
            with self._locked():
                if if_none_match and os.path.isdir(path):
                    raise ObjectExists(f"{self._where(key)}: exists already")
                self._make_directories(path)
            return self._directory_info(key)

    def _directory_info(self, key: str) -> ObjectInfo:
        status = os.stat(self._path(key))
        return ObjectInfo(ObjectVersion(key, '"directory"', 0), status.st_mtime_ns)

    def _listed(self, key: str) -> ObjectInfo | None:
        """Return a listed file as it is now, or None when it is gone."""
        try:
            status = os.stat(os.path.join(self._root, _encode(key)))
        except OSError:
            return None
        return _info(key, status, {}) if stat.S_ISREG(status.st_mode) else None

    def _path(self, key: str, *, writing: bool = False) -> bytes:
        """Return the path of *key*. Raises ObjectMissing, or LakeError when *writing*, if it has none."""
        encoded = _encode(key)
        names = encoded.removesuffix(b"/").split(b"/")
        impossible = b"\0" in encoded or any(name in (b"", b".", b"..") for name in names)
        path = os.path.join(self._root, encoded)
        if impossible or names[0] == _HIDDEN:
            if writing:
                raise LakeError(f"{self._where(key)}: no file can have this name in a directory lake")
            raise ObjectMissing(f"{self._where(key)}: no such object")
        if not self._tree.inside(os.path.realpath(os.path.dirname(path.rstrip(b"/")))):
            if writing:
                raise AccessDenied(f"{self._where(key)}: a symbolic link leads out of the lake")
            raise ObjectMissing(f"{self._where(key)}: no such object")
        return path

    @contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        """Open a regular file inside the lake for reading. Raises ObjectMissing for anything else."""
        path = os.path.join(self._root, _encode(key))
        if b"\0" in path or any(name in ("", ".", "..") for name in key.split("/")):
            raise ObjectMissing(f"{self._where(key)}: no such object")
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # No waiting for a FIFO's writer.
        try:
            real = os.readlink(b"/proc/self/fd/%d" % fd)  # Where the links led, without a race.
            if not stat.S_ISREG(os.fstat(fd).st_mode) or not self._tree.inside(real):
                raise ObjectMissing(f"{self._where(key)}: no such object")
            yield fd
        finally:
            os.close(fd)

    def _present_etag(self, key: str) -> str | None:
        try:
            with self._opened(key) as fd:
                return _etag(os.fstat(fd))
        except (FileNotFoundError, ObjectMissing):
            return None

    def _verify(self, version: ObjectVersion, fd: int) -> None:
        if _etag(os.fstat(fd)) != version.etag:
            raise ObjectChanged(f"{self._where(version.key)}: has changed in the lake")

    def _upload(self, key: str, upload_id: str) -> tuple[bytes, dict[str, str]]:
        """Return an upload's directory and metadata. Raises ObjectMissing when there is none."""
        directory = os.path.join(self._root, _HIDDEN, b"uploads", _encode(upload_id))
        with self._translated(key):
            if re.fullmatch("[0-9a-f]{32}", upload_id):
                with open(os.path.join(directory, b"upload.json"), encoding="ascii") as file:
                    upload = json.load(file)
                if upload["key"] == key:
                    return directory, upload["metadata"]
        raise ObjectMissing(f"{self._where(key)}: no such upload: {upload_id}")

    def _append_part(self, key: str, fd: int, directory: bytes, part: Part) -> None:
        with open(os.path.join(directory, b"%05d" % part.number), "rb") as file:
            status = os.fstat(file.fileno())
            if _etag(status) != part.etag:
                raise LakeError(f"{self._where(key)}: part {part.number} is not the one that was stored")
            copy_bytes(file.fileno(), fd, status.st_size)

    def _metadata(self, key: str, fd: int) -> dict[str, str]:
        try:
            text = os.getxattr(fd, _XATTR)
        except OSError as error:
            if error.errno not in _NO_XATTR:
                raise
            try:
                with open(self._sidecar(key, _etag(os.fstat(fd))), "rb") as file:
                    text = file.read()
            except FileNotFoundError:
                return {}
        metadata: dict[str, str] = json.loads(text)
        return metadata

    def _store_metadata(self, key: str, fd: int, etag: str, metadata: dict[str, str]) -> None:
        text = json.dumps(metadata).encode()
        try:
            os.setxattr(fd, _XATTR, text)
        except OSError as error:
            if error.errno not in _NO_XATTR:
                raise
            self._own_directory(b"metadata")
            with open(self._sidecar(key, etag), "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())

    def _sidecar(self, key: str, etag: str) -> bytes:
        name = hashlib.blake2b(_encode(f"{etag}\0{key}"), digest_size=16).hexdigest()
        return os.path.join(self._root, _HIDDEN, b"metadata", name.encode())

    @contextmanager
    def _incoming(self) -> Iterator[tuple[int, bytes]]:
        """Open a new file on the lake's filesystem; removed at the end unless it was moved away."""
        directory = self._own_directory(b"incoming")
        if not self._swept:
            self._swept = True
            sweep(directory, _LEFTOVER_AGE_S)
        path = os.path.join(directory, secrets.token_hex(16).encode())
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            yield fd, path
        finally:
            os.close(fd)
            with suppress(FileNotFoundError):
                os.unlink(path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of those who change what keys hold: threads and processes alike."""
        path = os.path.join(self._own_directory(), b"lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _own_directory(self, *names: bytes) -> bytes:
        path = os.path.join(self._root, _HIDDEN, *names)
        if not os.path.isdir(path):
            self._check_root()  # Never make the lake's directory anew where it was mounted.
            os.makedirs(path, exist_ok=True)
        return path

    def _make_directories(self, path: bytes) -> None:
        """Make *path* and what is missing above it, durably."""
        if os.path.isdir(path):
            return
        self._make_directories(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path)
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        sync_directory(os.path.dirname(path))

    def _root_identity(self) -> tuple[int, int]:
        try:
            status = os.stat(self._root)
        except OSError as error:
            raise LakeMisconfigured(f"{self.url}: {error.strerror}; name an existing directory") from error
        if not stat.S_ISDIR(status.st_mode):
            raise LakeMisconfigured(f"{self.url}: not a directory; name an existing directory")
        return status.st_dev, status.st_ino

    def _check_root(self) -> None:
        """Raise LakeUnavailable when the directory is gone: then nothing in it is 'missing'."""
        try:
            identity = self._root_identity()
        except LakeMisconfigured as error:
            raise LakeUnavailable(f"{self.url}: the lake's directory is gone; is it mounted?") from error
        if identity != self._identity:
            raise LakeUnavailable(f"{self.url}: another directory is in the lake's place; is it mounted?")

    def _where(self, key: str) -> str:
        text = f"{self.url.rstrip('/')}/{key}".encode("utf-8", "backslashreplace").decode()
        return text if text.isprintable() else text.encode("unicode_escape").decode()

    @contextmanager
    def _translated(self, key: str, *, writing: bool = False) -> Iterator[None]:
        """Turn an OSError into the LakeError that it means for *key*."""
        try:
            yield
        except OSError as error:
            raise self._error(key, error, writing) from error

    def _error(self, key: str, error: OSError, writing: bool) -> LakeError:
        text = f"{self._where(key)}: {error.strerror or error}"
        if error.errno in _DENIED:
            return AccessDenied(text)
        if error.errno in _UNAVAILABLE:
            return LakeUnavailable(text)
        if error.errno in _MISSING:
            self._check_root()
            if not writing:
                return ObjectMissing(f"{self._where(key)}: no such object")
            if error.errno in (errno.EISDIR, errno.ENOTDIR):
                return LakeError(f"{text}: a directory lake can't hold a key that is another's directory")
        if error.errno == errno.EXDEV:
            return LakeError(
                f"{text}: another filesystem is mounted inside the lake; make it a lake of its own"
            )
        return LakeError(text)


def _encode(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _decode(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def _etag(status: os.stat_result) -> str:
    return f'"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"'


def _info(key: str, status: os.stat_result, metadata: dict[str, str]) -> ObjectInfo:
    return ObjectInfo(ObjectVersion(key, _etag(status), status.st_size), status.st_mtime_ns, metadata)
