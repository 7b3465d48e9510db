"""How long the loaders of a training wait for the lake: with the order told, found, and not known.

The lake is 20 ms away and gives 1.2 times what the training consumes; the cache holds a tenth of the
set. Each loader reads a batch, one file after the other, and then computes for a fixed time, so that all
together consume RATE files a second if they never wait. A read waits for as long as it takes more than
a read of a cached file does. The page cache is passed by, so that every read comes to us.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tools.bench import lakes, readers
from tools.bench.epoch_bytes import charged_bytes, read_past_page_cache
from tools.bench.figures import Figure, Target, progress
from tools.bench.lakes import Endpoint
from tools.bench.settings import Settings
from tools.mounted import Mounted, sluice_command
from tools.servers import Faults, SlowProxy

NAME = "order-known"
FILES = 6400  # A tenth of them is the smallest tier that there may be.
FILES_MIN = 400  # Then the tier holds all of them: for a test that it runs.
FILE_BYTES = 110_000
FOLDER_FILES = 400
LOADERS = 4
BATCH = 32
RATE = 200.0  # Files a second.
LATENCY_S = 0.020
HEADROOM = 1.2
SHARE = 0.1
TIER_BYTES_MIN = 64 << 20
EPOCHS = 2
SEED = 0
TOLD_MAX, FOUND_MAX = 0.03, 0.05


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=FILES_MIN), FOLDER_FILES)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as direct:
        progress(f"{NAME}: making {len(keys):,} objects of {FILE_BYTES:,} bytes")
        lakes.fill(direct, dict.fromkeys(keys, FILE_BYTES))
        hit_s = _hit_s(settings, direct, keys)
        faults = Faults(latency_s=LATENCY_S, bytes_per_s=HEADROOM * RATE * FILE_BYTES)
        with SlowProxy(direct.url, faults) as proxy:
            slow = Endpoint(proxy.endpoint_url, direct.access_key, direct.secret_key, direct.region)
            rounds = [_round(settings, slow, keys, hit_s, number) for number in range(settings.rounds)]
    return [
        _figure("told", [sum(one["told"]) / EPOCHS for one in rounds], TOLD_MAX, rounds, hit_s),
        _figure("found", [one["found"][0] for one in rounds], FOUND_MAX, rounds, hit_s),
    ]


def _figure(
    how: str, shares: list[float], at_most: float, rounds: list[dict[str, list[float]]], hit_s: float
) -> Figure:
    epochs = "both epochs" if how == "told" else "the first epoch"
    return Figure(
        name=f"{NAME}-{how}",
        what=f"share of {epochs} that {LOADERS} loaders wait, order {how}: {SHARE:.0%} of the set cached,"
        f" lake {LATENCY_S * 1000:.0f} ms away with {HEADROOM:g} times what they consume",
        unit="share",
        ours=shares,
        target=Target(at_most=at_most),
        notes={
            f"each epoch of each round, order {mode}": [[round(x, 4) for x in one[mode]] for one in rounds]
            for mode in (how, "unknown")
        }
        | {"a read of a cached file, ms, is no waiting": round(hit_s * 1000, 3)},
    )


def _round(
    settings: Settings, endpoint: Endpoint, keys: Sequence[str], hit_s: float, number: int
) -> dict[str, list[float]]:
    """Return what share of each epoch was waited for, by how the order is known; who begins changes."""
    modes = ["told", "found", "unknown"]
    modes = modes[number % 3 :] + modes[: number % 3]
    return {mode: _epochs(settings, endpoint, keys, mode, hit_s, number) for mode in modes}


def _epochs(
    settings: Settings, endpoint: Endpoint, keys: Sequence[str], mode: str, hit_s: float, number: int
) -> list[float]:
    size_bytes = max(TIER_BYTES_MIN, int(SHARE * len(keys) * charged_bytes()))
    with settings.directory("tier") as tier:
        options = [f"--cache={tier}:{size_bytes}", "--dram=0", "--keep-free=0"]
        with settings.mounted(endpoint, options) as mount:
            files = _listed(mount)
            if mode == "told":
                _tell(mount, settings.work)
            shares = []
            for epoch in range(EPOCHS):
                waited_s, took_s = _epoch(_order(files, mode, number, epoch))
                shares.append(max(0.0, waited_s - hit_s * len(files)) / (took_s * LOADERS))
                shown = mount.status()["sets"]
                names = [f"{one['order']}, {one['wasted_bytes'] // FILE_BYTES} wasted" for one in shown]
                progress(f"{NAME}: {mode}: epoch {epoch + 1}: {shares[-1]:.2%} ({'; '.join(names)})")
    return shares


def _listed(mount: Mounted) -> list[str]:
    return sorted(str(file) for file in mount.directory.glob("*/*"))


def _order(files: Sequence[str], mode: str, number: int, epoch: int) -> list[str]:
    """Return the files as torch's samplers shuffle them, or as nobody can know."""
    from cache.policy.order.spec import Spec

    known = mode != "unknown"
    seed = SEED if known else 10**12 + number * EPOCHS + epoch
    places = Spec("torch", seed, epoch if known else 0, "reseed").order(len(files))
    return [files[place] for place in places]


def _tell(mount: Mounted, work: Path) -> None:
    hint = work / "hint"
    hint.write_text(f"sampler=torch seed={SEED} advance=reseed\n")
    subprocess.run(
        [sluice_command(), "hint", str(hint), str(mount.directory)], check=True, capture_output=True
    )


def _hit_s(settings: Settings, endpoint: Endpoint, keys: Sequence[str]) -> float:
    """Return the seconds that a read of a cached file takes, at the same pace."""
    few = keys[: len(keys) // 8]
    with settings.mounted(endpoint) as mount:
        files = lakes.paths_below(mount.directory, few)
        for path in files:
            read_past_page_cache(path)
        waited_s, _ = _epoch(files)
        return waited_s / len(files)


def _epoch(order: Sequence[str]) -> tuple[float, float]:
    """Read all, as loaders do that take batches in turn; return the seconds in reads, and in all."""
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    read_s: Any = get_context("fork").Array("d", LOADERS)

    def prepare(loader: int) -> Callable[[], int]:
        return lambda: _load(batches[loader::LOADERS], loader, read_s)

    took_s = readers.timed(prepare, range(LOADERS), len(order) * FILE_BYTES)
    return sum(read_s), took_s


def _load(batches: Sequence[Sequence[str]], loader: int, read_s: Any) -> int:
    compute_s = LOADERS * BATCH / RATE
    time.sleep(compute_s * loader / LOADERS)  # Nobody starts all of them at the same moment.
    size_bytes = 0
    for batch in batches:
        began_s = time.perf_counter()
        size_bytes += sum(map(read_past_page_cache, batch))
        read_s[loader] += time.perf_counter() - began_s
        time.sleep(compute_s)
    return size_bytes
