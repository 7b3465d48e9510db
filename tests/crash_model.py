"""What a crash may leave of a script of file operations, in a mount and in its lake.

After killed processes every operation that had returned is there; the one under way has happened, has
not, or a write of it has in part. After a power loss the namespace is that of some moment since the last
fsync that had returned, and every file is what its last fsync made it if nothing changed it since. One
that was changed since then, or never fsynced, may be anything, or be missing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.crash_script import Operation, Remove, Rename, Tree, Write, after, digest


@dataclass(frozen=True, slots=True)
class Told:
    """A line of the script's output."""

    operation: int
    event: str  # begun, part, synced, returned or failed
    at_ns: int
    errno: int = 0


class Story:
    """A script, the tree after each of its operations, and which versions of files it promises.

    The paths of its trees are relative to the mount.
    """

    def __init__(self, operations: list[Operation]) -> None:
        self.operations = operations
        self.states: list[Tree] = [{}]
        self._files: list[dict[str, int]] = [{}]
        self._written: list[int | None] = []  # By operation: the file whose content it changes.
        for number, operation in enumerate(operations):
            self.states.append(after(self.states[-1], operation))
            self._files.append(_files_after(self._files[-1], operation, number))
            self._written.append(self._files[-1][operation.path] if isinstance(operation, Write) else None)

    def versions(self) -> set[str]:
        """Return the digests of all versions of files that were closed, or fsynced, and of a new file."""
        bodies = {body for state in self.states for body in state.values() if body is not None}
        return {digest(body) for body in (*bodies, b"")}

    # --- Killed processes ----------------------------------------------------------------------

    def fault_after_kill(self, told: list[Told], found: Tree) -> str:
        """Return what is wrong with the tree found after processes were killed; "" if nothing."""
        returned = sum(line.event == "returned" for line in told)
        begun = returned < len(self.operations) and any(line.operation == returned for line in told)
        before = self.states[returned]
        if not begun:
            return difference(before, found)
        operation, whole = self.operations[returned], self.states[returned + 1]
        if found in (before, whole):
            return ""
        if not isinstance(operation, Write):
            return f"neither before nor after {operation}: {difference(before, found)}"
        return self._fault_of_write(operation, before, whole, found, told)

    def _fault_of_write(
        self, operation: Write, before: Tree, whole: Tree, found: Tree, told: list[Told]
    ) -> str:
        path = operation.path
        synced = told[-1].event == "synced" or (len(told) > 1 and told[-2].event == "synced")
        others = {name: body for name, body in found.items() if name != path}
        if fault := difference({n: b for n, b in before.items() if n != path}, others):
            return fault
        old, new, now = before.get(path), whole[path], found.get(path)
        assert new is not None
        if synced:
            return f"{path}: fsync had returned, but it is {described(now)}, not {described(new)}"
        return (
            "" if _in_part(operation, old, new, now) else f"{path} is torn: {described(now)} in {operation}"
        )

    # --- Power loss ----------------------------------------------------------------------------

    def fault_after_power_loss(self, told: list[Told], found: Tree) -> str:
        """Return what is wrong with the tree found after power was lost; "" if nothing."""
        first = max((line.operation + 1 for line in told if line.event == "synced"), default=0)
        last = max((line.operation + 1 for line in told), default=0)
        faults = []
        for moment in range(first, last + 1):
            if not (fault := self._fault_at(moment, told, found)):
                return ""
            faults.append(f"  at {moment}: {fault}")
        return f"no moment from {first} to {last} fits:\n" + "\n".join(faults)

    def _fault_at(self, moment: int, told: list[Told], found: Tree) -> str:
        """Compare with the tree after the first *moment* operations."""
        kept = self._synced_content(moment, told)
        state = names(self.states[moment])
        may_be_missing = {path for path, body in state.items() if body is not None and path not in kept}
        wanted = {path: body for path, body in state.items() if path in found or path not in may_be_missing}
        if fault := difference(wanted, names(found)):
            return fault
        for path, body in kept.items():
            if found[path] != body:
                return f"{path} was fsynced, but it is {described(found[path])}, not {described(body)}"
        return ""

    def _synced_content(self, moment: int, told: list[Told]) -> dict[str, bytes]:
        """Return the files of that moment whose last write that had begun was fsynced."""
        begun = max((line.operation + 1 for line in told), default=0)
        synced = {line.operation for line in told if line.event == "synced"}
        kept = {}
        for path, file in self._files[moment].items():
            last = max(n for n, written in enumerate(self._written[:begun]) if written == file)
            body = self.states[last + 1][self.operations[last].path]
            if last in synced and body is not None:
                kept[path] = body
        return kept


def _files_after(files: dict[str, int], operation: Operation, number: int) -> dict[str, int]:
    """Return which file is where after an operation; a file is the number of the one that made it."""
    changed = dict(files)
    if isinstance(operation, Write):
        changed.setdefault(operation.path, number)
    elif isinstance(operation, Rename):
        for old in [old for old in files if old == operation.path or old.startswith(f"{operation.path}/")]:
            changed[operation.target + old[len(operation.path) :]] = changed.pop(old)
    elif isinstance(operation, Remove):
        changed.pop(operation.path, None)
    return changed


def _in_part(operation: Write, old: bytes | None, new: bytes, now: bytes | None) -> bool:
    """Return whether a write that was cut off may leave *now*: it writes from front to back."""
    if now is None:
        return old is None
    if operation.how == "wb":
        return new.startswith(now)
    before = old or b""
    end = next((n for n, (one, other) in enumerate(zip(now, new, strict=False)) if one != other), len(now))
    return len(before) <= len(now) and now[end:] == before[end:]


def names(tree: Tree) -> Tree:
    return {path: None if body is None else b"" for path, body in tree.items()}


def described(body: bytes | None) -> str:
    return "absent or a directory" if body is None else f"{len(body)} bytes {digest(body)}"


def difference(wanted: Mapping[str, bytes | None], found: Mapping[str, bytes | None]) -> str:
    """Return how two trees differ, in words; "" if they don't."""
    lines = [f"{path} is missing" for path in sorted(wanted.keys() - found.keys())]
    lines += [f"{path} should not be there" for path in sorted(found.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & found.keys()):
        if wanted[path] != found[path]:
            lines.append(f"{path}: {described(found[path])}, not {described(wanted[path])}")
    return "; ".join(lines)


def observe(root: Path) -> Tree:
    """Read all below *root*."""
    tree: Tree = {}
    for folder, folders, files in os.walk(root, onerror=_raise):
        for name in folders:
            tree[os.path.relpath(os.path.join(folder, name), root)] = None
        for name in files:
            path = Path(folder, name)
            tree[str(path.relative_to(root))] = path.read_bytes()
    return tree


def _raise(error: OSError) -> None:
    raise error
