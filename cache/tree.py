"""The namespace's changes, as POSIX has them: each within one transaction, checked before its first write."""

from __future__ import annotations

import os
import stat

from cache import messages
from cache.errors import (
    AttributeMissing,
    DirectoryNotEmpty,
    IsADirectory,
    NameExists,
    NameMissing,
    NameRefused,
    NotADirectory,
    NotSupported,
    ObjectMissing,
    StagingFull,
)
from cache.index_writer import IndexWriter
from cache.model import (
    KIND_DIRECTORY,
    KIND_FIFO,
    KIND_FILE,
    KIND_SOCKET,
    KIND_SYMLINK,
    ROOT_INODE,
    Inode,
)
from cache.opens import OpenTable
from cache.pending import (
    SEALED,
    Local,
    Mark,
    Orphan,
    PendingTable,
    Put,
    Restate,
    object_key,
)
from cache.policy.names import check_key
from cache.records import Attributes, DirectoryState, Node
from cache.renaming import EXCHANGE_NAME, RowChanges, replace
from cache.staging import StagingFiles

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # renameat2(2)
XATTR_CREATE, XATTR_REPLACE = 1, 2  # setxattr(2)
XATTRS_BYTES_MAX = 64 << 10  # Of one file, names and values: what ext4 and XFS have room for, or more.
_DEFAULT_MODES = {KIND_DIRECTORY: 0o755, KIND_SYMLINK: 0o777}


class TreeChange:
    """One change. *opens* None: nobody can tell what is open, so everything may be."""

    def __init__(
        self,
        w: IndexWriter,
        table: PendingTable,
        staging: StagingFiles,
        opens: OpenTable | None,
        owner: tuple[int, int],
        now_ns: int,
    ) -> None:
        self._w = w
        self._table = table
        self._rows = RowChanges(w, table)
        self._staging = staging
        self._opens = opens
        self._owner = owner
        self._now_ns = now_ns
        self.created: list[int] = []  # Staging files, to be removed should the transaction fail,
        self.discarded: list[int] = []  # or once it is committed.
        self.left: list[int] = []  # Inodes without a name now.
        self.replaced: list[int] = []  # Inodes that somebody may be about to open, by the name they had.

    def apply(self, request: messages.Change) -> int:
        """Carry out *request*; return the inode where it makes one. Raises NamespaceError, StagingFull."""
        match request:
            case messages.Create(parent, name, mode, uid, gid):
                return self._make_file(parent, name, mode, uid, gid, is_open=True)
            case messages.MakeDirectory(parent, name, mode, uid, gid):
                return self._make_directory(parent, name, mode, uid, gid)
            case messages.MakeSymlink(parent, name, target, uid, gid):
                return self._make_symlink(parent, name, target, uid, gid)
            case messages.MakeNode(parent, name, mode, rdev, uid, gid):
                return self._make_node(parent, name, mode, rdev, uid, gid)
            case messages.Unlink(parent, name):
                self._unlink(parent, name)
            case messages.RemoveDirectory(parent, name):
                self._remove_directory(parent, name)
            case messages.Rename():
                self._rename(request)
            case messages.SetAttributes():
                self._set_attributes(request)
            case messages.SetXattr():
                self._set_xattr(request)
        return 0

    # What is there

    def _directory(self, inode: int) -> Node:
        node = self._w.node(inode)
        if node is None or self._w.is_detached(inode):
            raise NameMissing("the directory has been removed")
        if not node.is_directory:
            raise NotADirectory(f"{os.fsdecode(node.name)} is no directory")
        return node

    def _child(self, parent: int, name: bytes) -> tuple[Inode, Node]:
        self._directory(parent)
        found = self._w.child(parent, name)
        if found is None:
            raise NameMissing(f"{os.fsdecode(name)}: no such name")
        return found

    def _check_free(self, parent: int, name: bytes, kind: int) -> bytes:
        """Return the path. Raises NamespaceError where nothing can be made there."""
        self._directory(parent)
        if self._w.child(parent, name) is not None:
            raise NameExists(f"{os.fsdecode(name)}: the name is taken")
        path = self._path(parent, name)
        check_key(path, kind)
        return path

    def _path(self, parent: int, name: bytes) -> bytes:
        above = self._w.path_of(parent)
        return above + b"/" + name if above else name

    def _may_go(self, inode: int) -> bool:
        """Return whether nobody has it open, nor gets it opened any more."""
        return self._opens is not None and self._opens.leave_unless_open(inode)

    def _attributes(self, node: Node) -> Attributes:
        return attributes_of(node, self._owner)

    # What is made

    def _new_attributes(self, parent: int, kind: int, mode: int, uid: int, gid: int) -> Attributes:
        """A directory with the set-group-ID bit hands its group down, and the bit to directories."""
        above = self._attributes(self._directory(parent))
        mode = stat.S_IMODE(mode)
        if above.mode & stat.S_ISGID:
            gid = above.gid
            mode |= stat.S_ISGID if kind == KIND_DIRECTORY else 0
        return Attributes(mode, uid, gid, ctime_ns=self._now_ns, atime_ns=self._now_ns)

    def _attach(self, node: Node) -> Inode:
        inode = self._w.attach(replace(node, mtime_ns=self._now_ns, seen_at_s=self._now_ns / 1e9))
        self._w.touch(node.parent, self._now_ns, 1)
        return inode

    def _make_file(self, parent: int, name: bytes, mode: int, uid: int, gid: int, *, is_open: bool) -> Inode:
        path = self._check_free(parent, name, KIND_FILE)
        attributes = self._new_attributes(parent, KIND_FILE, mode, uid, gid)
        number = make_staging_file(self._w, self._staging)
        self.created.append(number)
        inode = self._attach(Node(parent, name, KIND_FILE, staged=number, attributes=attributes))
        row = Put(path, inode, KIND_FILE, number, "", attributes, mtime_ns=self._now_ns)
        if not is_open:
            row = replace(row, state=SEALED, size_bytes=0, sealed_at_s=self._now_ns / 1e9)
        self._table.add(self._w, row)
        return inode

    def _make_directory(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        path = self._check_free(parent, name, KIND_DIRECTORY)
        attributes = self._new_attributes(parent, KIND_DIRECTORY, mode, uid, gid)
        inode = self._attach(Node(parent, name, KIND_DIRECTORY, attributes=attributes))
        state = DirectoryState(self._now_ns / 1e9, 0, 1, 0.0, self._now_ns)
        self._w.set_directory(inode, state)
        self._table.add(self._w, Mark(path, inode, attributes, is_new=True))
        return inode

    def _make_symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        path = self._check_free(parent, name, KIND_SYMLINK)
        attributes = self._new_attributes(parent, KIND_SYMLINK, 0o777, uid, gid)
        attributes = replace(attributes, target=target)
        inode = self._attach(Node(parent, name, KIND_SYMLINK, len(target), attributes=attributes))
        row = Put(
            path,
            inode,
            KIND_SYMLINK,
            0,
            "",
            attributes,
            SEALED,
            len(target),
            mtime_ns=self._now_ns,
            sealed_at_s=self._now_ns / 1e9,
        )
        self._table.add(self._w, row)
        return inode

    def _make_node(self, parent: int, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> Inode:
        kind = stat.S_IFMT(mode) or KIND_FILE
        if kind == KIND_FILE:
            return self._make_file(parent, name, mode, uid, gid, is_open=False)
        if kind not in (KIND_FIFO, KIND_SOCKET):
            raise NotSupported(f"{os.fsdecode(name)}: no device nodes here")
        path = self._check_free(parent, name, kind)
        attributes = replace(self._new_attributes(parent, kind, mode, uid, gid), rdev=rdev)
        inode = self._attach(Node(parent, name, kind, attributes=attributes))
        self._table.add(self._w, Local(path, inode, kind, attributes))
        return inode

    # What is removed

    def _unlink(self, parent: int, name: bytes) -> None:
        inode, node = self._child(parent, name)
        if node.is_directory:
            raise IsADirectory(f"{os.fsdecode(name)} is a directory")
        self._rows.drop_file(inode, node, self._path(parent, name))
        self._leave(inode, node)
        self._rows.keep_if_empty(parent)

    def _remove_directory(self, parent: int, name: bytes) -> None:
        inode, node = self._child(parent, name)
        if not node.is_directory:
            raise NotADirectory(f"{os.fsdecode(name)} is no directory")
        self._check_empty(inode, node)
        self._rows.drop_directory(inode, self._path(parent, name))
        self._leave(inode, node)
        self._rows.keep_if_empty(parent)

    def _check_empty(self, inode: int, node: Node) -> None:
        if next(self._w.names(inode), None) is not None:
            raise DirectoryNotEmpty(f"{os.fsdecode(node.name)}: the directory has entries")

    def _leave(self, inode: int, node: Node, *, is_replaced: bool = False) -> None:
        """Take the node's name, and the node itself unless somebody has it open.

        *is_replaced*: there has always been a file of that name. Who looked it up before this must
        find one: the kernel looks again, but only once.
        """
        if node.etag and not node.staged:  # Where its bytes are must not depend on its directory any more.
            self._w.put_node(inode, replace(node, origin=self._w.key_of(inode)))
        self._w.detach(node.parent, node.name)
        self._w.touch(node.parent, self._now_ns, -1)
        self.left.append(inode)
        is_replaced = is_replaced and not node.is_directory
        self.replaced += [inode] if is_replaced else []
        if node.is_directory or (not is_replaced and self._may_go(inode)):
            self._w.forget(inode)
            self.discarded += [node.staged] if node.staged else []
        elif node.staged:
            self._table.add(self._w, Orphan(inode, node.staged))

    # What gets another name

    def _rename(self, request: messages.Rename) -> None:
        if request.flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise NameRefused(f"renameat2(2) has no flags {request.flags}")
        inode, node = self._child(request.parent, request.name)
        self._directory(request.new_parent)
        target = self._w.child(request.new_parent, request.new_name)
        if request.flags == RENAME_NOREPLACE and target is not None:
            raise NameExists(f"{os.fsdecode(request.new_name)}: the name is taken")
        if target is not None and target[0] == inode:
            return
        check_key(self._path(request.new_parent, request.new_name), node.kind)
        self._check_not_below(inode, node, request.new_parent)
        if request.flags == RENAME_EXCHANGE:
            self._exchange(inode, node, request.parent, target)
        else:
            self._replace(inode, node, request, target)
        if request.parent != request.new_parent:
            self._rows.keep_if_empty(request.parent)

    def _check_not_below(self, inode: int, node: Node, directory: int) -> None:
        """Raise NameRefused if *directory* is *inode* or below it."""
        while node.is_directory and directory != ROOT_INODE:
            if directory == inode:
                raise NameRefused(f"{os.fsdecode(node.name)}: a directory can't be moved into itself")
            above = self._w.node(directory)
            assert above is not None, directory
            directory = above.parent

    def _replace(
        self, inode: int, node: Node, request: messages.Rename, target: tuple[Inode, Node] | None
    ) -> None:
        path, base = self._path(request.new_parent, request.new_name), ""
        if target is not None:
            self._check_replaceable(node, *target)
            if node.is_directory:
                self._rows.drop_directory(target[0], path)
            else:
                key = b"" if node.kind in (KIND_FIFO, KIND_SOCKET) else object_key(path, node.kind)
                base = self._rows.drop_file(target[0], target[1], path, key)
            self._leave(*target, is_replaced=True)
        self._shift(inode, request.new_parent, request.new_name, base)

    def _check_replaceable(self, node: Node, inode: int, target: Node) -> None:
        if node.is_directory:
            if not target.is_directory:
                raise NotADirectory(f"{os.fsdecode(target.name)} is no directory")
            self._check_empty(inode, target)
        elif target.is_directory:
            raise IsADirectory(f"{os.fsdecode(target.name)} is a directory")

    def _exchange(self, inode: int, node: Node, parent: int, target: tuple[Inode, Node] | None) -> None:
        if target is None:
            raise NameMissing("nothing to change places with")
        other, other_node = target
        self._check_not_below(other, other_node, parent)
        check_key(self._path(parent, node.name), other_node.kind)
        self._shift(inode, other_node.parent, EXCHANGE_NAME % inode, "")
        self._shift(other, parent, node.name, "")
        self._shift(inode, other_node.parent, other_node.name, "")

    def _shift(self, inode: int, parent: int, name: bytes, base: str) -> None:
        """Give the node another name, which is free. *base*: what the lake has there."""
        node = self._w.node(inode)
        assert node is not None, inode
        old, new = self._w.path_of(inode), self._path(parent, name)
        if node.is_directory:
            origin = self._rows.move_directory(inode, node, old, new)
        else:
            origin = self._rows.move_file(inode, node, old, new, base)
        attributes = node.attributes and replace(node.attributes, ctime_ns=self._now_ns)
        moved = replace(node, parent=parent, name=name, origin=origin, attributes=attributes)
        self._w.move(inode, replace(moved, seen_at_s=self._now_ns / 1e9))
        self._w.touch(node.parent, self._now_ns, -1)
        self._w.touch(parent, self._now_ns, 1)

    # Attributes

    def _known(self, inode: int) -> Node:
        node = self._w.node(inode)
        if node is None:
            raise ObjectMissing(f"inode {inode} is not known")
        return node

    def _set_attributes(self, request: messages.SetAttributes) -> None:
        node = self._known(request.inode)
        given = {
            name: value
            for name in ("uid", "gid", "atime_ns")
            if (value := getattr(request, name)) is not None
        }
        if request.mode is not None:
            given["mode"] = stat.S_IMODE(request.mode)
        attributes = replace(self._attributes(node), ctime_ns=self._now_ns, **given)
        self._restate(request.inode, node, attributes, request.mtime_ns)

    def _set_xattr(self, request: messages.SetXattr) -> None:
        node = self._known(request.inode)
        attributes = self._attributes(node)
        xattrs, name = dict(attributes.xattrs), request.name
        if name in xattrs and request.flags & XATTR_CREATE:
            raise NameExists(f"{os.fsdecode(name)}: there is such an attribute")
        if name not in xattrs and (request.value is None or request.flags & XATTR_REPLACE):
            raise AttributeMissing(f"{os.fsdecode(name)}: no such attribute")
        if request.value is None:
            del xattrs[name]
        else:
            xattrs[name] = request.value
        if xattrs_bytes(xattrs) > XATTRS_BYTES_MAX:
            raise StagingFull(f"{os.fsdecode(node.name)}: its attributes take over {XATTRS_BYTES_MAX} bytes")
        self._restate(request.inode, node, replace(attributes, xattrs=xattrs, ctime_ns=self._now_ns), None)

    def _restate(self, inode: int, node: Node, attributes: Attributes, mtime_ns: int | None) -> None:
        """Give the node its attributes, and have the lake get them."""
        if mtime_ns is None:
            mtime_ns = node.mtime_ns
        self._w.put_node(inode, replace(node, attributes=attributes, mtime_ns=mtime_ns))
        if inode == ROOT_INODE or self._w.is_detached(inode):
            return
        for seq, row in self._table.of_inode(inode):
            if isinstance(row, Put):
                self._table.replace(self._w, seq, replace(row, attributes=attributes, mtime_ns=mtime_ns))
                return
            if isinstance(row, Local):
                self._table.replace(self._w, seq, replace(row, attributes=attributes))
                return
            if isinstance(row, Mark | Restate):
                if seq not in self._table.running:
                    changed = replace(row, attributes=attributes)
                    if isinstance(changed, Restate):
                        changed = replace(changed, mtime_ns=mtime_ns)
                    self._table.replace(self._w, seq, changed)
                    return
                self._table.remove(self._w, seq)  # What is being sent is not all any more.
        self._table.add(self._w, Restate(self._w.path_of(inode), inode, node.kind, attributes, mtime_ns))


def attributes_of(node: Node, owner: tuple[int, int]) -> Attributes:
    """Return the node's attributes, the mount's defaults where it has none. *owner*: uid, gid."""
    if node.attributes is not None:
        return node.attributes
    mode = _DEFAULT_MODES.get(node.kind, 0o644)
    return Attributes(mode, *owner, ctime_ns=node.mtime_ns, atime_ns=node.mtime_ns)


def make_staging_file(w: IndexWriter, staging: StagingFiles) -> int:
    """Make an empty staging file; return its number. Raises StagingFull, CacheError."""
    number = w.take_staged_number()
    while not staging.create(number):  # There is one, of a transaction that failed.
        number = w.take_staged_number()
    return number


def xattrs_bytes(xattrs: dict[bytes, bytes]) -> int:
    return sum(len(name) + len(value) for name, value in xattrs.items())
