"""How soon the order of a shuffle is found, and what the search costs."""

from __future__ import annotations

import time
from itertools import islice

from tools.bench.figures import Figure, Target, progress
from tools.bench.loaders import opens
from tools.bench.settings import Settings

NAME = "order-found"
FILES = 50_000
RUNS = 100


def measure(settings: Settings) -> list[Figure]:
    from cache.policy.order.spec import Spec

    files, runs = settings.scaled(FILES), max(1, settings.scaled(RUNS))
    paths = [b"class%04d/image_%06d.jpg" % (file // 50, file) for file in range(files)]
    order = Spec("torch", 0).order(files).tolist()
    progress(f"{NAME}: {runs} runs over {files:,} files")
    tried = [_run(order, paths, seed) for seed in range(runs)]
    what = f"DistributedSampler, default seed, 2 ranks x 4 workers, {files:,} files, {runs} runs"
    soon = 100 * sum(needed <= 64 for needed, _ in tried) / runs
    needed = sorted(needed for needed, _ in tried)
    return [
        Figure(
            name=f"{NAME}-soon",
            what=f"order found within 64 opens: {what}",
            unit="%",
            ours=[soon],
            target=Target(at_least=99),
            notes={"opens_median": needed[runs // 2], "opens_most": needed[-1]},
        ),
        Figure(
            name=f"{NAME}-cost",
            what=f"processor time of all searches of an epoch: {what}",
            unit="s",
            ours=[spent_s for _, spent_s in tried],
            target=Target(at_most=0.2),
            notes={"most": round(max(spent_s for _, spent_s in tried), 3)},
        ),
    ]


def _run(order: list[int], paths: list[bytes], seed: int) -> tuple[int, float]:
    """Return after how many opens the right order was found (or 10,000), and the seconds of work."""
    from cache.policy.order.finder import OPENS_MAX, Finder

    finder, opened, spent_s = Finder(len(paths), lambda: paths), list[int](), 0.0
    for file in islice(opens(order, seed), OPENS_MAX):
        opened.append(file)
        if not finder.wants_look(len(opened)):
            continue
        start_s = time.process_time()
        found = finder.find(opened)
        spent_s += time.process_time() - start_s
        if found is not None:
            return (len(opened) if found.files().tolist() == order else 10_000), spent_s
    return 10_000, spent_s
