"""One large file loaded by page faults, as safetensors loads: several threads, a tensor each at a time.

The baseline is the client library by itself, see `tools/bench/sequential.py`: it stores nothing, and nobody
faults pages in.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from cache.model import GIB, MIB
from tools.bench import lakes, readers, sequential
from tools.bench.figures import Figure, Target, alternate, progress
from tools.bench.settings import Settings

NAME = "mapped-load"
OBJECT_BYTES = GIB
TENSORS = 96
THREADS = 4
LATENCY_S = 0.020


def measure(settings: Settings) -> list[Figure]:
    size_bytes = settings.scaled(OBJECT_BYTES, least=64 * MIB)
    fetched: list[float] = []
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as direct:
        progress(f"{NAME}: making an object of {size_bytes / MIB:,.0f} MiB")
        lakes.fill(direct, {sequential.KEY: size_bytes})
        with lakes.slowed(direct, LATENCY_S) as (endpoint, proxy):

            def ours(_: int) -> float:
                with settings.mounted(endpoint) as mount:
                    share = (str(mount.directory / sequential.KEY), size_bytes)
                    took_s = readers.timed(prepare_mapped, [share], size_bytes)
                    fetched.append(mount.status()["lake_io"]["bytes_fetched"] / size_bytes)
                return size_bytes / MIB / took_s

            def baseline(_: int) -> float:
                share = (endpoint, size_bytes)
                return size_bytes / MIB / readers.timed(sequential.prepare_ranges, [share], size_bytes)

            rates = alternate(ours, baseline, settings.rounds, NAME)
    return [
        Figure(
            name=NAME,
            what=f"cold load of {size_bytes / MIB:,.0f} MiB by page faults, {TENSORS} tensors,"
            f" {THREADS} threads, {LATENCY_S * 1000:.0f} ms to first byte",
            unit="MiB/s",
            ours=rates[0],
            target=Target(at_least=0.7),
            baseline_name=f"obstore, {sequential.RANGES_AT_ONCE} ranges of"
            f" {sequential.RANGE_BYTES // MIB} MiB at a time",
            baseline=rates[1],
            notes={
                "bytes fetched over the file's": [round(each, 3) for each in fetched],
                "latency from": proxy,
            },
        )
    ]


def prepare_mapped(share: tuple[str, int]) -> Callable[[], int]:
    """Return what copies each tensor of the mapped file, several at a time, and returns the bytes."""
    import numpy as np

    path, size_bytes = share
    bounds = [size_bytes * number // TENSORS for number in range(TENSORS + 1)]

    def work() -> int:
        mapped = np.memmap(path, np.uint8, "r")

        def load(number: int) -> int:
            part = mapped[bounds[number] : bounds[number + 1]]
            tensor = np.empty(len(part), np.uint8)
            np.copyto(tensor, part)  # Lets go of the interpreter's lock meanwhile.
            return len(tensor)

        with ThreadPoolExecutor(THREADS) as pool:
            return sum(pool.map(load, range(TENSORS)))

    return work
