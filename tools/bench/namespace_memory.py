"""Private memory of all processes while and after `find` goes through a million keys.

The lake is tools/bench/list_server.py: storing a million objects in a real server takes ten minutes.
"""

from __future__ import annotations

import itertools

from tools.bench import memory
from tools.bench.figures import Figure, Target, progress
from tools.bench.find import find
from tools.bench.list_server import list_server
from tools.bench.settings import Settings

NAME = "namespace-memory"
KEYS = 1_000_000
PREFIXES = 1000
MEMORY_BYTES_MAX = 400_000_000


def measure(settings: Settings) -> list[Figure]:
    keys = settings.scaled(KEYS, least=PREFIXES)
    flat = _measure(settings, f"{NAME}-flat", keys, keys, "in one prefix")
    tree = _measure(settings, f"{NAME}-tree", keys, keys // PREFIXES, f"over {PREFIXES:,} prefixes")
    return [flat, tree]


def _measure(settings: Settings, name: str, keys: int, folder: int, where: str) -> Figure:
    progress(f"{name}: finding {keys:,} keys {where}")
    with list_server(keys, folder) as endpoint, settings.mounted(endpoint) as mount:
        pids = list(itertools.chain(*mount.pids().values()))
        before = memory.of_processes(pids)
        with memory.PeakSampler(lambda: pids, interval_s=0.1) as peak:
            first_s = find(mount.directory, keys)
            again_s = find(mount.directory, keys)
        after = memory.of_processes(pids)
    return Figure(
        name=name,
        what=f"peak private memory of all processes, `find -type f` twice over {keys:,} keys {where}",
        unit="bytes",
        ours=[float(peak.private_bytes_max)],
        target=Target(at_most=MEMORY_BYTES_MAX),
        notes={
            "anonymous memory alone, peak, bytes": peak.anonymous_bytes_max,
            "before and afterwards, private bytes": [before.private_bytes, after.private_bytes],
            "find, first and second time (which lists again if past the ttl), s": [
                round(first_s, 2),
                round(again_s, 2),
            ],
        },
    )
