"""Shuffled epochs over a set twice as large as the cache, out of a lake that is 20 ms away.

The page cache is passed by, so that the cache is what counts; ext4 has all of the files, and shows what
the disk could do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tools.bench import lakes, readers
from tools.bench.contest import Side, Task, contest, for_each
from tools.bench.epoch_bytes import prepare_past_page_cache
from tools.bench.field import Need, SluiceSide, standing
from tools.bench.figures import Figure, progress
from tools.bench.settings import Settings
from tools.option_kinds import format_size
from tools.options import TIER_BYTES_MIN

NAME = "larger"
FILES = 8000
FILES_MIN = 1300  # With fewer, the smallest tier would hold them all.
FILE_BYTES = 110_000
FOLDER_FILES = 500
LOADERS = 4
LATENCY_S = 0.020
BUDGET_SLACK = 1.2  # Peers look at what their caches take from time to time.
PEERS = ("juicefs", "juicefs-none", "rclone", "s3fs", "weed")


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=FILES_MIN), FOLDER_FILES)
    objects, total_bytes = dict.fromkeys(keys, FILE_BYTES), len(keys) * FILE_BYTES
    budget_bytes = max(TIER_BYTES_MIN, total_bytes // 2)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as direct:
        progress(f"{NAME}: making {len(keys):,} objects of {FILE_BYTES:,} bytes, twice")
        lakes.fill(direct, objects)
        lakes.write_tree(path / "plain", objects)
        with lakes.slowed(direct, LATENCY_S) as (slow, proxy):
            need = Need(NAME, direct, slow, path / "plain", budget_bytes, is_tight=True, peers=PEERS)
            with standing(settings, need) as sides:
                return [_figure(settings, sides, keys, budget_bytes, proxy)]


def _figure(settings: Settings, sides: list[Side], keys: list[str], budget_bytes: int, proxy: str) -> Figure:
    total_bytes = len(keys) * FILE_BYTES

    def epoch_s(side: Side, number: int) -> float:
        shares = readers.shuffled_shares(lakes.paths_below(side.directory, keys), LOADERS, number)
        return readers.timed(prepare_past_page_cache, shares, total_bytes)

    what = (
        f"shuffled epochs of {len(keys):,} files of {FILE_BYTES:,} bytes, {LOADERS} processes,"
        f" {budget_bytes / total_bytes:.0%} of them cached, {LATENCY_S * 1000:.0f} ms to first byte"
    )
    for_each(settings, f"{NAME}: first epoch", sides, lambda side: epoch_s(side, -1))
    ours = sides[0]
    assert isinstance(ours, SluiceSide)
    before = ours.mounted.status()["lake_io"]["bytes_fetched"]
    outcome = contest(settings, Task(NAME, what, "files/s", len(keys), total_bytes), sides, epoch_s)
    fetched_bytes = ours.mounted.status()["lake_io"]["bytes_fetched"] - before
    share = fetched_bytes / total_bytes / settings.rounds
    took_bytes = {side.name: side.cache_bytes() for side in sides if side.kind != "native"}
    return outcome.figure(
        without=over_budget(settings, sides, took_bytes, budget_bytes),
        notes={
            "of its bytes an epoch fetched": f"{share:.0%}",
            "caches may take": format_size(budget_bytes),
            "caches took": {name: format_size(size_bytes) for name, size_bytes in took_bytes.items()},
            "the lake": proxy,
        },
    )


def over_budget(
    settings: Settings, sides: Sequence[Side], took_bytes: Mapping[str, int], budget_bytes: int
) -> list[str]:
    """Return the peers whose caches took more than they were given, and say so."""
    over = [
        side.name
        for side in sides
        if side.kind == "peer" and took_bytes[side.name] > BUDGET_SLACK * budget_bytes
    ]
    for name in over:
        took, given = format_size(took_bytes[name]), format_size(budget_bytes)
        settings.complain(
            f"{NAME}: {name} is not compared: its cache took {took} of the {given} it was given"
        )
    return over
