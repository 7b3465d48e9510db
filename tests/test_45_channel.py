"""The channel extension, fed with requests in the kernel's format (linux/fuse.h) over a socket: no mount."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusefs import channel

ROOT = Path(__file__).parents[1]
GETATTR, OPEN, READ, STATFS, INIT, CREATE = 3, 14, 15, 17, 26, 35
IN_HEADER, OUT_HEADER = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
INIT_EXT, PASSTHROUGH, WRITEBACK = 1 << 30, 1 << 37, 1 << 16
PARALLEL_DIROPS = 1 << 18
READDIRPLUS = 1 << 13  # pyfuse3 calls a kernel without it too old.
KEEP_CACHE, OPEN_PASSTHROUGH = 1 << 1, 1 << 7
RESEND = 1 << 63
EIO, EACCES = 5, 13

pytestmark = pytest.mark.skipif(channel.load() is not None, reason=str(channel.load()))


class Kernel:
    """The kernel's end of the socket, and the process on the other."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(60)
        with theirs:
            command = [sys.executable, str(ROOT / "tests/channel_peer.py"), str(theirs.fileno()), *arguments]
            self.peer = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **(environment or {})},
                stderr=subprocess.PIPE,
            )
        self.stderr = ""

    def send(self, opcode: int, unique: int, nodeid: int = 1, body: bytes = b"", pid: int = 7) -> None:
        length = IN_HEADER.size + len(body)
        self.socket.send(IN_HEADER.pack(length, opcode, unique, nodeid, 0, 0, pid, 0) + body)

    def receive(self) -> tuple[int, int, bytes]:
        """Return (unique, error, body) of the next reply."""
        packed = self.socket.recv(1 << 20)
        length, error, unique = OUT_HEADER.unpack_from(packed)
        assert length == len(packed), packed
        return unique, -error, packed[OUT_HEADER.size :]

    def ask(self, opcode: int, unique: int, nodeid: int = 1, body: bytes = b"") -> tuple[int, bytes]:
        """Return (error, body)."""
        self.send(opcode, unique, nodeid, body)
        answered, error, reply = self.receive()
        assert answered == unique
        return error, reply

    def shake_hands(self, flags: int = INIT_EXT | PASSTHROUGH, size: int = 64) -> bytes:
        """Offer *flags*; return INIT's answer."""
        flags |= READDIRPLUS
        body = struct.pack("<IIIII", 7, 40, 1 << 20, flags & 0xFFFFFFFF, flags >> 32)
        error, reply = self.ask(INIT, 2, 0, body.ljust(size, b"\0")[:size])
        assert error == 0
        return reply

    def has_passthrough(self) -> bool:
        _, reply = self.ask(STATFS, 1 << 40)
        return struct.unpack_from("<QQQQ", reply)[3] == 0

    def open(self, unique: int, inode: int, flags: int = 0) -> tuple[int, int, int]:
        """Return (handle, flags, backing id)."""
        return struct.unpack("<QIi", self.ask(OPEN, unique, inode, struct.pack("<II", flags, 0))[1])

    def end(self) -> None:
        self.socket.close()
        _, stderr = self.peer.communicate(timeout=60)
        self.stderr = stderr.decode()


# As built or sanitized, and whether a thread receives.
WAYS = [("as built", ""), ("as built", "thread"), ("sanitized", ""), ("sanitized", "thread")]


@pytest.fixture(params=WAYS, ids=" ".join)
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    build, thread = request.param
    environment = request.getfixturevalue("sanitized") if build == "sanitized" else None
    made = Kernel("passthrough", *filter(None, [thread]), environment=environment)
    yield made
    made.end()
    for word in ("Sanitizer", "runtime error"):
        assert word not in made.stderr, made.stderr


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Build the extension under AddressSanitizer and UndefinedBehaviorSanitizer; return how to run it."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    library = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("gcc has no AddressSanitizer here")
    package = tmp_path_factory.mktemp("sanitized") / "fusefs"
    shutil.copytree(ROOT / "fusefs", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    fuse = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True)
    if fuse.returncode != 0:
        pytest.skip(fuse.stderr)
    target = package / f"_channel{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(
        [compiler, "-g", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=undefined", f"-I{sysconfig.get_path('include')}",
         "-pthread", *map(str, package.glob("*.c")), "-o", str(target), *shlex.split(fuse.stdout)],
        check=True,
    )  # fmt: skip
    return {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",  # The interpreter's own.
        "SLUICE_TEST_CHANNEL": str(package.parent),
    }


# INIT


def test_init_asks_for_passthrough_where_the_kernel_offers_it(kernel: Kernel) -> None:
    reply = kernel.shake_hands()
    flags, flags2, depth = struct.unpack_from("<12xI16xII", reply)
    assert flags & INIT_EXT and flags2 << 32 & PASSTHROUGH and depth == 1
    assert not flags & WRITEBACK
    assert struct.unpack_from("<16xHH", reply) == (256, 192), "how many requests are in the background"
    assert kernel.has_passthrough()


@pytest.mark.parametrize("offer", [0, INIT_EXT, PASSTHROUGH])
def test_without_the_offer_there_is_no_passthrough(kernel: Kernel, offer: int) -> None:
    reply = kernel.shake_hands(offer)
    assert struct.unpack_from("<32xII", reply) == (0, 0)
    assert not kernel.has_passthrough()
    assert kernel.open(4, 3) == (3, KEEP_CACHE, 0)
    assert kernel.ask(OPEN, 6, 103, bytes(8)) == (EIO, b""), "pass_through raises ValueError"


@pytest.mark.parametrize("offer", [0, PARALLEL_DIROPS])
def test_names_of_a_directory_are_looked_up_at_once_where_the_kernel_can(kernel: Kernel, offer: int) -> None:
    (flags,) = struct.unpack_from("<12xI", kernel.shake_hands(INIT_EXT | PASSTHROUGH | offer))
    assert flags & PARALLEL_DIROPS == offer


def test_an_init_of_an_older_kernel_is_understood(kernel: Kernel) -> None:
    kernel.shake_hands(size=16)
    assert not kernel.has_passthrough()


def test_nothing_is_asked_for_that_nobody_wants() -> None:
    kernel = Kernel()
    try:
        assert struct.unpack_from("<32xII", kernel.shake_hands()) == (0, 0)
        assert not kernel.has_passthrough()
    finally:
        kernel.end()


# OPEN and CREATE


def test_an_open_carries_the_backing_id_and_no_other_does(kernel: Kernel) -> None:
    kernel.shake_hands()
    assert kernel.open(4, 3) == (3, KEEP_CACHE, 0)
    assert kernel.open(6, 177) == (177, OPEN_PASSTHROUGH, 77)
    assert kernel.open(8, 3) == (3, KEEP_CACHE, 0)


def test_a_create_carries_the_backing_id(kernel: Kernel) -> None:
    kernel.shake_hands()
    for unique, inode, backing_id, flags in ((4, 3, 0, KEEP_CACHE), (6, 177, 77, OPEN_PASSTHROUGH)):
        error, reply = kernel.ask(CREATE, unique, 1, struct.pack("<IIII", 0, 0o644, 0, 0) + b"%d\0" % inode)
        assert error == 0 and len(reply) == 128 + 16
        assert struct.unpack_from("<Q", reply) == (inode,)
        assert struct.unpack_from("<QIi", reply, 128) == (inode, flags, backing_id)


def test_an_open_that_fails_leaves_nothing_to_the_next(kernel: Kernel) -> None:
    kernel.shake_hands()
    for unique in range(4, 4 + 2 * 600, 2):  # More than replies can wait at a time.
        assert kernel.ask(OPEN, unique, 154, struct.pack("<II", 1, 0)) == (EACCES, b"")
    assert kernel.open(2000, 3) == (3, KEEP_CACHE, 0)


def test_each_of_many_opens_in_flight_gets_its_own_backing_id(kernel: Kernel) -> None:
    kernel.shake_hands()
    inodes = {unique: unique // 2 % 190 + 1 for unique in range(4, 4 + 2 * 300, 2)}
    for unique, inode in inodes.items():
        kernel.send(OPEN, unique, inode, bytes(8))
    for _ in range(len(inodes)):
        unique, error, body = kernel.receive()
        inode = inodes.pop(unique)
        backing_id = max(0, inode - 100)
        flags = OPEN_PASSTHROUGH if backing_id else KEEP_CACHE
        assert (error, struct.unpack("<QIi", body)) == (0, (inode, flags, backing_id))


def test_an_open_that_is_sent_again_gets_its_backing_id(kernel: Kernel) -> None:
    kernel.shake_hands()
    assert kernel.open(6 | RESEND, 177) == (177, OPEN_PASSTHROUGH, 77)


# What handlers are told


def test_a_handler_knows_its_request_and_who_sent_it(kernel: Kernel) -> None:
    kernel.shake_hands()
    sent = {4: 100, 6: 200, 8 | RESEND: 300, (1 << 62) + 2: 400}
    for unique, pid in sent.items():
        kernel.send(GETATTR, unique, 9, bytes(16), pid=pid)
    for _ in range(len(sent)):
        unique, error, body = kernel.receive()
        size, owner = struct.unpack_from("<16x8xQ", body)[0], struct.unpack_from("<16x68xI", body)[0]
        assert error == 0
        assert size == unique & ~RESEND
        assert owner == sent.pop(unique)


def test_a_read_without_a_handle_gets_the_inode_as_its_handle(kernel: Kernel) -> None:
    kernel.shake_hands()
    for unique, handle, expected in ((4, 0, b"55"), (6, 12, b"12")):
        body = struct.pack("<QQIIQII", handle, 0, 100, 0, 0, 0, 0)
        assert kernel.ask(READ, unique, 55, body) == (0, expected)


def test_requests_that_are_cut_short_do_no_harm(kernel: Kernel) -> None:
    """The kernel sends none; the extension must not read past their end nevertheless."""
    kernel.shake_hands()
    kernel.send(READ, 4, 55)
    kernel.receive()
    assert kernel.open(6, 177) == (177, OPEN_PASSTHROUGH, 77)
