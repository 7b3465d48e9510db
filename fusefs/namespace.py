"""Inodes and names as the kernel asks for them: from the index, and the mover where it is stale."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cache.client import MoverClient
from cache.index import Index
from cache.messages import List, Lookup, RelistAhead
from cache.model import CONTROL_NAME, KIND_FIFO, KIND_SOCKET, ROOT_INODE, Inode
from cache.passed_names import PassedNames, cookie_of, inode_of_cookie
from cache.policy.freshness import FOREVER_S, Freshness
from cache.records import DirectoryState, Node

# An inode is one object version: its attributes change only by requests, which the kernel knows of.
ATTRIBUTE_TTL_S = FOREVER_S
_RELIST_TOLD_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A name's inode and for how many seconds the kernel may believe it."""

    inode: Inode
    node: Node
    valid_s: float


class Namespace:
    def __init__(
        self,
        index: Index,
        mover: MoverClient,
        freshness: Freshness,
        passed_names: PassedNames | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """*passed_names*: None where no name is changed here."""
        self._index = index
        self._mover = mover
        self._freshness = freshness
        self._passed_names = passed_names
        self._clock = clock
        self._relist_told_s: dict[Inode, float] = {}

    def node(self, inode: Inode) -> Node | None:
        return self._index.node(inode)

    def own_entry(self, inode: Inode) -> Entry | None:
        """Return the entry of what a request has just made or changed: it is right as of now."""
        node, now_s = self._index.node(inode), self._clock()
        return None if node is None else Entry(inode, node, self._freshness.remaining_s(now_s, now_s))

    def is_detached(self, inode: Inode) -> bool:
        """Return whether no path leads to *inode* any more."""
        return self._index.is_detached(inode)

    def path_of(self, inode: Inode) -> bytes:
        return self._index.path_of(inode)

    async def lookup(self, parent: Inode, name: bytes) -> tuple[Entry | None, float]:
        """Return the entry, or None, and for how many seconds either is known. Raises SluiceError.

        Asks the lake only where neither a listing nor an earlier question is fresh.
        """
        if (found := self.lookup_nowait(parent, name)) is not None:
            return found
        answer = await self._mover.ask(Lookup(parent, name))
        _, entry = self._known(parent, name)
        if not answer.value:
            return None, self._freshness.remaining_s(self._clock(), self._clock())
        return entry, entry.valid_s if entry is not None else 0.0

    def lookup_nowait(self, parent: Inode, name: bytes) -> tuple[Entry | None, float] | None:
        """Return what `lookup` does, or None where the lake is to be asked."""
        state, entry = self._known(parent, name)
        if entry is not None and entry.valid_s > 0:
            self._keep_fresh(parent, state)
            return entry, entry.valid_s
        if state is not None and (valid_s := self._remaining(state)) > 0:
            return entry, valid_s
        return None

    def _known(self, parent: Inode, name: bytes) -> tuple[DirectoryState | None, Entry | None]:
        state = self._index.directory(parent)
        found = self._index.child(parent, name)
        if found is None:
            return state, None
        inode, node = found
        now_s = self._clock()
        seen_at_s = now_s if _is_local(node) else node.seen_at_s
        valid_s = self._freshness.remaining_s(seen_at_s, now_s)
        if state is not None:
            valid_s = max(valid_s, self._remaining(state))
        return state, Entry(inode, node, valid_s)

    def _remaining(self, state: DirectoryState) -> float:
        return self._freshness.remaining_s(state.listed_at_s, self._clock())

    def _keep_fresh(self, inode: Inode, state: DirectoryState | None) -> None:
        """Have a directory in use listed again before it expires, so that nobody waits for it."""
        now_s = self._clock()
        if state is None or not self._freshness.wants_relist_ahead(
            state.listed_at_s, state.duration_s, now_s
        ):
            return
        if now_s - self._relist_told_s.get(inode, 0.0) >= _RELIST_TOLD_EVERY_S:
            if len(self._relist_told_s) > 10_000:
                self._relist_told_s.clear()
            self._relist_told_s[inode] = now_s
            self._mover.tell(RelistAhead(inode))

    async def make_listed(self, inode: Inode) -> None:
        """Return when the index holds the directory's entries. Raises SluiceError."""
        state = self._index.directory(inode)
        if state is None or self._remaining(state) <= 0:
            await self._mover.ask(List(inode))

    def changed_at_ns(self, inode: Inode) -> int | None:
        """Return when the directory's entries changed last, None where they are not fresh."""
        state = self._index.directory(inode)
        return state.changed_at_ns if state is not None and self._remaining(state) > 0 else None

    def entries(self, inode: Inode, cookie: int, limit: int) -> list[Entry]:
        """Return up to *limit* entries behind *cookie*: 0, or `cookie_of` the last entry given.

        The order is that of the names, so entries that come, go or are renamed meanwhile disturb no
        reader, and any worker can go on where another stopped.
        """
        after = self._passed(inode, cookie) if cookie else b""
        state = self._index.directory(inode)
        valid_s = self._remaining(state) if state is not None else 0.0
        children = self._index.children(inode, after, limit)
        if inode == ROOT_INODE:  # Of an index from before there was a control directory.
            children = [found for found in children if found[1].name != CONTROL_NAME]
        return [Entry(child, node, valid_s) for child, node in children]

    def _passed(self, directory: Inode, cookie: int) -> bytes:
        """Return the name that *cookie* stands for; where that is forgotten, b"": from the beginning."""
        inode = inode_of_cookie(cookie)
        node = self._index.node(inode)
        if node is not None and cookie_of(inode, node.name) == cookie:
            return node.name
        passed = self._passed_names.name_of(cookie) if self._passed_names is not None else None
        if passed is not None:
            return passed
        return node.name if node is not None and node.parent == directory else b""


def _is_local(node: Node) -> bool:
    """Return whether the lake has no say in what the node is."""
    return node.staged != 0 or node.kind in (KIND_FIFO, KIND_SOCKET)
