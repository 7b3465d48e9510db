"""Shuffled small files, all cached: with no request for an open, and with opens, by readers and workers.

`warm-epochs` has two readers and the mount's own choice; here both ways of opening are measured, each
with one reader and with four, against the same files on ext4 and in peers; and two workers against one.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from cache.model import MIB
from tools.bench import lakes, readers
from tools.bench.contest import Outcome, Side, Task, contest, for_each
from tools.bench.field import Need, SluiceSide, sluice_side, standing
from tools.bench.figures import Figure, Target, alternate, progress
from tools.bench.settings import Settings, drop_page_cache
from tools.mounted import Mounted

NAME = "opens"
FILES = 10_000
FILE_BYTES = 110_000
FOLDER_FILES = 1000
NO_OPEN, WITH_OPENS = "--profile=dataset", "--profile=checkpoint"
OPENED = "sluice, with opens"
PLAIN_ROUNDS = ((1, False, 0.8, 10), (4, False, 0.8, 10), (4, True, 0.6, 3))
OPENED_OVER_NATIVE = {1: 0.15, 4: 0.2}
OPENED_OVER_PEER = 3


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=4), FOLDER_FILES)
    objects = dict.fromkeys(keys, FILE_BYTES)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: making {len(keys):,} files of {FILE_BYTES:,} bytes, twice")
        lakes.fill(endpoint, objects)
        lakes.write_tree(path / "plain", objects)
        need = Need(NAME, endpoint, endpoint, path / "plain", 2 * len(keys) * FILE_BYTES + 256 * MIB)
        figures = _over_others(settings, need, keys)
        options = ["--dram=0", WITH_OPENS]
        with (
            settings.mounted(endpoint, [*options, "--workers=2"]) as two,
            settings.mounted(endpoint, [*options, "--workers=1"]) as one,
        ):
            return [*figures, _two_workers(settings, two, one, keys)]


def epoch_s(directory: Path, keys: list[str], processes: int, seed: int) -> float:
    """Return the seconds of one epoch, in an order of its own."""
    shares = readers.shuffled_shares(lakes.paths_below(directory, keys), processes, seed)
    return readers.timed(readers.prepare_files, shares, len(keys) * FILE_BYTES)


def _over_others(settings: Settings, need: Need, keys: list[str]) -> list[Figure]:
    figures: list[Figure] = []
    with ExitStack() as stack:
        sides = stack.enter_context(standing(settings, need, [NO_OPEN]))
        opened = stack.enter_context(sluice_side(settings, need, [WITH_OPENS], OPENED))
        sides.insert(1, opened)
        for_each(
            settings, f"{NAME}: first epoch", sides, lambda side: epoch_s(side.directory, keys, 1, seed=-1)
        )
        for processes, dropped, least, over_peer in PLAIN_ROUNDS:
            targets = Target(at_least=least), Target(at_least=over_peer)
            figures += _contest(settings, sides, keys, processes, dropped, targets)
    return figures


def _contest(
    settings: Settings,
    sides: list[Side],
    keys: list[str],
    processes: int,
    dropped: bool,
    targets: tuple[Target, Target],
) -> list[Figure]:
    ending = f"{processes}-readers" + ("-dropped" if dropped else "")
    readers_text = "1 reader" if processes == 1 else f"{processes} readers"
    how = "page cache dropped" if dropped else "page cache warm"
    what = f"shuffled epochs of {len(keys):,} files of {FILE_BYTES:,} bytes, {readers_text}, {how}"
    task = Task(f"epochs-{ending}", what, "files/s", len(keys), len(keys) * FILE_BYTES)

    def prepare(side: Side, number: int) -> None:
        if dropped:
            drop_page_cache()

    before = [_requests(side) for side in sides[:2]]
    outcome = contest(
        settings, task, sides, lambda side, number: epoch_s(side.directory, keys, processes, number), prepare
    )
    after = [_requests(side) for side in sides[:2]]
    reads = len(keys) * settings.rounds
    notes = [
        {f"{kind} a file": round((late[kind] - early[kind]) / reads, 3) for kind in early}
        for early, late in zip(before, after, strict=True)
    ]
    return _figures(outcome, ending, processes, dropped, targets, notes)


def _figures(
    outcome: Outcome,
    ending: str,
    processes: int,
    dropped: bool,
    targets: tuple[Target, Target],
    notes: list[dict[str, float]],
) -> list[Figure]:
    goal = "shuffled 110 KB files, page cache dropped, from the NVMe tier"
    readers_text = "1 reader" if processes == 1 else f"{processes} readers"
    if not dropped:
        goal = f"warm shuffled 110 KB files, no-open, {readers_text}"
    no_open = outcome.figure(
        *targets, name=f"no-open-{ending}", what=f"{outcome.task.what}, no-open", goal=goal, notes=notes[0]
    )
    if dropped:
        return [no_open]
    opened = outcome.figure(
        Target(at_least=OPENED_OVER_NATIVE[processes]),
        Target(at_least=OPENED_OVER_PEER),
        ours=OPENED,
        name=f"opened-{ending}",
        what=f"{outcome.task.what}, with opens",
        goal=f"the same with opens, {readers_text}",
        notes=notes[1],
    )
    requests = Figure(
        name=f"no-open-{ending}-requests",
        what="FUSE requests for each of these reads",
        unit="requests/file",
        ours=[notes[0]["requests a file"]],
        target=Target(at_most=0.001),
        goal=f"FUSE requests per warm no-open read, {readers_text}",
    )
    return [no_open, opened, requests]


def _requests(side: Side) -> dict[str, int]:
    assert isinstance(side, SluiceSide)
    counted = side.mounted.status()["reads"]["requests"]
    return {kind: counted[kind] for kind in ("requests", "opens", "reads")}


def _two_workers(settings: Settings, two: Mounted, one: Mounted, keys: list[str]) -> Figure:
    def rate(mount: Mounted, number: int) -> float:
        return len(keys) / epoch_s(mount.directory, keys, 4, number)

    for mount in (two, one):
        rate(mount, -1)
    ours, baseline = alternate(
        lambda number: rate(two, number), lambda number: rate(one, number), settings.rounds, "two-workers"
    )
    return Figure(
        name="two-workers",
        what=f"shuffled epochs of {len(keys):,} files with opens, 4 processes, two workers",
        unit="files/s",
        ours=ours,
        target=Target(at_least=1.4),
        baseline_name="one worker",
        baseline=baseline,
        goal="2 workers over 1, opens per second, 4 readers",
    )
