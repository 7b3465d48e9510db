"""How each peer is mounted: its command lines, as its own documentation advises for such work.

README, "Measuring it", says why each option is there. Nothing here runs anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cache.model import MIB
from tools.bench.figures import MeasurementFailed
from tools.bench.lakes import BUCKET, Endpoint

JUICEFS_BUCKET = "juicefs"  # Its chunks are no files of ours: they get a bucket of their own.
LONG = "86400s"  # How long names are believed: nobody else changes the lake.


# s3fs 1.90 ends at once where its cache's disk has no room for all the parts that may be under way.
S3FS_PARTS, S3FS_PARTS_TIGHT = (16, 16), (4, 10)  # How many, of so many MB.
S3FS_DISK_BYTES = 16 * MIB  # What ext4 needs for itself.


class NotApplicable(MeasurementFailed):
    """This peer can't take part in this contest. The text says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a peer is to be mounted for. *home* is a directory of its own."""

    programs: Path
    home: Path
    direct: Endpoint
    endpoint: Endpoint
    budget_bytes: int
    writable: bool
    upload_delay_s: int = 0
    is_tight: bool = False  # The files don't all fit into the budget.

    @property
    def mountpoint(self) -> Path:
        return self.home / "data"

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    def program(self, name: str) -> str:
        """Return the installed program, or its bare name for one that the system has."""
        installed = self.programs / "bin" / name
        return str(installed) if installed.exists() else name


@dataclass(frozen=True, slots=True)
class Recipe:
    """*prepare* runs once, *mount* stays in the foreground. *load*: mounts to copy files in; (): none needed.

    *unsent* runs to ask what is not in the lake yet, and its output is empty or `is_sent` once nothing is.
    """

    mount: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # Written into home, for the owner alone.
    prepare: Sequence[Sequence[str]] = ()
    clean_up: Sequence[Sequence[str]] = ()  # Runs at the end, whatever happened.
    load: Sequence[str] = ()
    unsent: Sequence[str] = ()
    is_sent: Callable[[str], bool] = lambda said: True


def juicefs(request: Request, eviction: str = "2-random") -> Recipe:
    """Return JuiceFS with badger: in a trial it created 800 files/s with it, 420 with sqlite3."""
    program, meta = request.program("juicefs"), f"badger://{request.home}/meta"
    server = request.direct

    def mount(endpoint: Endpoint, *options: str) -> list[str]:
        return [
            program, "mount", "--no-usage-report", "--no-syslog", "--hide-internal",
            "--metrics=127.0.0.1:0", "--backup-meta=0",
            f"--bucket={endpoint.url}/{JUICEFS_BUCKET}", f"--cache-dir={request.cache}",
            f"--cache-size={request.budget_bytes // MIB}M", "--free-space-ratio=0.01",
            f"--cache-eviction={eviction}", "--buffer-size=1024", f"--open-cache={LONG}",
            f"--attr-cache={LONG}", f"--entry-cache={LONG}", f"--dir-entry-cache={LONG}", "--readdir-cache",
            *options, meta, str(request.mountpoint),
        ]  # fmt: skip

    writing = ["--writeback", f"--upload-delay={request.upload_delay_s}s"] if request.writable else []
    access = ["--access-key", server.access_key, "--secret-key", server.secret_key]
    bucket = f"{server.url}/{JUICEFS_BUCKET}"
    volume = request.home.name
    return Recipe(
        mount=mount(request.endpoint, *writing),
        prepare=[
            [program, "format", "--storage=s3", f"--bucket={bucket}", *access, "--trash-days=0", meta, volume]
        ],
        load=mount(server),
        unsent=["cat", str(request.mountpoint / ".stats")],
        is_sent=juicefs_has_sent,
    )


def juicefs_has_sent(stats: str) -> bool:
    """Return whether its `.stats` has no block in staging."""
    return all(
        float(line.split()[1]) == 0
        for line in stats.splitlines()
        if line.startswith("juicefs_staging_blocks")
    )


def rclone(request: Request) -> Recipe:
    lake, socket = request.endpoint, "rc.sock"  # In home: a whole path may be too long for a socket
    names = {
        "TYPE": "s3", "PROVIDER": "SeaweedFS", "ENDPOINT": lake.url, "REGION": lake.region,
        "LIST_VERSION": "2",
        "ACCESS_KEY_ID": lake.access_key, "SECRET_ACCESS_KEY": lake.secret_key,
    }  # fmt: skip
    program = request.program("rclone")
    delay = (
        f"{request.upload_delay_s}s" if request.upload_delay_s else "100ms"
    )  # With 0 it never sends (1.75).
    return Recipe(
        mount=[
            program, "mount", f"lake:{BUCKET}", str(request.mountpoint), "--config=/dev/null",
            "--vfs-cache-mode=full", f"--cache-dir={request.cache}",
            f"--vfs-cache-max-size={request.budget_bytes}B", f"--vfs-cache-max-age={LONG}",
            "--vfs-cache-poll-interval=1s", f"--dir-cache-time={LONG}", f"--attr-timeout={LONG}",
            "--poll-interval=0", "--vfs-fast-fingerprint", "--no-checksum", "--use-server-modtime",
            "--vfs-read-chunk-size=16M", "--vfs-read-chunk-streams=8", "--transfers=16",
            f"--vfs-write-back={delay}", "--rc", "--rc-no-auth",
            f"--rc-addr=unix://{socket}",
        ],
        environment={f"RCLONE_CONFIG_LAKE_{name}": value for name, value in names.items()},
        unsent=[program, "rc", f"--unix-socket={socket}", "vfs/stats"],
        is_sent=rclone_has_sent,
    )  # fmt: skip


def rclone_has_sent(stats: str) -> bool:
    """Return whether what `vfs/stats` says has no upload queued or under way. Raises ValueError."""
    cache = json.loads(stats)["diskCache"]
    return not cache["uploadsInProgress"] and not cache["uploadsQueued"]


def s3fs(request: Request) -> Recipe:
    """Return s3fs. Its cache takes what the disk has, so a tight budget is a file system of that size."""
    keys, lake = f"{request.endpoint.access_key}:{request.endpoint.secret_key}\n", request.endpoint
    parts, part_mb = S3FS_PARTS_TIGHT if request.is_tight else S3FS_PARTS
    options = [
        f"url={lake.url}", f"endpoint={lake.region}", "use_path_request_style", "listobjectsv2",
        f"passwd_file={request.home / 'passwd'}", f"use_cache={request.cache}",
        "kernel_cache", "max_stat_cache_size=2000000", f"stat_cache_expire={LONG[:-1]}",
        "enable_noobj_cache", "multireq_max=64", "dbglevel=err",
        f"parallel_count={parts}", f"multipart_size={part_mb}",
    ]  # fmt: skip
    words = [word for option in options for word in ("-o", option)]
    image, cache = str(request.home / "cache.img"), str(request.cache)
    disk = [
        ["truncate", f"--size={request.budget_bytes + S3FS_DISK_BYTES}", image],
        ["mkfs.ext4", "-q", "-F", "-m", "0", image],
        ["mkdir", "-p", cache],
        ["mount", "-o", "loop", image, cache],
    ]
    return Recipe(
        mount=["s3fs", BUCKET, str(request.mountpoint), "-f", *words],
        files={"passwd": keys},
        prepare=disk if request.is_tight else (),
        clean_up=[["umount", cache]] if request.is_tight else (),
    )


def weed(request: Request) -> Recipe:
    """Return SeaweedFS's mount. Raises NotApplicable where the lake is behind a proxy of S3."""
    if not request.endpoint.filer:
        raise NotApplicable("`weed mount` speaks gRPC with its own server, not S3 with this one")
    writing = ["-writebackCache"] if request.writable else ["-readOnly"]
    return Recipe(
        mount=[
            request.program("weed"), "mount", f"-filer={request.endpoint.filer}",
            f"-filer.path=/buckets/{BUCKET}", f"-dir={request.mountpoint}", f"-cacheDir={request.cache}",
            f"-cacheCapacityMB={request.budget_bytes // MIB}", f"-cacheMetaTtlSec={LONG[:-1]}",
            "-chunkSizeLimitMB=8", "-dirIdleEvictSec=0", *writing,
        ],
        environment={"HOME": str(request.home)},
    )  # fmt: skip


PEERS: Mapping[str, Callable[[Request], Recipe]] = {
    "juicefs": juicefs,
    "juicefs-none": lambda request: juicefs(request, "none"),
    "rclone": rclone,
    "s3fs": s3fs,
    "weed": weed,
}
# Eviction tells only where the cache is too small, so there alone both of JuiceFS's modes are measured.
PEERS_DEFAULT = ("juicefs", "rclone", "s3fs", "weed")
