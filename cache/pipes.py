"""Reads what is written to `.sluice/order` and `warm` where the mount is for reading only.

There the kernel refuses to open a regular file for writing, whatever we say, but not a FIFO. So these
two are FIFOs there, which the kernel keeps itself: we are one of their readers, through the mount. A
reader keeps the mount busy. So there is one only from the moment somebody looks such a name up, before he
is answered, until a little after the last writer has gone. While he waits, the kernel may hold a lock of the
directory (it does for O_CREAT), so we reach the same FIFOs by another one.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from subprocess import DEVNULL

import trio

from cache.errors import TextRefused

log = logging.getLogger(__name__)

# In the root: shows the FIFOs, to us, and is looked up without asking us. No key of S3 is like it.
PIPES_NAME = b".sluice\xff"
_LINGER_S = 5.0  # So long who has looked a FIFO up may take to open it.
_LINGER_AFTER_S = 0.2  # The same once a text has come, and nobody has looked it up since.
_POLL_S = 0.02
_PIECE_BYTES = 1 << 16

# Run with a path and a socket: opens the one, and sends the descriptor, or an errno,
# through the other; 0 alone: it is no FIFO.
_OPENER = """
import os, socket, stat, sys
answer = socket.socket(fileno=int(sys.argv[2]))
try:
    fd = os.open(os.fsencode(sys.argv[1]), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    socket.send_fds(answer, [b"0"], [fd] if stat.S_ISFIFO(os.fstat(fd).st_mode) else [])
except OSError as error:
    try:
        answer.send(b"%d" % error.errno)
    except OSError:
        pass  # Nobody waits any more.
"""

Take = Callable[[bytes, bytes], Awaitable[None]]  # (name, text). Raises TextRefused, having told it.


class _Reader:
    def __init__(self, fd: int, until_s: float) -> None:
        self.fd = fd
        self.until_s = until_s
        self.text = bytearray()
        self.is_over_limit = False
        self.closed = trio.Event()


class Pipes:
    """For the mover's trio thread. *directory*: PIPES_NAME in the mount's root."""

    def __init__(self, nursery: trio.Nursery, directory: Path, take: Take, text_bytes_max: int) -> None:
        self._nursery = nursery
        self._directory = directory
        self._take = take
        self._text_bytes_max = text_bytes_max
        self._readers: dict[bytes, _Reader] = {}
        self._opening: dict[bytes, trio.Event] = {}

    async def looked_up(self, name: bytes) -> None:
        """Return once the FIFO has a reader: then an open for writing waits for nobody."""
        while name in self._opening:
            await self._opening[name].wait()
        reader = self._readers.get(name)
        if reader is not None:
            reader.until_s = trio.current_time() + _LINGER_S
            return
        opened = self._opening[name] = trio.Event()
        try:
            fd = await self._open(self._directory / os.fsdecode(name))
            if fd >= 0:
                reader = self._readers[name] = _Reader(fd, trio.current_time() + _LINGER_S)
                self._nursery.start_soon(self._read, name, reader)
        finally:
            del self._opening[name]
            opened.set()

    async def _open(self, path: Path) -> int:
        """Return the descriptor, -1 where the mount is not what is there."""
        try:
            return await _opened_elsewhere(path)
        except OSError as error:
            log.warning("%s: %s; what is written there is not heard", path, error.strerror)
            return -1

    async def let_go(self) -> None:
        """Close all readers once nobody writes to them, also those just being opened: the mount ends."""
        for opened in list(self._opening.values()):
            await opened.wait()
        readers = list(self._readers.values())
        for reader in readers:
            if not reader.text:
                reader.until_s = 0.0
        for reader in readers:
            await reader.closed.wait()

    async def _read(self, name: bytes, reader: _Reader) -> None:
        try:
            while True:
                piece = _read_now(reader.fd)
                if piece:
                    self._note(reader, piece)
                elif piece is None:  # There is a writer.
                    with trio.move_on_after(1.0):
                        await trio.lowlevel.wait_readable(reader.fd)
                elif reader.text:
                    await self._finish(name, reader)
                elif trio.current_time() > reader.until_s:
                    return
                else:
                    await trio.sleep(_POLL_S)
                await trio.lowlevel.checkpoint()
        finally:
            # No await from the last look: a writer who opens it from here on gets EPIPE.
            del self._readers[name]
            os.close(reader.fd)
            reader.closed.set()

    def _note(self, reader: _Reader, piece: bytes) -> None:
        if not reader.text:
            reader.until_s = trio.current_time() + _LINGER_AFTER_S
        if len(reader.text) + len(piece) > self._text_bytes_max:
            reader.is_over_limit = True
        else:
            reader.text += piece

    async def _finish(self, name: bytes, reader: _Reader) -> None:
        """The last writer has closed it: take the text over."""
        text, reader.text = bytes(reader.text), bytearray()
        if reader.is_over_limit:
            reader.is_over_limit = False
            log.error("%s: longer than %d bytes: not used", os.fsdecode(name), self._text_bytes_max)
            return
        try:
            await self._take(name, text)
        except TextRefused:
            pass  # The log and `status` say so: a pipe can't.
        except Exception:  # A fault of ours loses this text, not the mover.
            log.exception("what was written to .sluice/%s could not be used", os.fsdecode(name))


async def _opened_elsewhere(path: Path) -> int:
    """Return a descriptor of the FIFO *path*, opened by another process; -1 for what is none. Raises OSError.

    In `--workers 0` this very thread answers the kernel: it must not even ask what the file is.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command = [sys.executable, "-I", "-S", "-c", _OPENER, str(path), str(theirs.fileno())]
            opener = await trio.lowlevel.open_process(command, pass_fds=[theirs.fileno()], stdin=DEVNULL)
        try:
            await trio.lowlevel.wait_readable(ours)
            text, descriptors, _, _ = socket.recv_fds(ours, 16, 1)
            await opener.wait()
        except trio.Cancelled:  # The mover ends: should no worker answer, this one would wait for ever.
            opener.kill()
            raise
    code = int(text or errno.EIO)  # Nothing: it was killed.
    if code:
        raise OSError(code, os.strerror(code))
    if not descriptors:
        return -1
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def _read_now(fd: int) -> bytes | None:
    """Return what is there; b"" where there is no writer, None where there is one, but nothing yet."""
    try:
        return os.read(fd, _PIECE_BYTES)
    except BlockingIOError:
        return None
