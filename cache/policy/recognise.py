"""Finds sample sets: directories whose files are being used one after the other.

Uses that belong to no known set gather here. When enough of them lie in one directory, or in many
directories below one, it is proposed as a candidate; who has looked what is below it says whether a
set came of it. A tree of class directories is one set, two datasets that are read side by side are
two, and so are the training and the validation half of one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Directory:
    """*entries*: how many names it held when it was listed last; 0 if it never was."""

    inode: int
    entries: int
    parent: Directory | None

    def chain(self) -> Iterator[Directory]:
        """Yield this directory, its parent, and so on up to the root."""
        directory: Directory | None = self
        while directory is not None:
            yield directory
            directory = directory.parent


@dataclass(frozen=True, slots=True)
class Candidate:
    """Perhaps a set: the files of directory *root*, with those of its subtree if *deep*.

    *large*: those over SMALL_OBJECT_BYTES_MAX, else the others.
    """

    root: int
    deep: bool
    large: bool = False


@dataclass(frozen=True, slots=True)
class Use:
    inode: int
    directory: Directory
    at_s: float


EVIDENCE = 16  # Uses of different files before anything is proposed,
LARGE_EVIDENCE = 2  # and of large ones: there are few, and each takes its time.
_USES_MAX = 256
_CHECK_EVERY = 8
_FORGET_S = 300.0  # Uses longer apart than this have nothing to do with each other.
_REFUSED_S = 600.0
_REFUSED_MAX = 1024
_FILES = 0  # As the branch of a use: a file of the directory itself. No inode is 0.
_FEW_BRANCHES = 4


class Recogniser:
    """Holds the last _USES_MAX uses that belong to no set. *large*: all of them are of large files."""

    def __init__(self, *, large: bool = False) -> None:
        self._large = large
        self._evidence = LARGE_EVIDENCE if large else EVIDENCE
        self._check_every = 1 if large else _CHECK_EVERY
        self._uses: deque[Use] = deque()
        self._seen: set[int] = set()  # Invariant: the inodes of _uses.
        self._since_check = 0
        self._refused: OrderedDict[Candidate, float] = OrderedDict()  # Until when.

    def used(self, inode: int, directory: Directory, now_s: float) -> Candidate | None:
        """Note a use that belongs to no known set; return what looks like a set now."""
        if inode in self._seen:
            return None
        self._uses.append(Use(inode, directory, now_s))
        self._seen.add(inode)
        while len(self._uses) > _USES_MAX or self._uses[0].at_s < now_s - _FORGET_S:
            self._seen.remove(self._uses.popleft().inode)
        self._since_check += 1
        if self._since_check < self._check_every or len(self._uses) < self._evidence:
            return None
        self._since_check = 0
        return self._find(now_s)

    def refuse(self, candidate: Candidate, now_s: float) -> None:
        """*candidate* is no set: don't propose it again for a while."""
        self._refused[candidate] = now_s + _REFUSED_S
        if len(self._refused) > _REFUSED_MAX:
            self._refused.popitem(last=False)

    def claim(self, candidate: Candidate) -> list[Use]:
        """*candidate* is a set: take out its uses and return them, the oldest first."""
        claimed = [use for use in self._uses if _holds(candidate, use.directory)]
        gone = {use.inode for use in claimed}
        self._uses = deque(use for use in self._uses if use.inode not in gone)
        self._seen -= gone
        return claimed

    def _find(self, now_s: float) -> Candidate | None:
        below: dict[int, list[int]] = {}  # Directory -> in which branch of it each use was, in order.
        known: dict[int, Directory] = {}
        for use in self._uses:
            branch = _FILES
            for directory in use.directory.chain():
                below.setdefault(directory.inode, []).append(branch)
                known[directory.inode] = directory
                branch = directory.inode
        roots = [inode for inode, directory in known.items() if directory.parent is None]
        for root in roots:
            found = self._find_below(known[root], below, known, now_s)
            if found is not None:
                return found
        return None

    def _find_below(
        self, directory: Directory, below: dict[int, list[int]], known: dict[int, Directory], now_s: float
    ) -> Candidate | None:
        """Return the topmost candidate at or below *directory*."""
        branches = below[directory.inode]
        if len(branches) < self._evidence:
            return None
        whole = Candidate(directory.inode, deep=True, large=self._large)
        if self._is_open(whole, now_s) and _is_one_set(branches, directory.entries, below):
            return whole
        for branch, count in Counter(branches).most_common():
            if count < self._evidence:
                break
            if branch != _FILES:
                found = self._find_below(known[branch], below, known, now_s)
            else:
                shallow = Candidate(directory.inode, deep=False, large=self._large)
                found = shallow if self._is_open(shallow, now_s) else None
            if found is not None:
                return found
        return None

    def _is_open(self, candidate: Candidate, now_s: float) -> bool:
        return self._refused.get(candidate, now_s) <= now_s


def _holds(candidate: Candidate, directory: Directory) -> bool:
    if directory.inode == candidate.root:
        return True
    return candidate.deep and any(above.inode == candidate.root for above in directory.chain())


def _is_one_set(branches: list[int], entries: int, below: dict[int, list[int]]) -> bool:
    """Return whether uses in these *branches* of a directory, in order, are of one set."""
    counts = Counter(branches)
    switches = sum(a != b for a, b in pairwise(branches))
    if len(counts) >= _FEW_BRANCHES and switches <= 1.5 * (len(counts) - 1):
        return True  # One branch after the other: a scan.
    if not _covers(counts, len(branches), max(entries, len(counts)), below):
        return False
    # At random, a use is in another branch than the one before as often as two draws differ.
    differ = 1 - sum((count / len(branches)) ** 2 for count in counts.values())
    return switches >= differ * (len(branches) - 1) / 2


def _covers(counts: Counter[int], uses: int, entries: int, below: dict[int, list[int]]) -> bool:
    """Return whether so many branches of *entries* are used as a shuffle of all of them would use.

    Few branches might be datasets of their own that are read at the same time; so all of them must
    be in use, and hold the files themselves as classes do.
    """
    expected = entries * (1 - (1 - 1 / entries) ** uses)
    if len(counts) < max(2, min(entries, _FEW_BRANCHES), expected / 3):
        return False
    if len(counts) >= _FEW_BRANCHES:
        return True
    return all(branch == _FILES or not any(below[branch]) for branch in counts)
