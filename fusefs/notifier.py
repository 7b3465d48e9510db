"""The notifier: a process that tells the kernel which names show something else now, and does nothing else.

The kernel takes the directory's lock for that (fs/fuse/dir.c: fuse_reverse_inval_entry) and waits for who has
it, whatever signals come: for a LOOKUP, say, that a worker has still to answer. A worker that waited there
could be killed but would not end, so nobody could be started in its place, who would answer the LOOKUP
(`supervisor._have_sent_again`). The notifier receives no request, so nobody waits for its end.

It ends with its supervisor: while it has the device a mount without workers would hang, not fail.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import time
from pathlib import Path

from cache import messages
from fusefs import device

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_RECONNECT_S = 0.05
_RECEIVE_BYTES = 64 << 10
_READY = messages.frame(messages.Asked(0, messages.Notifies()))
_libc = ctypes.CDLL(None, use_errno=True)


def run(fuse_device: int, mover_socket: Path, supervisor: int) -> None:
    """Pass on what the mover says until the mount is gone. *supervisor*: the process that forked us."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        return  # It died before.
    while True:
        with socket.socket(socket.AF_UNIX) as mover:
            try:
                mover.connect(str(mover_socket))
                if not _pass_on(mover, fuse_device):
                    return
            except OSError:
                pass  # The mover is gone. What it had yet to say the kernel learns after the ttl.
        time.sleep(_RECONNECT_S)


def _pass_on(mover: socket.socket, fuse_device: int) -> bool:
    """Return False once the mount is gone, True once the mover is."""
    reader = messages.FrameReader()
    mover.sendall(_READY)
    while received := mover.recv(_RECEIVE_BYTES):
        for packed in reader.feed(received):
            message = messages.decode_from_mover(packed)
            assert isinstance(message, messages.Invalidate), message
            for parent, name in message.entries:
                if not device.invalidate_entry(fuse_device, parent, name):
                    return False
            mover.sendall(_READY)
    return True
