"""What all benchmarks of one run share."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tools.bench.figures import MeasurementFailed, progress
from tools.bench.lakes import BUCKET, Endpoint
from tools.mounted import Mounted


@dataclass(frozen=True, slots=True)
class Settings:
    work: Path  # Everything on disk goes below it.
    scale: float = 1.0  # Factor for counts and sizes; the figures are defined for 1.
    rounds: int = 5
    mount_options: Sequence[str] = ()  # Given to every `sluice mount`.
    peers: Sequence[str] = ()  # Those of tools.bench.peers to measure, too.
    programs: Path | None = None  # The directory with the peers' programs.
    complaints: list[str] = field(default_factory=list)  # What could not be measured, a line each.
    commands: dict[str, str] = field(default_factory=dict)  # How each side was mounted, for the report.
    _serial: Iterator[int] = field(default_factory=itertools.count)

    def complain(self, text: str) -> None:
        """Note that something could not be measured. The same is noted once."""
        line = " ".join(text.split())
        if line not in self.complaints:
            self.complaints.append(line)
            progress(line)

    def scaled(self, count: int, least: int = 1) -> int:
        return max(least, round(count * self.scale))

    @contextmanager
    def directory(self, name: str) -> Iterator[Path]:
        """Yield a new directory that is removed at the end."""
        path = self.work / f"{name}-{next(self._serial)}"
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def mounted(
        self, endpoint: Endpoint, options: Sequence[str] = (), *, writable: bool = False
    ) -> Iterator[Mounted]:
        """Yield the bucket, freshly mounted with an empty cache; both are gone at the end."""
        access = "--no-read-only" if writable else "--read-only"
        with self.directory("mount") as path:
            lake_options = [f"--endpoint-url={endpoint.url}", access, *options, *self.mount_options]
            environment = endpoint.environment()
            with Mounted(f"s3://{BUCKET}", path / "data", path / "cache", lake_options, environment) as mount:
                yield mount


def drop_page_cache() -> None:
    """Have the kernel forget the bytes of all files, so that the next reads come from the disk.

    Names and attributes stay known, as in the epochs that follow each other. Raises MeasurementFailed where
    only root may.
    """
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError as error:
        raise MeasurementFailed(f"the page cache can't be dropped: {error.strerror}; run as root") from error


def sources(mount: Mounted) -> Mapping[str, int]:
    """Return the bytes that reads got so far, by source."""
    by_source: Mapping[str, int] = mount.status()["reads"]["bytes_by_source"]
    return by_source
