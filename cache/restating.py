"""Knowing an object again that we gave other metadata before a crash, when nobody noted its new ETag.

S3 changes metadata by a copy onto itself, which may be another version (of an object that was sent in
parts, or is encrypted). The copy says what it was made of (`metadata.restated`), and while nobody has noted
it, the journal has a Restate row of its node: so nothing else is ever taken for ours.
"""

from __future__ import annotations

import os

import msgspec

from cache.committer import Committer
from cache.errors import ObjectMissing
from cache.index import Index
from cache.index_writer import IndexWriter
from cache.lake_io import LakeIO
from cache.metadata import is_restated
from cache.model import ObjectVersion
from cache.pending import Move, PendingTable, Restate
from cache.records import Node

replace = msgspec.structs.replace


async def know_again(
    lake: LakeIO, index: Index, committer: Committer, table: PendingTable, inode: int
) -> bool:
    """Have the node name what our own copy made of its object; return whether it was such a one.

    Asks the lake only where there is a Restate row of the node. Raises LakeError.
    """
    node = index.node(inode)
    if node is None or not node.etag or node.staged or not _is_restating(table, inode):
        return False
    known = ObjectVersion(os.fsdecode(index.key_of(inode)), node.etag, node.size_bytes)
    try:
        found = await lake.head(known.key)
    except ObjectMissing:
        return False
    if not is_restated(found, known):
        return False

    def change(w: IndexWriter) -> bool:
        now = w.node(inode)
        if now is None or now.staged or now.etag != known.etag or os.fsdecode(w.key_of(inode)) != known.key:
            return False
        w.put_node(inode, renewed(w, table, inode, now, found.version.etag))
        return True

    return await committer.commit(change)


def _is_restating(table: PendingTable, inode: int) -> bool:
    return any(isinstance(row, Restate) for _, row in table.of_inode(inode))


def renewed(w: IndexWriter, table: PendingTable, inode: int, node: Node, etag: str) -> Node:
    """Return the node with another ETag; all moves that it has yet to make say so too, those of
    directories in between or not: where the index is lost, the node is made anew from them.
    """
    for seq, row in table.of_inode(inode):
        if isinstance(row, Move) and not row.copied and row.etag == node.etag:
            table.replace(w, seq, replace(row, etag=etag))
    return replace(node, etag=etag)
