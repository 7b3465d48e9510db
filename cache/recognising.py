"""How sample sets come to be followed: from uses of files that belong to none, and from what is told.

`Recogniser` proposes directories, `Survey` says what is below them. Sets that have grown are surveyed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from cache.errors import SluiceError
from cache.followed import Followed, FollowedSets
from cache.index import Index
from cache.model import SMALL_OBJECT_BYTES_MAX, Inode
from cache.policy.recognise import Candidate, Directory, Recogniser, Use
from cache.policy.records import Access
from cache.policy.sets import MakeUpcoming, Members, SampleSet
from cache.survey import Survey

_MEMBERS_MIN = 32  # Fewer are read before reading ahead could begin;
_LARGE_MEMBERS_MIN = 3  # of large ones, what follows the first two can be fetched.
_DIRECTORIES_MAX = 20_000  # Kept in memory, to know a file's set without asking the index.
_STRANGE_ACCESSES_MAX = 1024
_STRANGERS_MAX = 8  # Used files that are no members, before a set is surveyed again,
_SURVEY_EVERY_S = 10.0  # but no more often than this.

# A set that is followed from now on, and the uses that showed it, the oldest first, with their accesses.
OnFound = Callable[[Followed, Sequence[tuple[Use, Access | None]]], None]
OnGrown = Callable[[Followed, SampleSet], None]


class Recognition:
    """For the mover's trio thread. *sets*: runs its tasks."""

    def __init__(
        self,
        sets: FollowedSets,
        index: Index,
        survey: Survey,
        make_upcoming: MakeUpcoming,
        prepare: Callable[[], Awaitable[None]],
        clock: Callable[[], float],
        on_found: OnFound,
        on_grown: OnGrown,
    ) -> None:
        """*prepare*: is awaited before each call of *make_upcoming*, and begun at the first use of a file.

        *on_grown* gets a set and what takes the place of its `samples`.
        """
        self._sets = sets
        self._index = index
        self._survey = survey
        self._make_upcoming = make_upcoming
        self._prepare = prepare
        self._clock = clock
        self._on_found = on_found
        self._on_grown = on_grown
        self._is_prepared = False  # Or on the way.
        self._recogniser = Recogniser()
        self._large_recogniser = Recogniser(large=True)
        self._directories: dict[int, Directory] = {}
        self._access: OrderedDict[Inode, Access] = OrderedDict()  # Of large files that belong to no set yet.
        self._surveying: set[Candidate] = set()

    def used(self, inode: Inode, now_s: float, access: Access | None) -> None:
        """Note the use of a file that is a member of no set."""
        if access is not None:
            self._access[inode] = access
            if len(self._access) > _STRANGE_ACCESSES_MAX:
                self._access.popitem(last=False)
        node = self._index.node(inode)
        if node is None or not node.vid or not node.size_bytes:
            return
        if not self._is_prepared:
            self._is_prepared = True
            self._sets.start(lambda _: self._prepare(), None)
        directory, large = self._directory(node.parent), node.size_bytes > SMALL_OBJECT_BYTES_MAX
        grown = self._sets.at(directory, large=large)
        if grown is not None:
            self._note_growth(grown, now_s)
            return
        candidate = self._recogniser_of(large).used(inode, directory, now_s)
        if candidate is not None and candidate not in self._surveying:
            self._surveying.add(candidate)
            self._sets.start(self._follow, candidate)

    def ended(self, inode: Inode) -> None:
        """A reader has come to the end of a large file: as a member of a set it is in nobody's hands."""
        if self._access.get(inode) is not Access.RANDOM:
            self._access.pop(inode, None)

    def announced(self, directory: Inode) -> None:
        """Somebody told in which order the files below *directory* are about to be read."""
        candidate = Candidate(directory, deep=True, large=False)
        if candidate not in self._surveying:
            self._surveying.add(candidate)
            self._sets.start(self._follow_announced, candidate)

    def _recogniser_of(self, large: bool) -> Recogniser:
        return self._large_recogniser if large else self._recogniser

    def _directory(self, inode: int) -> Directory:
        known = self._directories.get(inode)
        if known is None:
            if len(self._directories) >= _DIRECTORIES_MAX:
                self._directories.clear()
            node, state = self._index.node(inode), self._index.directory(inode)
            is_root = node is None or node.parent == inode
            parent = None if node is None or is_root else self._directory(node.parent)
            known = Directory(inode, state.entries if state is not None else 0, parent)
            if state is not None:  # Else it is being listed for the first time.
                self._directories[inode] = known
        return known

    async def _follow(self, candidate: Candidate) -> None:
        """Look what is below the candidate, and follow it as a set if it is one."""
        try:
            members = await self._survey.members(candidate)
            await self._prepare()
        except SluiceError:
            members = None  # The lake is away: it is proposed again later.
        finally:
            self._surveying.discard(candidate)
        recogniser = self._recogniser_of(candidate.large)
        if members is None or len(members) < (_LARGE_MEMBERS_MIN if candidate.large else _MEMBERS_MIN):
            recogniser.refuse(candidate, self._clock())
            return
        followed = self._followed(candidate, members)
        uses = [
            (use, self._access.pop(Inode(use.inode), None))
            for use in recogniser.claim(candidate)
            if members.place(use.inode) is not None
        ]
        self._on_found(followed, uses)

    async def _follow_announced(self, candidate: Candidate) -> None:
        try:
            members = await self._survey.members(candidate)
            await self._prepare()
        finally:
            self._surveying.discard(candidate)
        if members is None or len(members) < _MEMBERS_MIN or self._sets.have_some_of(members):
            return
        followed = self._followed(candidate, members)
        followed.samples.announce(self._clock())
        self._on_found(followed, ())

    def _followed(self, candidate: Candidate, members: Members) -> Followed:
        deep, large = candidate.deep, candidate.large
        samples = SampleSet(candidate.root, members, self._make_upcoming(members), deep=deep, large=large)
        return Followed(samples, surveyed_at_s=self._clock())

    # Growth

    def _note_growth(self, followed: Followed, now_s: float) -> None:
        followed.samples.strangers += 1
        is_due = now_s - followed.surveyed_at_s >= _SURVEY_EVERY_S
        if followed.samples.strangers >= _STRANGERS_MAX and is_due and not followed.is_surveying:
            followed.is_surveying = True
            self._sets.start(self._follow_growth, followed)

    async def _follow_growth(self, followed: Followed) -> None:
        old = followed.samples
        try:
            members = await self._survey.members(Candidate(old.root, old.deep, old.large))
        finally:
            followed.is_surveying = False
            followed.surveyed_at_s = self._clock()
            old.strangers = 0
        if members is not None and members.inodes != old.members.inodes:
            successor = old.succeeded_by(members, self._make_upcoming(members), old.last_used_s)
            self._on_grown(followed, successor)
