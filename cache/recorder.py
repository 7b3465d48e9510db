"""Records what readers use, as the mover sees it, for `sluice trace`.

The mover hears of misses as they happen and of hits when workers report them. What the kernel's page
cache answers is seen by nobody.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from cache import messages
from cache.index import Index
from cache.model import GROUP_BYTES, SMALL_OBJECT_BYTES_MAX, Inode

Use = tuple[float, str, int]  # Milliseconds since the start, item, bytes.

USES_HELD_MAX = 1_000_000
_SAME_USE_S = 2.0  # The reads of one file that follow each other so closely are one use.
_RECENT_MAX = 4096


class Recorder:
    """Tell it of every request with `note`; `take` returns the uses since it was called last."""

    def __init__(self, index: Index, started_s: float) -> None:
        self._index = index
        self._started_s = started_s
        self._uses: deque[Use] = deque()  # Invariant: at most USES_HELD_MAX.
        self._recent: OrderedDict[bytes, float] = OrderedDict()
        self.dropped = 0  # Uses for which there was no room.

    def note(self, request: messages.Request, now_s: float) -> None:
        match request:
            case messages.Fetch(inode, offset, length) | messages.ReadThrough(inode, offset, length):
                self._note_read(Inode(inode), offset, length, now_s)
            case messages.Used(items):
                for item in items:
                    row = self._index.version(item[:16])
                    if row is not None:
                        self._note_item(item, row.size_bytes, now_s)

    def take(self) -> list[Use]:
        uses, self._uses = list(self._uses), deque()
        return uses

    def _note_read(self, inode: Inode, offset: int, length: int, now_s: float) -> None:
        node = self._index.node(inode)
        if node is None or not node.vid or not length or offset >= node.size_bytes:
            return
        if node.size_bytes <= SMALL_OBJECT_BYTES_MAX:
            self._note_item(node.vid, node.size_bytes, now_s)
            return
        end = min(offset + length, node.size_bytes)
        for group in range(offset // GROUP_BYTES, (end - 1) // GROUP_BYTES + 1):
            self._note_item(node.vid + group.to_bytes(4, "big"), node.size_bytes, now_s)

    def _note_item(self, item: bytes, object_bytes: int, now_s: float) -> None:
        """*item*: a version's id, and the number of a group behind it where the file is large."""
        seen_s = self._recent.get(item, 0.0)
        self._recent[item] = now_s
        self._recent.move_to_end(item)
        if len(self._recent) > _RECENT_MAX:
            self._recent.popitem(last=False)
        if 0 <= now_s - seen_s < _SAME_USE_S:
            return
        if len(self._uses) == USES_HELD_MAX:
            self.dropped += 1
            return
        size_bytes = object_bytes
        if len(item) > 16:
            size_bytes = min(GROUP_BYTES, object_bytes - int.from_bytes(item[16:], "big") * GROUP_BYTES)
        self._uses.append((round((now_s - self._started_s) * 1000, 3), item.hex(), size_bytes))
