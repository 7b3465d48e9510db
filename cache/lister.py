"""Keeps the namespace in step with the lake: listings, single keys, and listing ahead of walks."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from cache.committer import Committer
from cache.errors import LakeUnavailable, ObjectMissing, SluiceError
from cache.index import Index
from cache.index_writer import IndexWriter
from cache.lake.base import ListPage
from cache.lake_io import LakeIO
from cache.listing import Changed, ListingInProgress, node_of, put_directory, put_file
from cache.model import CONTROL_NAME, ROOT_INODE, SYMLINK_SUFFIX, Inode, ObjectInfo
from cache.overlay import Overlay, is_kept, prefix_of
from cache.pending import KeyWatch, PendingTable
from cache.policy.freshness import Freshness
from cache.policy.names import why_no_name
from cache.records import Node
from cache.restating import know_again

log = logging.getLogger(__name__)

_AHEAD_DIRECTORIES = 64  # Listed ahead of a walk at most, and so many at once:
_AHEAD_AT_ONCE = 12
_WALK_MEMORY_S = 30.0  # A child listed within so long of its parent's listing makes a walk.
_WALK_DIRECTORIES_MAX = 4096  # So many directories are remembered for it.
_SMALL_PAGES = 2  # A directory of so few pages is listed again rather than asked for single keys.
_PAUSE_S = 10.0  # So long a listing waits after its first page for somebody who wants the rest.
_GHOST_PAGES_MAX = 8  # Of more keys that are all yet to go, nobody looks for one that stays.
_LOOKUPS_BEFORE_LISTING = 8  # Single keys asked for in a directory whose first page was not all.


@dataclass(eq=False)
class ListFlight:
    """The one listing of a directory. *wanted_whole*: somebody needs more than the first page.

    *finished* says that the index holds all of it; a flight that nobody wanted whole ends without.
    """

    first_page: trio.Event = field(default_factory=trio.Event)
    done: trio.Event = field(default_factory=trio.Event)
    wanted_whole: trio.Event = field(default_factory=trio.Event)
    error: SluiceError | None = None
    finished: bool = False


@dataclass
class FoundKey:
    """What the lake has under *key*: an object (a symlink's has another key), or keys below it."""

    key: str
    info: ObjectInfo | None = None
    is_directory: bool = False


class Lister:
    def __init__(
        self,
        nursery: trio.Nursery,
        lake: LakeIO,
        index: Index,
        committer: Committer,
        freshness: Freshness,
        on_changed: trio.MemorySendChannel[Changed],
        pending: PendingTable | None = None,
    ) -> None:
        """*pending*: what the mount shows that the lake does not know yet; None on read-only mounts."""
        self._nursery = nursery
        self._lake = lake
        self._index = index
        self._committer = committer
        self._freshness = freshness
        self._on_changed = on_changed
        self._pending = pending or PendingTable()
        self._flights: dict[Inode, ListFlight] = {}
        self._key_lookups: Counter[Inode] = Counter()  # Since the directory was listed last.
        self._read_at_s: dict[Inode, float] = {}  # Directories that somebody read lately.
        self._ahead: set[Inode] = set()
        self._ahead_slots = trio.CapacityLimiter(_AHEAD_AT_ONCE)

    async def list_directory(self, inode: Inode) -> None:
        """Return when the index holds the directory's fresh listing. Raises LakeError.

        While the lake is away, the last listing counts. Whoever reads a directory soon after its
        parent walks the tree: the next siblings are then listed ahead.
        """
        self._note_walk(inode)
        is_known = self._index.directory(inode) is not None
        if is_known and self._answers_for_the_lake(inode):
            return
        try:
            await self._list_fresh(inode)
        except LakeUnavailable:
            if not is_known:
                raise

    def _answers_for_the_lake(self, inode: Inode) -> bool:
        """Return whether the index has to do for now, and keep asking the lake if so.

        Once a request has used its retries up, nobody else should wait as long for nothing.
        """
        if not self._lake.has_given_up or self._is_listed(inode):
            return False
        self._flight(inode)  # It ends when the lake is back, or gives up too; nobody waits for it.
        return True

    async def _list_fresh(self, inode: Inode) -> None:
        while not self._is_listed(inode):
            flight = self._flight(inode)
            flight.wanted_whole.set()
            await flight.done.wait()
            if flight.error is not None:
                raise flight.error
            if flight.finished:
                return  # Even if it took longer than the ttl.

    def relist_ahead(self, inode: Inode) -> None:
        """List again before the listing expires; nobody waits for it."""
        self._flight(inode).wanted_whole.set()

    async def lookup(self, parent: Inode, name: bytes) -> bool:
        """Make the index say what *name* is now; return whether there is such an entry.

        The control directory is none: the lake's entry of that name is hidden. While the lake is away,
        what it said last counts. Raises LakeError.
        """
        if parent == ROOT_INODE and name == CONTROL_NAME:
            return False
        known = self._index.child(parent, name)
        if known is not None and self._is_local(*known):
            return True
        is_known = known is not None or self._index.directory(parent) is not None
        if is_known and self._answers_for_the_lake(parent):
            return known is not None
        try:
            return await self._lookup_fresh(parent, name)
        except LakeUnavailable:
            if not is_known:
                raise
            return known is not None

    def knows(self, parent: Inode, name: bytes) -> bool:
        """Return whether `lookup` has nothing to ask the lake for."""
        is_control = parent == ROOT_INODE and name == CONTROL_NAME
        return not is_control and self._is_listed(parent)

    async def _lookup_fresh(self, parent: Inode, name: bytes) -> bool:
        """Ask for the whole directory where that is one request or so, else for the one key."""
        state = self._index.directory(parent)
        if self._is_listed(parent):
            return self._index.child(parent, name) is not None
        if parent in self._flights or state is None or state.pages <= _SMALL_PAGES:
            flight = self._flight(parent)
            if state is not None:
                flight.wanted_whole.set()
            await flight.first_page.wait()
            if flight.finished:
                return self._index.child(parent, name) is not None
            if flight.error is not None:
                raise flight.error
        self._key_lookups[parent] += 1
        if self._key_lookups[parent] > max(_LOOKUPS_BEFORE_LISTING, state.pages if state else 0):
            self._flight(parent).wanted_whole.set()
        return await self.refresh_entry(parent, name)

    async def refresh_entry(self, parent: Inode, name: bytes) -> bool:
        """Ask the lake what this one name is: an object, a prefix, a symlink's object, or nothing."""
        part = os.fsdecode(name)
        if why_no_name(part) is not None:
            return False
        known = self._index.child(parent, name)
        if known is not None and (await self._know_again(known[0]) or self._is_local(*known)):
            return True
        changed: Changed = []
        asked_at_s = time.time()
        with self._overlay(parent) as (overlay, prefix):
            found = await self._ask_for_key(os.fsdecode(prefix) + part)
            if found.is_directory and await self._is_ghost(parent, f"{found.key}/", overlay):
                found.is_directory = False

            def apply(w: IndexWriter) -> None:
                if overlay.settle(w) and not overlay.leaves_alone(name):
                    _put_found(w, parent, name, found, overlay, changed, asked_at_s)

            await self._committer.commit(apply)
        await self._tell(changed)
        return self._index.child(parent, name) is not None

    async def _know_again(self, inode: Inode) -> bool:
        return await know_again(self._lake, self._index, self._committer, self._pending, inode)

    async def _ask_for_key(self, key: str) -> FoundKey:
        """Return what the lake has under *key*. Raises LakeError."""
        found = FoundKey(key)

        async def head() -> None:
            found.info = await self._head(key)

        async def list_below() -> None:
            page = await self._lake.list_page(f"{key}/", None, keys_max=2)
            found.is_directory = bool(page.objects or page.prefixes)

        await _both(head, list_below)
        if found.info is None and not found.is_directory:
            found.info = await self._head(key + SYMLINK_SUFFIX)
        return found

    async def _head(self, key: str) -> ObjectInfo | None:
        try:
            return await self._lake.head(key)
        except ObjectMissing:
            return None

    def _is_local(self, inode: Inode, node: Node) -> bool:
        """Return whether the mount shows the entry whatever the lake says."""
        if node.staged or node.origin:
            return True
        path = self._index.path_of(inode)
        return self._pending.keeps(path) if node.is_directory else is_kept(self._pending, path)

    @contextmanager
    def _overlay(self, inode: Inode) -> Iterator[tuple[Overlay, bytes]]:
        """Yield what lies over a directory from now on, and the prefix of its keys."""
        prefix, path_prefix = prefix_of(self._index.key_of(inode)), prefix_of(self._index.path_of(inode))
        with self._pending.watch(prefix, path_prefix) as watch:
            yield Overlay(self._pending, watch, inode, prefix), prefix

    async def _without_ghosts(self, inode: Inode, page: ListPage, overlay: Overlay) -> ListPage:
        """Return *page* without the directories of which the mount shows nothing. Raises LakeError."""
        shown = []
        for prefix in page.prefixes:
            if not await self._is_ghost(inode, prefix, overlay):
                shown.append(prefix)
        return ListPage(page.objects, shown, page.next_token)

    async def _is_ghost(self, parent: Inode, prefix: str, overlay: Overlay) -> bool:
        """Return whether *prefix*, one of the lake's below *parent*, is a directory that was removed or
        moved away, with nothing below it but keys that are yet to go. Raises LakeError.
        """
        name = os.fsencode(prefix[:-1].rpartition("/")[2])
        if self._index.child(parent, name) is not None or not overlay.may_hide_all_below(name):
            return False
        if self._lake.lake.has_directories and not overlay.hides(os.fsencode(prefix)):
            return False  # It is there by itself: see `leaves_alone` for what has changed since.
        token: str | None = None
        for _ in range(_GHOST_PAGES_MAX):
            with self._pending.watch(os.fsencode(prefix)) as watch:
                page = await self._lake.list_page(prefix, token, delimiter=False)
                if not overlay.settle(self._index):
                    return False  # The listing is stale: it is thrown away.
                keys = [os.fsencode(info.version.key) for info in page.objects]
                if any(self._is_shown(key, overlay, watch) for key in keys):
                    return False
            token = page.next_token
            if token is None:
                break
        return True

    def _is_shown(self, key: bytes, overlay: Overlay, watch: KeyWatch) -> bool:
        """*watch*: of what operations touched since *key* was listed: that may be gone."""
        return not watch.has_touched(key) and not overlay.hides(key)

    def _is_listed(self, inode: Inode) -> bool:
        state = self._index.directory(inode)
        return state is not None and self._freshness.is_fresh(state.listed_at_s, time.time())

    def _flight(self, inode: Inode) -> ListFlight:
        """Return the directory's listing under way, starting it if there is none. No await in here."""
        flight = self._flights.get(inode)
        if flight is None:
            flight = self._flights[inode] = ListFlight()
            self._nursery.start_soon(self._fly, inode, flight)
        return flight

    async def _fly(self, inode: Inode, flight: ListFlight) -> None:
        try:
            await self._list(inode, flight)
        except SluiceError as error:
            flight.error = error
        except Exception as error:  # A fault of ours fails this listing, not every mount's mover.
            log.exception("the listing of inode %d failed", inode)
            flight.error = SluiceError(f"{type(error).__name__}: {error}")
        except BaseException:
            flight.error = SluiceError("the mover is stopping")
            raise
        finally:
            del self._flights[inode]
            self._key_lookups.pop(inode, None)
            flight.done.set()
            flight.first_page.set()

    async def _list(self, inode: Inode, flight: ListFlight) -> None:
        """List the directory; anew if it was moved meanwhile: its keys are others then."""
        is_listed = False
        while not is_listed:
            with self._overlay(inode) as (overlay, prefix):
                listing = ListingInProgress(inode, os.fsdecode(prefix), overlay, time.time())
                await self._list_below(os.fsdecode(prefix), listing, overlay, flight)
            await self._tell(listing.changed)
            is_listed = not listing.is_stale

    async def _list_below(
        self, prefix: str, listing: ListingInProgress, overlay: Overlay, flight: ListFlight
    ) -> None:
        page = await self._without_ghosts(listing.inode, await self._lake.list_page(prefix, None), overlay)
        while page.next_token is not None:
            following = await self._apply_and_get_next(listing, page, prefix, flight)
            if following is None or listing.is_stale:
                return
            page = await self._without_ghosts(listing.inode, following, overlay)
        await self._committer.commit(lambda w: listing.apply(w, page))
        await self._committer.commit(lambda w: listing.finish(w, time.time()))
        flight.finished = not listing.is_stale

    async def _apply_and_get_next(
        self, listing: ListingInProgress, page: ListPage, prefix: str, flight: ListFlight
    ) -> ListPage | None:
        """Commit *page* while the next one is under way; return the next, None if nobody wants it."""
        following: ListPage | None = None

        async def get_next() -> None:
            nonlocal following
            following = await self._lake.list_page(prefix, page.next_token)

        async def apply() -> None:
            await self._committer.commit(lambda w: listing.apply(w, page))
            flight.first_page.set()

        if not flight.wanted_whole.is_set():
            # Only single keys were asked for so far: they may never need the rest.
            await apply()
            with trio.move_on_after(_PAUSE_S):
                await flight.wanted_whole.wait()
            if not flight.wanted_whole.is_set():
                return None
            await get_next()
        else:
            await _both(get_next, apply)
        return following

    async def _tell(self, changed: Changed) -> None:
        if changed:
            await self._on_changed.send(changed)

    # Walks

    def _note_walk(self, inode: Inode) -> None:
        now_s = time.monotonic()
        self._remember_reading(inode, now_s)
        node = self._index.node(inode)
        if node is None or inode == ROOT_INODE:
            return
        if now_s - self._read_at_s.get(Inode(node.parent), -1e9) > _WALK_MEMORY_S:
            return
        self._remember_reading(Inode(node.parent), now_s)  # The walk goes on: keep it in memory.
        self._list_siblings_ahead(Inode(node.parent), node.name)

    def _remember_reading(self, inode: Inode, now_s: float) -> None:
        self._read_at_s.pop(inode, None)
        self._read_at_s[inode] = now_s
        if len(self._read_at_s) > _WALK_DIRECTORIES_MAX:
            del self._read_at_s[next(iter(self._read_at_s))]

    def _list_siblings_ahead(self, parent: Inode, after: bytes) -> None:
        if len(self._ahead) > _AHEAD_DIRECTORIES // 2:
            return
        for inode, node in self._index.children(parent, after, _AHEAD_DIRECTORIES):
            if node.is_directory and inode not in self._ahead and not self._is_listed(inode):
                self._ahead.add(inode)
                self._nursery.start_soon(self._list_ahead, inode)

    async def _list_ahead(self, inode: Inode) -> None:
        try:
            async with self._ahead_slots:
                if not self._is_listed(inode):
                    flight = self._flight(inode)
                    flight.wanted_whole.set()
                    await flight.done.wait()  # An error shows to whoever asks for it.
        finally:
            self._ahead.discard(inode)


def _put_found(
    w: IndexWriter,
    parent: Inode,
    name: bytes,
    found: FoundKey,
    overlay: Overlay,
    changed: Changed,
    asked_at_s: float,
) -> None:
    """Make *name* show what was found, as far as the mount does not know better."""
    known = w.child(parent, name)
    if known is not None and overlay.is_local(known[1]):
        return
    info = found.info
    if found.is_directory and not overlay.hides(os.fsencode(found.key) + b"/"):
        put_directory(w, parent, name, changed, asked_at_s)
    elif info is not None and not overlay.hides(os.fsencode(info.version.key)):
        put_file(w, overlay.dressed(node_of(parent, name, info, asked_at_s)), changed)
    elif known is not None and not overlay.may_come_later(name):
        w.detach(parent, name)
        changed.append((parent, name))


async def _both(one: Callable[[], Awaitable[None]], other: Callable[[], Awaitable[None]]) -> None:
    """Run both at once. Raises the first SluiceError of the two, not a group of them."""
    error: SluiceError | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(other)
    except* SluiceError as group:
        error = _first(group)  # Raised in here it would be wrapped in a group again.
    if error is not None:
        raise error


def _first(group: BaseExceptionGroup[BaseException]) -> SluiceError:
    """Return the first of the group's errors, nested groups included."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SluiceError)
    return error
