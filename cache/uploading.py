"""One Put: sent under its conditions, recognised where an answer was lost, and taken over as clean.

Before the first byte leaves, the row says under which key (`upload_key`): whatever becomes of this
process, the next one asks the lake for it. What was sent carries an id of ours: the staging file's
number, which no other content ever has, and the state that it was in.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from cache.checkpoints import CheckpointNotes
from cache.committer import Committer
from cache.contents import Content, Stale, Summed, opened
from cache.errors import (
    FileTooLarge,
    LakeError,
    LakeUnavailable,
    ObjectChanged,
    ObjectExists,
    ObjectMissing,
)
from cache.exchange import Land
from cache.index_writer import IndexWriter
from cache.journaling import JournalKeeper
from cache.lake_io import LakeIO
from cache.metadata import SentId, checksum_of, metadata_of, with_id
from cache.model import OBJECT_BYTES_MAX, ObjectInfo, ObjectVersion
from cache.opens import Mode, OpenState, OpenTable
from cache.pending import CONFLICT, FAILED, SEALED, PendingTable, Put, Restate, unsent, upload_mark
from cache.policy.writeback import SINGLE_PUT_BYTES_MAX, part_bytes
from cache.records import Node
from cache.residency import Residency
from cache.sending import Sender, Upload
from cache.staging import StagingFiles, as_written, is_open_for_writing

log = logging.getLogger(__name__)

_REBASES_MAX = 3  # Times that an earlier state of the same file is found in the lake and replaced.
replace = msgspec.structs.replace


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the lake has acknowledged: the content of *inode*, whatever it is called by now."""

    inode: int
    key: bytes
    etag: str
    size_bytes: int
    checksum: str
    stored_at_s: float


NoteUpload = Callable[[int, bytes, str], None]


class Puts:
    """Carries out Put rows. *on_receipt* is told of each object stored.

    *note_upload* is told of each row's unfinished multipart upload (see `Plans`): it is ended with the row.
    """

    def __init__(
        self,
        lake: LakeIO,
        sender: Sender,
        committer: Committer,
        table: PendingTable,
        staging: StagingFiles,
        residency: Residency,
        opens: OpenTable | None,
        keeper: JournalKeeper,
        on_receipt: Callable[[Receipt], None],
        cache_id: str,
        checkpoints: CheckpointNotes,
        note_upload: NoteUpload,
    ) -> None:
        self._lake = lake
        self._sender = sender
        self._committer = committer
        self._table = table
        self._staging = staging
        self._residency = residency
        self._opens = opens
        self._keeper = keeper
        self._on_receipt = on_receipt
        self._cache_id = cache_id
        self._checkpoints = checkpoints
        self._note_upload = note_upload
        self.superseded: list[bytes] = []  # Versions that nobody can read any more.

    async def put(self, seq: int, on_sent: Callable[[int], None]) -> int:
        """Bring the row's content to the lake, or find that it is there already; return its ctime.

        Raises Stale when the row is to be looked at again, LakeError and CacheError. The row is as it
        was then, but for a conflict, which it says itself. *on_sent* is told of bytes as they arrive.
        """
        row = self._row(seq)
        if not row.staged:
            content = self._link_content(row)
            await self._put_content(seq, row, content, on_sent)
            return content.ctime_ns
        with opened(self._staging.path(row.staged)) as fd:
            status = os.fstat(fd)
            content = Content(
                os.fsdecode(row.key),
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
                SentId(f"{self._cache_id}-{row.staged:x}", f"{status.st_ctime_ns:x}"),
                fd,
            )
            if content.size_bytes > OBJECT_BYTES_MAX:
                raise FileTooLarge(f"{content.key}: {content.size_bytes} bytes are too many for one object")
            await self._put_content(seq, row, content, on_sent)
            return content.ctime_ns

    def _row(self, seq: int) -> Put:
        row = self._table.rows.get(seq)
        if not isinstance(row, Put):
            raise Stale(str(seq))
        return row

    def _link_content(self, row: Put) -> Content:
        attributes = row.attributes
        source = SentId(f"{self._cache_id}-link-{row.inode:x}", f"{attributes.ctime_ns:x}")
        body = attributes.target
        return Content(os.fsdecode(row.key), len(body), row.mtime_ns, attributes.ctime_ns, source, None, body)

    async def _put_content(
        self, seq: int, row: Put, content: Content, on_sent: Callable[[int], None]
    ) -> None:
        summed = await self._sender.sum(content)
        if row.uploaded == upload_mark(row, content.ctime_ns):  # Only its writers kept it from being clean.
            version = ObjectVersion(content.key, row.base_etag, content.size_bytes)
            await self._take_over(seq, row, content, summed, ObjectInfo(version, content.mtime_ns))
            return
        earlier = await self._earlier(row, content) if row.upload_key else None
        if earlier is not None and self._is_this(earlier, content, summed):
            info = earlier
        else:
            if earlier is not None and self._is_ours(earlier, content):
                await self._note_base(seq, earlier.version.etag)
            info = await self._send(seq, content, summed, on_sent)
        self._on_receipt(self._receipt(row, content, summed, info))
        await self._take_over(seq, row, content, summed, info)

    async def _earlier(self, row: Put, content: Content) -> ObjectInfo | None:
        """Return what the lake has under the key that something was, or may have been, sent to before."""
        if row.upload_id and row.upload_ctime_ns == content.ctime_ns and row.upload_key == row.key:
            try:
                await self._lake.list_parts(content.key, row.upload_id)
                return None  # Its end was not asked for, or not carried out.
            except ObjectMissing:
                pass
        return await self._head(os.fsdecode(row.upload_key))

    async def _head(self, key: str) -> ObjectInfo | None:
        try:
            return await self._lake.head(key)
        except ObjectMissing:
            return None

    def _is_ours(self, info: ObjectInfo, content: Content) -> bool:
        """Return whether this is a state of the same file that we sent."""
        sent = SentId.parse(info.metadata)
        return sent is not None and sent.source == content.id.source

    def _is_this(self, info: ObjectInfo, content: Content, summed: Summed) -> bool:
        """Return whether this is what is to be sent: the same bytes, of the same state or at the same time.

        The state alone does not say it: a power loss may leave a file its times without its last bytes. And
        an index that was made anew gives a link another inode, so another source.
        """
        size_bytes, checksum = info.version.size_bytes, checksum_of(info.metadata)
        if (size_bytes, checksum) != (content.size_bytes, summed.text):
            return False
        if SentId.parse(info.metadata) == content.id:
            return True
        mtime = metadata_of(None, content.mtime_ns).get("mtime")
        is_ours = content.fd is None or self._is_ours(info, content)
        return is_ours and info.metadata.get("mtime") == mtime

    # Sending

    async def _send(
        self, seq: int, content: Content, summed: Summed, on_sent: Callable[[int], None]
    ) -> ObjectInfo:
        """Send it; where the lake refuses, see whether what is there is ours. Raises Stale at a conflict."""
        for _ in range(_REBASES_MAX):
            row = self._row(seq)
            try:
                return await self._send_once(seq, row, content, summed, on_sent)
            except (ObjectChanged, ObjectExists, ObjectMissing) as refused:
                present = await self._head(content.key)
                now = self._row(seq)
                if (now.key, now.base_etag) != (row.key, row.base_etag):
                    continue  # Since then it is known what is there.
                if present is not None and self._is_this(present, content, summed):
                    return present
                if isinstance(refused, ObjectMissing):
                    if not self._row(seq).upload_id:
                        raise
                    await self._forget_upload(seq, abort=False)  # The lake knows it no more: start anew.
                elif present is not None and self._is_ours(present, content):
                    await self._note_base(seq, present.version.etag)
                elif row.base_etag == (present.version.etag if present is not None else ""):
                    raise LakeUnavailable(f"{content.key}: refused, but it has not changed") from refused
                else:
                    await self._conflict(seq, content, refused)
        raise LakeUnavailable(f"{content.key}: refused again and again")

    async def _send_once(
        self, seq: int, row: Put, content: Content, summed: Summed, on_sent: Callable[[int], None]
    ) -> ObjectInfo:
        metadata = metadata_of(row.attributes, content.mtime_ns)
        metadata = with_id(metadata, content.id, summed.text)
        if row.upload_id and (row.upload_ctime_ns != content.ctime_ns or row.upload_key != row.key):
            await self._forget_upload(seq, abort=True)
            row = self._row(seq)
        if row.key != os.fsencode(content.key):
            raise Stale(content.key)
        if content.size_bytes > SINGLE_PUT_BYTES_MAX:
            size_bytes = row.part_bytes or part_bytes(content.size_bytes, self._lake.lake.part_bytes_min)
            upload = Upload(size_bytes, partial(self._note_sending, seq, content, size_bytes), row.upload_id)
            info = await self._sender.put_parts(content, summed, metadata, row.base_etag, upload, on_sent)
            self._note_upload(seq, b"", "")
            return info
        await self._note_sending(seq, content, 0, "")
        info = await self._sender.put(content, summed, metadata, row.base_etag)
        on_sent(content.size_bytes)
        return info

    async def _note_sending(self, seq: int, content: Content, size_bytes: int, upload_id: str) -> None:
        """Have the row say what the lake may have from now on. Raises Stale if it changed."""

        def change(w: IndexWriter) -> bool:
            row = self._table.rows.get(seq)
            if not isinstance(row, Put) or row.key != os.fsencode(content.key):
                return False
            noted = replace(
                row,
                upload_key=row.key,
                upload_id=upload_id,
                part_bytes=size_bytes,
                upload_ctime_ns=content.ctime_ns,
            )
            if noted != row:
                self._table.replace(w, seq, noted)
            # Should the row go before anybody looks at it, the upload is known all the same.
            self._note_upload(seq, row.key, upload_id)
            return True

        if not await self._committer.commit(change):
            if upload_id:
                await self._lake.abort_multipart(content.key, upload_id)
            raise Stale(content.key)

    async def _forget_upload(self, seq: int, *, abort: bool) -> None:
        row = self._row(seq)
        if abort:
            await self._lake.abort_multipart(os.fsdecode(row.upload_key), row.upload_id)
        await self._change(seq, upload_id="", part_bytes=0)

    async def _note_base(self, seq: int, etag: str) -> None:
        await self._change(seq, base_etag=etag)

    async def _change(self, seq: int, **changes: object) -> None:
        def change(w: IndexWriter) -> None:
            row = self._table.rows.get(seq)
            if isinstance(row, Put):
                self._table.replace(w, seq, replace(row, **changes))

        await self._committer.commit(change)

    async def _conflict(self, seq: int, content: Content, refused: LakeError) -> None:
        """Keep the bytes, and say why they are not sent. Raises Stale: the row needs no more of us."""
        row = self._row(seq)
        if row.upload_id:
            await self._lake.abort_multipart(os.fsdecode(row.upload_key), row.upload_id)

        def change(w: IndexWriter) -> bool:
            now = self._table.rows.get(seq)
            if not isinstance(now, Put) or now.key != os.fsencode(content.key):
                return False
            settled = unsent(replace(now, state=CONFLICT, error=str(refused)))
            self._table.running.end(seq)
            self._table.replace(w, seq, settled)
            return True

        if await self._committer.commit(change):
            log.error(
                "conflict: %s; the file written here is kept and not sent: `sluice queue` shows it,"
                " `sluice queue resolve` decides",
                refused,
            )
        raise Stale(content.key)

    # What the lake has now

    async def _take_over(
        self, seq: int, row: Put, content: Content, summed: Summed, info: ObjectInfo
    ) -> None:
        """Make the file clean if it is closed and unchanged, else note what the lake has of it."""
        commit = partial(self._commit_clean, seq, row, content, info)
        if not row.staged:
            clean = commit(None)
        elif content.size_bytes:
            path = self._staging.path(row.staged)
            clean = await self._residency.adopt_staged(info.version, path, summed.checksums, commit)
        else:
            clean = commit(None)
        if not clean:
            await self._note_uploaded(seq, row, content, info)
        else:
            self._checkpoints.stored(row.inode)

    def _commit_clean(
        self, seq: int, sent: Put, content: Content, info: ObjectInfo, land: Land | None
    ) -> bool:
        """Commit that the lake has it, if it still is what was sent; return whether. No await in here."""
        self._committer.flush()  # What waits may change the row; nothing of others happens from here on.
        row = self._table.rows.get(seq)
        if not isinstance(row, Put) or row.staged != sent.staged:
            return False
        if not row.staged:
            if row.attributes != sent.attributes:
                return False
            self._committer.commit_now(lambda w: self._make_clean(w, seq, sent, content, info))
            return True
        if self._opens is None:
            return False  # Nobody knows who has it open.
        with self._opens.held(row.inode) as held:
            if not self._may_become_clean(row, held.state, content):
                return False
            put_rows = land() if land is not None else None
            self._committer.commit_now(lambda w: self._make_clean(w, seq, sent, content, info, put_rows))
        self._keeper.discard(row.staged)
        return True

    def _may_become_clean(self, row: Put, state: OpenState, content: Content) -> bool:
        """Return whether nobody can write to the staging file any more, and nobody did."""
        assert self._opens is not None and content.fd is not None
        if state.may_be_written or state.mode is Mode.PASSTHROUGH:
            return False  # Who opens it next gets the same file from the kernel, for writing too.
        if self._opens.may_be_mapped(row.inode):
            self._staging.release(row.staged)
            if is_open_for_writing(content.fd):
                return False
        return self._is_unchanged(content)

    def _is_unchanged(self, content: Content) -> bool:
        try:
            content.check()
        except Stale:
            return False
        return True

    def _make_clean(
        self,
        w: IndexWriter,
        seq: int,
        sent: Put,
        content: Content,
        info: ObjectInfo,
        put_rows: Callable[[IndexWriter], None] | None = None,
    ) -> None:
        row = self._table.rows[seq]
        assert isinstance(row, Put)
        node = w.node(row.inode)
        own = node.attributes if node is not None else None
        if row.staged:  # It may have been closed just now, and not be sealed yet.
            status = self._staging.stat(row.staged)
            row = replace(row, attributes=as_written(row.attributes, status))
            own = own and as_written(own, status)
            # As it was shown; the link that made a cached file of it has changed that of the staging file.
            own = own and replace(own, ctime_ns=max(own.ctime_ns, content.ctime_ns))
        key, etag, size_bytes = os.fsencode(content.key), info.version.etag, info.version.size_bytes
        self._table.running.end(seq)
        if node is not None:
            vid = info.version.id
            clean = replace(
                node,
                size_bytes=size_bytes,
                mtime_ns=content.mtime_ns,
                etag=etag,
                vid=vid,
                seen_at_s=time.time(),
                staged=0,
                attributes=own,
            )
            put_origin(w, row.inode, clean, key)
            if node.vid and node.vid != vid:
                self.superseded.append(node.vid)
        self._table.remove(w, seq)
        if row.attributes != sent.attributes or not _is_stated(info, sent, content):
            self._table.add(w, Restate(row.path, row.inode, row.kind, row.attributes, content.mtime_ns))
        if put_rows is not None:
            put_rows(w)

    async def _note_uploaded(self, seq: int, sent: Put, content: Content, info: ObjectInfo) -> None:
        """The lake has a state of the file, and the row stays: it is open, or was written to since."""

        def change(w: IndexWriter) -> None:
            row = self._table.rows.get(seq)
            self._table.running.end(seq)
            if not isinstance(row, Put):
                return  # Who took it away added what becomes of the object: a Delete or a Move.
            row = replace(row, state=SEALED if row.state == FAILED else row.state, error="")
            noted = unsent(replace(row, base_etag=info.version.etag, uploaded=b""))
            if row.attributes == sent.attributes and row.staged == sent.staged:
                noted = replace(noted, uploaded=upload_mark(noted, content.ctime_ns))
            self._table.replace(w, seq, noted)

        await self._committer.commit(change)

    def _receipt(self, row: Put, content: Content, summed: Summed, info: ObjectInfo) -> Receipt:
        version = info.version
        key = os.fsencode(content.key)
        return Receipt(row.inode, key, version.etag, version.size_bytes, summed.text, time.time())


def _is_stated(info: ObjectInfo, sent: Put, content: Content) -> bool:
    """Return whether an object found in the lake says of itself what the row does."""
    stated = metadata_of(sent.attributes, content.mtime_ns)
    return not info.metadata or all(info.metadata.get(name) == value for name, value in stated.items())


def put_origin(w: IndexWriter, inode: int, node: Node, key: bytes) -> None:
    """Store the node so that the lake has it under *key*: with an origin only where its place differs."""
    w.put_node(inode, replace(node, origin=b""))
    if w.key_of(inode) != key.rstrip(b"/"):
        w.put_node(inode, replace(node, origin=key))
