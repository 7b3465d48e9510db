"""Listing a directory tree the way S3 lists keys: in byte order, page by page.

A page's token names the listing and the last key. The sorted names of the directories above
that key are kept between pages, so that a directory of a million names is scanned once for a
listing and not once for each of its thousand pages. A token whose names are gone works too.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import os
import secrets
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import quote_from_bytes, unquote_to_bytes

# Sorted names kept between pages, over all listings: about 100 bytes each. One listing is always kept.
_NAMES_MAX = 1_000_000
_LISTINGS_MAX = 16

_log = logging.getLogger(__name__)
_Identity = tuple[int, int]  # Device and inode number.


@dataclass(slots=True)
class _Listing:
    """The sorted names of the directories that the last page ended in, by key prefix."""

    names: dict[bytes, list[bytes]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(names) for names in self.names.values())


class Tree:
    """The files below *root* (a real path) as keys in bytes. *hidden* is a name in the root."""

    def __init__(self, root: bytes, hidden: bytes) -> None:
        self.root = root
        self.hidden = hidden
        self._mutex = threading.Lock()
        self._listings: OrderedDict[str, _Listing] = OrderedDict()

    def page(
        self, prefix: bytes, *, delimiter: bool, token: str | None, start_after: bytes, keys_max: int
    ) -> tuple[list[bytes], str | None]:
        """Return up to *keys_max* keys after *start_after* or *token*, and the next page's token.

        With *delimiter*, directories are returned as keys that end in "/". Raises OSError when
        the prefix's own directory can't be read; unreadable ones further down are left out.
        """
        if token is None:
            name, after, resumed, listing = secrets.token_hex(8), start_after, False, _Listing()
        else:
            name, _, last = token.partition(":")
            after, resumed, listing = unquote_to_bytes(last), True, self._take(name)
        directory = prefix[: prefix.rfind(b"/") + 1]
        if b"\0" in prefix or any(part in (b"", b".", b"..") for part in directory.split(b"/")[:-1]):
            return [], None  # No file has such a key.
        walk = _Walk(self, prefix, listing, recursive=not delimiter)
        found = walk.keys(directory, after, resumed)
        keys = list(itertools.islice(found, keys_max))
        if next(found, None) is None:
            return keys, None
        self._keep(name, listing, above=keys[-1])
        return keys, f"{name}:{quote_from_bytes(keys[-1])}"

    def inside(self, path: bytes) -> bool:
        """Return whether a real path lies in the tree and is not hidden."""
        if path != self.root and not path.startswith(self.root.rstrip(b"/") + b"/"):
            return False
        relative = path[len(self.root) :].lstrip(b"/")
        return relative.split(b"/", 1)[0] != self.hidden

    def _take(self, name: str) -> _Listing:
        with self._mutex:
            return self._listings.pop(name, None) or _Listing()

    def _keep(self, name: str, listing: _Listing, above: bytes) -> None:
        for directory in [each for each in listing.names if not above.startswith(each)]:
            del listing.names[directory]
        with self._mutex:
            self._listings[name] = listing
            while len(self._listings) > 1 and (
                len(self._listings) > _LISTINGS_MAX
                or sum(len(each) for each in self._listings.values()) > _NAMES_MAX
            ):
                self._listings.popitem(last=False)


class _Walk:
    """One page's walk. Not shared between threads."""

    def __init__(self, tree: Tree, prefix: bytes, listing: _Listing, *, recursive: bool) -> None:
        self._root = tree.root
        self._hidden = tree.hidden
        self._inside = tree.inside
        self._prefix = prefix
        self._listing = listing
        self._recursive = recursive

    def keys(self, directory: bytes, after: bytes, resumed: bool) -> Iterator[bytes]:
        """Yield the keys that start with the prefix and come after *after*, in byte order.

        With *resumed*, a directory that was returned as *after* does not come again; without,
        it does, as it has keys that come after.
        """
        above = self._identities(directory)
        for key in self._below(directory, above, after):
            if self._recursive or not key.endswith(b"/"):
                if key > after:
                    yield key
            elif key > after or (after.startswith(key) and not (resumed and after == key)):
                yield key

    def _below(self, directory: bytes, above: frozenset[_Identity], after: bytes) -> Iterator[bytes]:
        """Yield the keys of *directory*, and with recursion of those below, from *after* on."""
        names = self._listing.names.get(directory)
        if names is None:
            names = self._listing.names[directory] = self._scan(directory, above)
        rest = after[len(directory) :] if after.startswith(directory) else b""
        if not rest and after > directory and not after.startswith(directory):
            return  # The whole directory comes before.
        first = bisect.bisect_left(names, rest.split(b"/", 1)[0])
        for name in itertools.islice(names, first, None):
            key = directory + name
            if self._recursive and name.endswith(b"/"):
                yield from self._subdirectory(key, above, after)
            else:
                yield key
        if self._recursive:
            self._listing.names.pop(directory, None)

    def _subdirectory(self, directory: bytes, above: frozenset[_Identity], after: bytes) -> Iterator[bytes]:
        if directory < after and not after.startswith(directory):
            return
        try:
            status = os.stat(os.path.join(self._root, directory))
            yield from self._below(directory, above | {(status.st_dev, status.st_ino)}, after)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):  # Gone since it was scanned.
                _log.warning("left out of the listing: %s: %s", os.fsdecode(directory), error.strerror)

    def _scan(self, directory: bytes, above: frozenset[_Identity]) -> list[bytes]:
        """Return the sorted names of files, and of directories with "/" after them."""
        path = os.path.join(self._root, directory)
        if not self._inside(os.path.realpath(path)):
            return []
        names: list[bytes] = []
        stem = self._prefix[len(directory) :]  # Empty below the prefix's own directory.
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(stem) and (directory or entry.name != self._hidden):
                    ending = self._ending(entry, above)
                    if ending is not None:
                        names.append(entry.name + ending)
        names.sort()
        return names

    def _ending(self, entry: os.DirEntry[bytes], above: frozenset[_Identity]) -> bytes | None:
        """Return "" for a file, "/" for a directory, None for what no key can show."""
        if entry.is_symlink():
            return self._link_ending(entry, above)
        if entry.is_file(follow_symlinks=False):
            return b""
        return b"/" if entry.is_dir(follow_symlinks=False) else None

    def _link_ending(self, entry: os.DirEntry[bytes], above: frozenset[_Identity]) -> bytes | None:
        if not self._inside(os.path.realpath(entry.path)):
            return None
        try:
            status = os.stat(entry.path)
        except OSError:  # Dangling, or a loop of links.
            return None
        if stat.S_ISREG(status.st_mode):
            return b""
        looping = (status.st_dev, status.st_ino) in above
        return b"/" if stat.S_ISDIR(status.st_mode) and not looping else None

    def _identities(self, directory: bytes) -> frozenset[_Identity]:
        """Return the directories from the root down to *directory*: a link to one would be a loop."""
        paths = [self._root]
        for name in directory.split(b"/")[:-1]:
            paths.append(os.path.join(paths[-1], name))
        states = [os.stat(path) for path in paths]
        return frozenset((state.st_dev, state.st_ino) for state in states)
