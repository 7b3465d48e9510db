"""The workers' changes: asked of the lake first what they depend on, then applied, once each.

A change is answered when the index has it; the JournalKeeper writes it down soon after. fsync waits
for that (`sync`).
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec
import trio

from cache import messages
from cache.committer import Committer
from cache.copy_up import CopyUp
from cache.counters import Counters, WriteBudget
from cache.errors import MountReadOnly, SluiceError
from cache.index import Index
from cache.index_writer import IndexWriter
from cache.journaling import JournalKeeper
from cache.lister import Lister
from cache.messages import Answer
from cache.model import Inode
from cache.opens import OpenTable
from cache.pending import OPEN, SEALED, Orphan, PendingTable, Put
from cache.records import Attributes
from cache.renaming import replace
from cache.staging import StagingFiles, as_written
from cache.tree import TreeChange, attributes_of, xattrs_bytes

log = logging.getLogger(__name__)

_ANSWERS_MAX = 32768  # Between a change and its second coming there are fewer others.
_BUDGET_EVERY_S = 0.2
_LINGER_S = 5.0  # So long what was replaced can be opened by those who had just looked it up.
_ASK_AGAIN_S = 300.0  # So long AwaitRoom is answered after at the latest: far less than a worker waits.
_METADATA_BYTES = 1500  # S3 takes 2 KB of metadata, some of which says mode, owner, times and checksum.


class Sender(Protocol):
    """What is asked of the uploader here."""

    @property
    def dirty_bytes(self) -> int: ...

    def wake(self) -> None: ...

    def renamed(self, parent: int, name: bytes) -> None: ...

    async def wait_for(self, inode: int) -> None: ...


class Changes:
    """*owner*: uid and gid where nothing else was set. *read_only_because*: nothing may be changed."""

    def __init__(
        self,
        index: Index,
        committer: Committer,
        table: PendingTable,
        staging: StagingFiles,
        opens: OpenTable | None,
        keeper: JournalKeeper,
        lister: Lister,
        copy_up: CopyUp,
        sender: Sender,
        counters: Counters,
        budget: WriteBudget,
        dirty_bytes_max: int,
        owner: tuple[int, int],
        read_only_because: str = "",
    ) -> None:
        self._index = index
        self._committer = committer
        self._table = table
        self._staging = staging
        self._opens = opens
        self._keeper = keeper
        self._lister = lister
        self._copy_up = copy_up
        self._sender = sender
        self._counters = counters
        self._budget = budget
        self._read_only_because = read_only_because
        self._dirty_bytes_max = dirty_bytes_max
        self._owner = owner
        self._room = trio.Event()
        self._is_full = False
        # Inodes, the earliest first, and when, by time.monotonic(). An earlier mover's are in it.
        orphans = [row.inode for row in table.rows.values() if isinstance(row, Orphan)]
        self._replaced: dict[int, float] = dict.fromkeys(orphans if opens else (), time.monotonic())
        self._told_of_xattrs = False
        # Whose mode was set by a change that is not committed yet: what their staging files say is void.
        self._chmodded: set[int] = set()
        # Ids whose answers the index has, oldest first, and the number that the next one gets.
        self._answered = deque(index.answer_ids())
        self._next_answer = index.answers_given()

    # Changes

    async def apply(self, request: messages.Change, id: int, resends: int | None = None) -> Answer:
        """Carry out *request*, unless the change *id* happened before; return its answer.

        *resends*: of who asks, see `messages.Asked`; None: nobody replaces him.

        Raises NamespaceError, MountReadOnly, StagingFull, LakeError, CacheError.
        """
        self._check()
        known = self._index.answer(id) if id else None
        if known is not None:
            self._forget_mode(request)
            return _unpack(known)
        await self._look(request)
        changed: list[TreeChange] = []
        try:
            answer = await self._committer.commit(lambda w: self._once(w, request, id, resends, changed))
        except BaseException:
            self._undo(changed, request)
            raise
        self._follow_up(changed, request)
        return answer

    def apply_nowait(
        self,
        request: messages.Create | messages.SetAttributes,
        id: int,
        then: Callable[[Answer], None],
        resends: int | None = None,
    ) -> bool:
        """Do what `apply` does in the transaction that `Committer.flush_due` ends; *then* gets the answer.

        Returns False, with nothing done, where the lake is to be asked first, or nothing may be changed.
        """
        if self._keeper.failed or self._read_only_because:
            return False
        if isinstance(request, messages.Create) and not self._lister.knows(
            Inode(request.parent), request.name
        ):
            return False
        changed: list[TreeChange] = []
        answers: list[Answer] = []

        def end(error: SluiceError | None) -> None:
            if error is not None:
                self._undo(changed, request)
                then(messages.failure(0, error))
            else:
                self._follow_up(changed, request)
                then(answers[-1])

        self._committer.commit_due(
            lambda w: answers.append(self._once(w, request, id, resends, changed)), end
        )
        return True

    def _undo(self, changed: list[TreeChange], request: messages.Change) -> None:
        """The transaction failed, or the change was refused."""
        if isinstance(request, messages.SetAttributes):
            self._chmodded.discard(request.inode)
        for change in changed:
            for number in change.created:
                self._staging.remove(number)

    def _follow_up(self, changed: list[TreeChange], request: messages.Change) -> None:
        """The transaction is committed."""
        for change in changed:
            for number in change.discarded:
                self._keeper.discard(number)
            if self._opens is not None:
                self._replaced |= dict.fromkeys(change.replaced, time.monotonic())
                for inode in change.left:  # Once more: workers see only now that it is to have no grant.
                    self._opens.withdraw_grant(inode)
        self._forget_mode(request)
        if not isinstance(request, messages.Create):  # Its writer closes it first, or the next scan sees it.
            self._sender.wake()
        if isinstance(request, messages.Rename):
            self._sender.renamed(request.new_parent, request.new_name)
            self._sender.renamed(request.parent, request.name)  # Two may have changed places.
        if isinstance(request, messages.SetXattr):
            self._tell_of_xattrs(request.inode)

    def _forget_mode(self, request: messages.Change) -> None:
        """The node has the mode that was asked for: void is what its staging file says.

        Also where the change comes a second time: an earlier mover may have ended in between.
        """
        if not isinstance(request, messages.SetAttributes) or request.mode is None:
            return
        self._chmodded.discard(request.inode)
        node = self._index.node(request.inode)
        if node is not None and node.staged:
            self._staging.forget_mode(node.staged)

    def _check(self) -> None:
        self._keeper.check()
        if self._read_only_because:
            raise MountReadOnly(self._read_only_because)

    def _check_current(self, resends: int | None) -> None:
        """Raise SluiceError where the worker that asked has been replaced since.

        The kernel has sent his requests again. What is late of them might undo what was done after these
        were answered.
        """
        if resends is not None and self._opens is not None and resends != self._opens.resends:
            raise SluiceError("the worker that asked for it has been replaced")

    def _once(
        self,
        w: IndexWriter,
        request: messages.Change,
        id: int,
        resends: int | None,
        changed: list[TreeChange],
    ) -> Answer:
        self._check_current(resends)
        known = w.answer(id) if id else None
        if known is not None:  # It came twice at one time.
            return _unpack(known)
        change = TreeChange(w, self._table, self._staging, self._opens, self._owner, time.time_ns())
        changed.append(change)
        if isinstance(request, messages.SetAttributes) and request.mode is not None:
            self._chmodded.add(request.inode)
        answer = Answer(0, value=change.apply(request))
        if id:
            self._remember(w, id, answer)
        return answer

    def _remember(self, w: IndexWriter, id: int, answer: Answer) -> None:
        w.put_answer(id, self._next_answer, msgspec.msgpack.encode(answer))
        self._next_answer += 1
        self._answered.append(id)
        while len(self._answered) > _ANSWERS_MAX:
            w.remove_answer(self._answered.popleft())

    async def _look(self, request: messages.Change) -> None:
        """Have the index say what the lake has where that decides what happens."""
        match request:
            case messages.Rename():
                await self._know(request.parent, request.name)
                await self._know(request.new_parent, request.new_name)
                if not request.flags:
                    await self._know_entries(request.new_parent, request.new_name)
            case messages.RemoveDirectory(parent, name):
                await self._know(parent, name)
                await self._know_entries(parent, name)
            case messages.SetAttributes() | messages.SetXattr():
                pass
            case _:
                await self._know(request.parent, request.name)

    async def _know(self, parent: int, name: bytes) -> None:
        if self._is_directory(parent):
            await self._lister.lookup(Inode(parent), name)

    async def _know_entries(self, parent: int, name: bytes) -> None:
        found = self._index.child(parent, name)
        if found is not None and found[1].is_directory:
            await self._lister.list_directory(found[0])

    def _is_directory(self, inode: int) -> bool:
        node = self._index.node(inode)
        return node is not None and node.is_directory and not self._index.is_detached(inode)

    def _tell_of_xattrs(self, inode: int) -> None:
        node = self._index.node(inode)
        if self._told_of_xattrs or node is None:
            return
        if xattrs_bytes(attributes_of(node, self._owner).xattrs) > _METADATA_BYTES:
            self._told_of_xattrs = True
            log.warning(
                "%s: its extended attributes are more than an object's metadata has room for: they are"
                " kept in this cache directory only, as are those of other such files",
                os.fsdecode(self._index.path_of(inode)),
            )

    # Files that are written

    async def stage(self, inode: int, keep_bytes: int, resends: int | None = None) -> int:
        """Return the number of the file's staging file: see `messages.Stage`, and `apply` for *resends*.

        Raises LakeError, StagingFull, CacheError, NamespaceError, MountReadOnly.
        """
        self._check()
        self._check_current(resends)
        number = await self._copy_up.stage(inode, keep_bytes)
        rows = [row for _, row in self._table.of_inode(inode) if isinstance(row, Put)]
        if any(_reopened(row, keep_bytes) != row for row in rows):
            await self._committer.commit(lambda w: self._reopen(w, inode, keep_bytes, resends))
        if any(0 <= keep_bytes < row.synced_bytes for row in rows):
            # Before it is written to: else a power loss would leave new bytes at the old length.
            await self._keeper.settled()
        return number

    def _reopen(self, w: IndexWriter, inode: int, keep_bytes: int, resends: int | None) -> None:
        self._check_current(resends)
        for seq, row in self._table.of_inode(inode):
            if isinstance(row, Put) and (reopened := _reopened(row, keep_bytes)) != row:
                self._table.replace(w, seq, reopened)

    async def closed(self, inode: int) -> None:
        """The last handle for writing is gone, or the last at all: seal the file, or let it go."""
        node = self._index.node(inode)
        if node is None:
            return
        if self._index.is_detached(inode):
            if inode not in self._replaced:
                await self._let_go(inode)
        else:
            await self._committer.commit(lambda w: self._seal(w, inode), patient=True)
            self._sender.wake()

    def closed_nowait(self, inode: int) -> bool:
        """Have a file sealed with the next transaction; return False, with nothing done, if it has no name.

        Nobody waits for it, and who makes many files makes the next one now.
        """
        if self._index.is_detached(inode):
            return False
        self._committer.commit_then(lambda w: self._seal(w, inode), self._sealed, patient=True)
        return True

    def _sealed(self, error: SluiceError | None) -> None:
        if error is None:  # Else the uploader seals what is closed.
            self._sender.wake()

    def _seal(self, w: IndexWriter, inode: int) -> None:
        """Seal the file unless somebody may write to it.

        Who opens it later is counted before he asks for its staging file, and finds it sealed then.
        """
        if self._opens is None:
            self._seal_unwritten(w, inode)
            return
        with self._opens.held(inode) as held:
            if not held.state.may_be_written:
                self._seal_unwritten(w, inode)

    def _seal_unwritten(self, w: IndexWriter, inode: int) -> None:
        node = w.node(inode)
        for seq, row in self._table.of_inode(inode):
            if node is None or not isinstance(row, Put) or not row.staged:
                continue
            stat = self._staging.stat(row.staged)
            state = SEALED if row.state == OPEN else row.state
            changes = {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            sealed = replace(
                row, state=state, attributes=self._written(inode, row.attributes, stat), **changes
            )
            if sealed != row:
                own = self._written(inode, attributes_of(node, self._owner), stat)
                w.put_node(inode, replace(node, attributes=own, **changes))
                self._table.replace(w, seq, replace(sealed, sealed_at_s=time.time()))

    def _written(self, inode: int, own: Attributes, status: os.stat_result) -> Attributes:
        """Return the attributes of a file that was written, with what its staging file says of them."""
        return own if inode in self._chmodded else as_written(own, status)

    async def _let_go(self, *inodes: int) -> None:
        """Forget unlinked files that nobody has open any more."""
        numbers = await self._committer.commit(lambda w: [self._forget(w, inode) for inode in inodes])
        for number in filter(None, numbers):
            self._keeper.discard(number)
        self._sender.wake()  # Deletes wait for the last close.

    def _forget(self, w: IndexWriter, inode: int) -> int:
        """Forget an unlinked file unless it is open; return the staging file that is nobody's now, or 0."""
        node = w.node(inode)
        if node is None or (self._opens is not None and not self._opens.leave_unless_open(inode)):
            return 0
        for seq, row in self._table.of_inode(inode):
            if isinstance(row, Orphan):
                self._table.remove(w, seq)
        w.forget(inode)
        return node.staged

    async def forget_replaced(self, now_s: float) -> None:
        """Forget what was replaced a while before *now_s*, by time.monotonic()."""
        due = [inode for inode, since_s in self._replaced.items() if since_s <= now_s - _LINGER_S]
        for inode in due:
            del self._replaced[inode]
        try:
            if due:
                await self._let_go(*due)
        except SluiceError as error:
            log.warning("replaced files stay until the next mount: %s", error)

    async def sync(self, inode: int, length_bytes: int, remote: bool, resends: int | None = None) -> None:
        """Return when all that was changed so far is durable: see `messages.Sync`.

        Raises MountReadOnly; LakeError where the lake refuses the file.
        """
        if length_bytes >= 0 and any(isinstance(row, Put) for _, row in self._table.of_inode(inode)):
            await self._committer.commit(lambda w: self._note_synced(w, inode, length_bytes, resends))
        else:
            self._committer.flush()  # What waits there was changed before, too.
        await self._keeper.settled()
        if remote:
            await self._sender.wait_for(inode)

    def _note_synced(self, w: IndexWriter, inode: int, length_bytes: int, resends: int | None) -> None:
        self._check_current(resends)
        for seq, row in self._table.of_inode(inode):
            if not isinstance(row, Put):
                continue
            synced = replace(row, synced_bytes=length_bytes)
            if row.staged:
                status = self._staging.stat(row.staged)
                synced = replace(synced, attributes=self._written(inode, row.attributes, status))
            if synced != row:
                self._table.replace(w, seq, synced)

    # Dirty bytes

    async def await_room(self) -> None:
        """Return when there are fewer dirty bytes than there may be, or it is time to ask again.

        A worker takes a mover that is silent for too long for dead. Raises MountReadOnly.
        """
        with trio.move_on_after(_ASK_AGAIN_S):
            while self._sender.dirty_bytes >= self._dirty_bytes_max:
                if self._keeper.failed:
                    raise MountReadOnly(self._keeper.read_only_because)
                await self._room.wait()

    async def run(self) -> None:
        """Tell the workers how much they may write, and tidy up, for ever."""
        while True:
            self.set_budget()
            await self.forget_replaced(time.monotonic())
            await trio.sleep(_BUDGET_EVERY_S)

    def set_budget(self) -> None:
        left_bytes = self._dirty_bytes_max - self._sender.dirty_bytes
        written_bytes = self._counters.total("bytes_written")
        self._budget.allowed_until = max(0, written_bytes + left_bytes)
        if (left_bytes <= 0) != self._is_full:
            self._is_full = not self._is_full
            self._tell_of_fullness()
        room, self._room = self._room, trio.Event()
        room.set()  # Who finds no room waits for the next one.

    def _tell_of_fullness(self) -> None:
        if self._is_full:
            log.warning(
                "%d bytes wait for their upload, all that --dirty-max allows: writers wait",
                self._sender.dirty_bytes,
            )
        else:
            log.info("writers go on: fewer bytes than --dirty-max wait for their upload")


def _reopened(row: Put, keep_bytes: int) -> Put:
    """Return the row of a file that is about to be written to, once it is cut to *keep_bytes* (-1: it
    is not). Of what is cut off nothing is durable any more; an empty file says nothing of what follows.
    """
    if row.state == SEALED and row.staged:
        row = replace(row, state=OPEN, size_bytes=-1)
    if 0 <= keep_bytes < row.synced_bytes:
        row = replace(row, synced_bytes=keep_bytes or -1)
    return row


def _unpack(packed: bytes) -> Answer:
    return msgspec.msgpack.decode(packed, type=Answer)
