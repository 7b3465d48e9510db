"""The sides of a contest, mounted: ours, the native file system, and the peers that were asked for."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools.bench.contest import FAILURES, NATIVE, OURS, Side
from tools.bench.costs import disk_bytes
from tools.bench.figures import MeasurementFailed
from tools.bench.lakes import BUCKET, Endpoint
from tools.bench.peers.recipes import PEERS_DEFAULT, Request
from tools.bench.peers.side import mounted_peer
from tools.bench.settings import Settings, drop_page_cache
from tools.mounted import Mounted, MountFailed, sluice_command
from tools.servers import ServerError

TTL = "--ttl=86400"  # Nobody else changes the lake, which the peers are told, too.
HOLD_S = 600  # No upload begins within a contest that is not about uploads.


@dataclass(frozen=True, slots=True)
class Need:
    """What a contest needs of each side.

    *tree*: the lake's files as plain ones, which the native side reads; None: all begin empty. *endpoint* is
    what the mounts speak to, *direct* the server itself. *holds_uploads*: written files need not be sent.
    """

    name: str
    direct: Endpoint
    endpoint: Endpoint
    tree: Path | None
    budget_bytes: int  # Of the cache of each side.
    writable: bool = False
    holds_uploads: bool = False
    is_tight: bool = False  # The files don't all fit into the budget.
    peers: Sequence[str] = PEERS_DEFAULT


class NativeSide:
    """The file system that the caches are on."""

    kind: Literal["native"] = "native"
    name = NATIVE

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def pids(self) -> Sequence[int]:
        return ()

    def cache_bytes(self) -> int:
        return 0

    def forget(self) -> None:
        drop_page_cache()

    def settle(self) -> None:
        pass


class SluiceSide:
    """SluiceFS, mounted as a user mounts it."""

    kind: Literal["ours"] = "ours"

    def __init__(self, mounted: Mounted, name: str = OURS) -> None:
        self.mounted = mounted
        self.name = name
        self.directory = mounted.directory

    def pids(self) -> Sequence[int]:
        return [pid for pids in self.mounted.pids().values() for pid in pids]

    def cache_bytes(self) -> int:
        return disk_bytes(self.mounted.cache)

    def forget(self) -> None:
        self.mounted.unmount()
        shutil.rmtree(self.mounted.cache)
        self.mounted.mount()

    def settle(self) -> None:
        subprocess.run([sluice_command(), "sync", "--quiet", str(self.directory)], check=True)


@contextmanager
def sluice_side(
    settings: Settings, need: Need, options: Sequence[str] = (), name: str = OURS
) -> Iterator[SluiceSide]:
    """Yield SluiceFS with an empty cache of one tier on disk, as the peers have it."""
    access = "--no-read-only" if need.writable else "--read-only"
    hold = [f"--upload-delay={HOLD_S}"] if need.holds_uploads else []
    with settings.directory("sluice") as home:
        words = [f"--endpoint-url={need.endpoint.url}", access, *hold, "--dram=0", "--keep-free=0", TTL]
        words += [f"--cache={home / 'cache'}:{need.budget_bytes}", *options, *settings.mount_options]
        settings.commands[f"{need.name}: {name}"] = shlex.join(
            ["sluice", "mount", f"s3://{BUCKET}", str(home / "data"), *words]
        )
        mounted = Mounted(f"s3://{BUCKET}", home / "data", home / "cache", words, need.endpoint.environment())
        with mounted:
            try:
                yield SluiceSide(mounted, name)
            finally:
                if need.holds_uploads:  # Else unmounting would wait for what nobody wants.
                    leave(mounted)


def leave(mount: Mounted) -> None:
    """Unmount without sending anything; what was written is forgotten with the cache directory."""
    done = subprocess.run(
        [sluice_command(), "umount", "--lazy", str(mount.directory)], stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode != 0:
        raise MeasurementFailed("umount --lazy failed")


@contextmanager
def standing(settings: Settings, need: Need, options: Sequence[str] = ()) -> Iterator[list[Side]]:
    """Yield all sides, mounted; *options* are for `sluice mount`. All are gone at the end."""
    with ExitStack() as stack:
        sides: list[Side] = [stack.enter_context(sluice_side(settings, need, options))]
        native = need.tree or stack.enter_context(settings.directory("native"))
        sides += [NativeSide(native), *peers(settings, need, stack)]
        yield sides


def peers(settings: Settings, need: Need, stack: ExitStack) -> Iterator[Side]:
    """Yield the peers that could be mounted; of the others it is told why not."""
    for name in settings.peers:
        if name not in need.peers:
            continue
        assert settings.programs is not None
        home = stack.enter_context(settings.directory(name))
        delay_s = HOLD_S if need.holds_uploads else 0
        request = Request(
            settings.programs,
            home,
            need.direct,
            need.endpoint,
            need.budget_bytes,
            need.writable,
            delay_s,
            need.is_tight,
        )
        with contextlib.ExitStack() as unfinished:
            try:
                side = unfinished.enter_context(mounted_peer(name, request, need.tree))
            except (*FAILURES, MountFailed, ServerError) as error:
                settings.complain(f"{need.name}: {name} is left out: {error}")
                continue
            stack.push(unfinished.pop_all())
        settings.commands[f"{need.name}: {name}"] = side.command
        yield side
