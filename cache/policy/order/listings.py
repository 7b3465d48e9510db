"""In which orders a training script may have listed a set's files before it shuffled them.

Files are told by number: their place in the set's own listing, which goes directory by directory
with the names of each in byte order. So do ImageFolder and, here, os.walk within a directory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOWHERE = 2**32 - 1  # The place of a file that is not in a listing.
SUFFIXES_MAX = 3
_DIGITS = re.compile(rb"\d+")


@dataclass(frozen=True, slots=True, eq=False)
class Listing:
    """*files*: the file at each place. *place_of*: each file's place, or NOWHERE."""

    name: str
    files: NDArray[np.uint32]
    place_of: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.files)


def make_listing(name: str, files: NDArray[np.uint32], files_all: int) -> Listing:
    place_of = np.full(files_all, NOWHERE, np.uint32)
    place_of[files] = np.arange(len(files), dtype=np.uint32)
    return Listing(name, files, place_of)


def listings(
    count: int, get_paths: Callable[[], Sequence[bytes]], opened: Collection[int]
) -> Iterator[Listing]:
    """Yield the listings of *count* files, likeliest first; some may be equal.

    *get_paths* returns the files' paths below the set's directory; the first listing needs none.
    *opened*: files that were read. Those with other suffixes (labels beside images) may not have
    been listed, so listings of each opened suffix follow those of all files.
    """
    everything = np.arange(count, dtype=np.uint32)
    yield make_listing("names", everything, count)
    paths = get_paths()
    subsets = [("", everything), *_subsets(paths, opened)]
    for name, (key, may_differ) in _KEYS.items():
        if may_differ(paths):
            ordered = everything if key is None else _sorted_by(key, paths)
            for suffix, files in subsets:
                chosen = ordered if len(files) == count else ordered[np.isin(ordered, files)]
                yield make_listing(f"{name}{suffix}", chosen, count)


def unlike(listing: Listing, others: Collection[Listing]) -> bool:
    """Return whether no one of *others* has the same files in the same order."""
    return not any(np.array_equal(listing.files, other.files) for other in others)


def _subsets(paths: Sequence[bytes], opened: Collection[int]) -> Iterator[tuple[str, NDArray[np.uint32]]]:
    """Yield the files of each suffix that was opened, commonest first, where others are there too."""
    counted = Counter(_suffix(paths[file]) for file in opened)
    for suffix, _ in counted.most_common(SUFFIXES_MAX):
        files = [file for file, path in enumerate(paths) if path.endswith(suffix)]
        if len(files) < len(paths):
            yield f" of {suffix.decode(errors='replace') or 'all'}", np.array(files, np.uint32)


def _suffix(path: bytes) -> bytes:
    name = path.rpartition(b"/")[2]
    return name[name.rfind(b".") :].lower() if b"." in name else b""


def _sorted_by(key: Callable[[bytes], object], paths: Sequence[bytes]) -> NDArray[np.uint32]:
    keys = list(map(key, paths))
    return np.array(sorted(range(len(paths)), key=keys.__getitem__), np.uint32)  # type: ignore[arg-type]


def _by_path(path: bytes) -> bytes:
    """As sorted(glob(...)) does: "a-b/x" comes before "a/x"."""
    return path


def _by_walk(path: bytes) -> bytes:
    """As os.walk and glob do: the files of a directory before those of the directories in it."""
    directory, slash, name = path.rpartition(b"/")
    above = b"\1" + directory.replace(b"/", b"\0\1") + b"\0" if slash else b""
    return above + b"\0" + name


def _naturally(path: bytes) -> bytes:
    """With numbers by their value: 2.jpg before 10.jpg."""
    return _DIGITS.sub(lambda digits: b"%020d" % int(digits[0][:19]), path)


def _always(paths: Sequence[bytes]) -> bool:
    return True


def _has_files_beside_directories(paths: Sequence[bytes]) -> bool:
    directories = {path.rpartition(b"/")[0] for path in paths}
    return any(directory.rpartition(b"/")[0] in directories for directory in directories if directory)


def _has_names_of_several_lengths(paths: Sequence[bytes]) -> bool:
    """Return whether some directory's names differ in length: else their numbers do not either."""
    kinds = {(directory, len(name)) for directory, _, name in (path.rpartition(b"/") for path in paths)}
    return len(kinds) > len({directory for directory, _ in kinds})


_KEYS: dict[str, tuple[Callable[[bytes], bytes] | None, Callable[[Sequence[bytes]], bool]]] = {
    "names": (None, _always),
    "paths": (_by_path, _always),
    "walk": (_by_walk, _has_files_beside_directories),
    "natural": (_naturally, _has_names_of_several_lengths),
}
