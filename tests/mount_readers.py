"""Processes that read a mount and compare every byte with the lake's directory. Run as a module.

`Readers` starts and ends them; `python -m tests.mount_readers MOUNT LAKE SEED THREADS` is one, which
reads until its standard input ends and then prints how often it read.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LENGTHS = (1, 5000, 110_000, 131_072, 400_000, 3_000_000)


class Failed(AssertionError):
    """A read failed or returned a wrong byte. The text says which."""


class Readers:
    """*processes* processes of *threads* threads each; all are gone when the block ends."""

    def __init__(self, mount: Path, lake: Path, seed: int, *, processes: int = 2, threads: int = 3) -> None:
        command = [sys.executable, "-m", "tests.mount_readers", str(mount), str(lake)]
        self._running = [
            subprocess.Popen(
                [*command, str(seed + number * 100), str(threads)],
                cwd=Path(__file__).parent.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(processes)
        ]

    def finish(self) -> int:
        """Stop them and return how many reads there were. Raises Failed."""
        said = [process.communicate(timeout=60) for process in self._running]
        wrong = [
            errors for process, (_, errors) in zip(self._running, said, strict=True) if process.returncode
        ]
        if wrong:
            raise Failed("\n".join(wrong))
        return sum(int(out) for out, _ in said)

    def check_alive(self) -> None:
        if any(process.poll() is not None for process in self._running):
            self.finish()

    def kill(self) -> None:
        for process in self._running:
            process.kill()
            process.communicate()


@contextmanager
def readers(mount: Path, lake: Path, seed: int, *, processes: int = 2, threads: int = 3) -> Iterator[Readers]:
    running = Readers(mount, lake, seed, processes=processes, threads=threads)
    try:
        yield running
    finally:
        running.kill()


def read_on(mount: Path, lake: Path, seed: int, stop: threading.Event, wrong: list[str]) -> int:
    """Read random places of random files until *stop*, half of the time past the page cache."""
    roll, reads = random.Random(seed), 0
    names = sorted(str(path.relative_to(lake)) for path in lake.rglob("*") if path.is_file())
    while not stop.is_set() and not wrong:
        name, what = roll.choice(names), "open"
        try:
            with open(mount / name, "rb", buffering=0) as file, open(lake / name, "rb", buffering=0) as truth:
                size = os.fstat(truth.fileno()).st_size
                for _ in range(3):
                    offset, length = roll.randrange(size), roll.choice(LENGTHS)
                    what = f"read {length} at {offset}"
                    if roll.random() < 0.5:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    if os.pread(file.fileno(), length, offset) != os.pread(truth.fileno(), length, offset):
                        wrong.append(f"seed {seed}, read {reads}: {name}: {what}: wrong bytes")
                    reads += 1
        except OSError as error:
            wrong.append(f"seed {seed}, read {reads}: {name}: {what}: {error}")
    return reads


def stop_at_the_end_of_input(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


def main(mount: Path, lake: Path, seed: int, threads: int) -> int:
    stop, counts = threading.Event(), [0] * threads
    wrong: list[str] = []

    def run(number: int) -> None:
        counts[number] = read_on(mount, lake, seed + number, stop, wrong)

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    threading.Thread(target=stop_at_the_end_of_input, args=(stop,), daemon=True).start()
    for thread in running:
        thread.join()
    print("\n".join(wrong), file=sys.stderr)
    print(sum(counts))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
