"""The journal: the pending rows in an LMDB environment of their own, committed synchronously.

It is precious: what it names exists nowhere else. So it is never removed or made anew by us.

  meta     b"format", b"store"
  pending  sequence number, 8 bytes big-endian -> Pending
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import lmdb
import msgspec

from cache import pages
from cache.errors import CacheError, UsageError
from cache.pending import Pending, decode_pending, encode_pending

FORMAT = b"sluicefs-journal 2"
MAP_BYTES = 1 << 36  # Address space, not memory: a row takes some 200 bytes.


class Journal:
    """For one process and one call at a time. `write` may run in another thread than the rest."""

    def __init__(self, directory: Path, store_id: str) -> None:
        """Open or create. *store_id*: of the cache directory, so that no journal is used for another.

        Raises UsageError, with what to do, when it can't be opened, is corrupt, is another
        cache's or is of another version. Nothing in it has changed then.
        """
        self.path = directory / "journal.lmdb"
        self._cache = directory
        self._store_id = store_id.encode()
        self._env: lmdb.Environment | None = None
        try:
            self._open()
        except CacheError as error:
            raise UsageError(f"--cache {directory}: {_mend(error)}") from error

    def close(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()

    def rows(self) -> dict[int, Pending]:
        """Return all rows, the earliest first. Raises CacheError when one can't be read."""
        with self._as_cache_errors():
            env = self._open()
            with env.begin() as txn, txn.cursor(db=self._pending) as cursor:
                return {int.from_bytes(key, "big"): decode_pending(packed) for key, packed in cursor}

    def write(self, changes: Mapping[int, Pending | None]) -> None:
        """Put the rows, remove those that are None; return when all of it is on the disk.

        Raises CacheError: then none of it is. The next call tries with a fresh environment.
        """
        try:
            with self._as_cache_errors(), self._open().begin(write=True, db=self._pending) as txn:
                for seq, row in changes.items():
                    if row is None:
                        txn.delete(seq.to_bytes(8, "big"))
                    else:
                        txn.put(seq.to_bytes(8, "big"), encode_pending(row))
        except CacheError:
            self.close()  # After a failed commit LMDB refuses everything else.
            raise

    def _open(self) -> lmdb.Environment:
        """Return the environment, opened if it is not. Raises CacheError, UsageError."""
        if self._env is not None:
            return self._env
        with self._as_cache_errors():
            is_new = not (self.path / "data.mdb").exists()
            self.path.mkdir(mode=0o700, exist_ok=True)
            env = lmdb.open(str(self.path), map_size=MAP_BYTES, max_dbs=2, readahead=False)
            try:
                _cover_pages(env, self.path)
                self._check_format(env)
                self._pending = env.open_db(b"pending")
                if is_new:
                    _sync_directory(self.path)
                    _sync_directory(self._cache)
            except BaseException:
                env.close()
                raise
        self._env = env
        return env

    def _check_format(self, env: lmdb.Environment) -> None:
        expected = {b"format": FORMAT, b"store": self._store_id}
        meta = env.open_db(b"meta")
        with env.begin(db=meta) as txn:
            found = {name: bytes(txn.get(name) or b"") for name in expected}
        if not any(found.values()):
            with env.begin(write=True, db=meta) as txn:
                for name, value in expected.items():
                    txn.put(name, value)
        elif found[b"format"] != FORMAT:
            raise UsageError(
                f"--cache {self._cache}: its journal is {found[b'format'][:60].decode(errors='replace')!r},"
                f" this version knows {FORMAT.decode()!r}; it holds what the lake has not got yet: mount"
                " with the version that wrote it, and unmount without --lazy"
            )
        elif found[b"store"] != self._store_id:
            raise UsageError(
                f"--cache {self._cache}: its journal belongs to another cache directory; put back the"
                " one that was there, or name another directory"
            )

    @contextlib.contextmanager
    def _as_cache_errors(self) -> Iterator[None]:
        try:
            yield
        except (lmdb.Error, msgspec.MsgspecError) as error:
            raise CacheError(f"{self.path}: {error}") from error
        except OSError as error:
            raise CacheError(f"{self.path}: {error.strerror}") from error


def _cover_pages(env: lmdb.Environment, path: Path) -> None:
    """Make the file as long as its pages. Raises CacheError, and leaves it as it is, where it was cut off."""
    missing_bytes = pages.missing_bytes(env, path)
    if missing_bytes == 0:
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".journal-") as name:
        copy = Path(name)
        shutil.copyfile(pages.data_file(path), pages.data_file(copy))
        pages.lengthen(copy, missing_bytes)
        try:
            with lmdb.open(str(copy), map_size=MAP_BYTES, max_dbs=3) as copied:
                pages.use_all(copied, ("meta", "pending"))
        except lmdb.Error as error:
            raise CacheError(
                f"{path}: corrupt: cut off, {missing_bytes} bytes are missing ({error})"
            ) from error
    pages.lengthen(path, missing_bytes)


def _mend(error: CacheError) -> str:
    return (
        f"the journal can't be used ({error}); it was left as it is: mend the disk, or run `sluice fsck`,"
        " or move journal.lmdb away, and the next mount puts the files of staging/ into lost+found"
    )


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
