"""Configuration: frozen, complete, checked once at the edge (`tools/options.py`)."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cache.errors import UsageError
from cache.model import GIB, KIB, MIB

_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB, "P": 1024**2 * GIB}


def parse_size(text: str) -> int:
    """Return bytes for "10G", "512MiB", "1.5T" or "4096" (powers of 1024). Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size; write it like 512M, 100G or 1.5T")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True, slots=True)
class LakeConfig:
    """Where the lake is and how to sign in. None leaves the choice to boto3's own chain."""

    url: str  # "s3://bucket[/prefix]" or an absolute directory path.
    endpoint_url: str | None = None
    aws_profile: str | None = None
    region: str | None = None
    anonymous: bool = False
    path_style: bool | None = None  # None: path style when an endpoint URL is given.
    ca_bundle: Path | None = None
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 20.0

    @property
    def is_s3(self) -> bool:
        return self.url.startswith("s3://")

    @property
    def identity(self) -> str:
        """Name the lake so that a cache directory is never used for two."""
        return f"{self.endpoint_url or ''} {self.url}".strip()


@dataclass(frozen=True, slots=True)
class CacheDirectory:
    """One NVMe tier. *size_bytes* None: half of what is free when the mount starts."""

    path: Path
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MountConfig:
    lake: LakeConfig
    mountpoint: Path
    caches: tuple[CacheDirectory, ...]  # At least one; the first also holds index, lock and log.
    dram_bytes: int = 0  # 0: no DRAM tier.
    read_only: bool = False
    durability: tuple[tuple[str, str], ...] = ()  # (pattern, "local" or "remote"); the first that fits.
    durability_default: str = "local"
    dirty_bytes_max: int | None = None  # None: half of what is free when the mount starts.
    upload_delay_s: float = 2.0  # A closed file is quiet for so long before it is sent,
    upload_open_delay_s: float = 30.0  # and one that is open for writing for so long.
    upload_threads: int = 8
    upload_bandwidth: int | None = None  # Bytes a second; None: all there is.
    immutable: bool = False  # Objects never change: never revalidate.
    ttl_s: float = 60.0
    workers: int = 1  # 0: everything in one process.
    policy: str = "auto"  # Or "epoch", "lru".
    read_ahead: str = "set"  # Or "file" (only within large files), "none".
    profile: str = "auto"  # Or "dataset" (open(2) sends no request), "checkpoint" (it does).
    passthrough: str = (
        "auto"  # Cached files. Or "all": staging files too; or "off": Python answers every read.
    )
    allow_other: bool = False
    uid: int = 0  # Owner shown for every file.
    gid: int = 0
    retry_s: float = 30.0  # How long a request to a failing lake is retried before EIO.
    fetch_threads: int = 32
    free_space_min_bytes: int = GIB  # Kept free on the disk of each NVMe tier.
    foreground: bool = False
    log_file: Path | None = None  # None: "log" in the first cache directory.
    log_level: str = "info"

    @property
    def index_directory(self) -> Path:
        return self.caches[0].path


def default_cache_path(lake: LakeConfig) -> Path:
    """Return where the cache goes when no --cache is given: one directory for each lake."""
    name = hashlib.blake2b(lake.identity.encode(), digest_size=6).hexdigest()
    if os.geteuid() == 0:
        return Path("/var/cache/sluice") / name
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "sluice" / name


def check_runnable(config: MountConfig) -> None:
    """Raise UsageError for combinations that no single option's check can see."""
    if not config.caches:
        raise UsageError("--cache: at least one cache directory is needed; give --cache DIR[:SIZE]")
    seen: set[Path] = set()
    for directory in config.caches:
        if directory.path in seen:
            raise UsageError(f"--cache {directory.path}: given twice; name each directory once")
        seen.add(directory.path)
        if config.mountpoint == directory.path or config.mountpoint in directory.path.parents:
            raise UsageError(
                f"--cache {directory.path}: lies inside the mount point {config.mountpoint};"
                " choose a directory outside of it"
            )
