"""How the values of options are read: each parser returns the value, or says what is wrong and the mend."""

from __future__ import annotations

import grp
import math
import os
import pwd
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cache.config import CacheDirectory, parse_size
from cache.model import GIB, KIB, MIB

TIER_BYTES_MIN = 64 * MIB  # Eight small objects: with less, a tier only moves bytes to and fro.
DRAM_BYTES_DEFAULT_MAX = 4 * GIB


@dataclass(frozen=True, slots=True)
class Kind:
    """How a value is read. *parse* raises ValueError("what is wrong; the mend")."""

    parse: Callable[[str], Any]
    toml_types: tuple[type, ...]
    wanted: str  # "a number of seconds": ends the sentence "must be …".


def format_size(size_bytes: float) -> str:
    """Return "1.5 GiB" for people."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size_bytes) < KIB:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= KIB
    return f"{size_bytes:.1f} PiB"


def number(convert: Callable[[str], float], wanted: str, least: float, most: float, unit: str) -> Kind:
    span = f"from {least:.10g} to {most:.10g}{unit}"

    def parse(text: str) -> float:
        try:
            number = convert(text)
        except ValueError:
            raise ValueError(f"not {wanted}; give one {span}") from None
        if not math.isfinite(number) or not least <= number <= most:
            raise ValueError(f"must be {span}")
        return number

    return Kind(parse, (int,) if convert is int else (int, float), wanted)


def seconds(least: float, most: float) -> Kind:
    return number(float, "a number of seconds", least, most, " seconds")


def count(least: int, most: int) -> Kind:
    return number(int, "a whole number", least, most, "")


def choice(*names: str) -> Kind:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return text

    return Kind(parse, (str,), f"one of {', '.join(names)}")


def parse_cache(text: str) -> CacheDirectory:
    path, colon, size = text.rpartition(":")
    if not colon or "/" in size:  # The colon, if any, belongs to the path.
        path, size_bytes = text, None
    else:
        size_bytes = parse_size(size)
        if size_bytes < TIER_BYTES_MIN:
            raise ValueError(f"{size} is too small for a cache; give at least {format_size(TIER_BYTES_MIN)}")
    return CacheDirectory(parse_path(path), size_bytes)


def parse_path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError("no path; give one")
    return Path(text).expanduser().resolve()


def _parse_dram(text: str) -> int:
    size_bytes = parse_size(text)
    if 0 < size_bytes < TIER_BYTES_MIN:
        raise ValueError(f"too small for a tier; give 0 for none, or at least {format_size(TIER_BYTES_MIN)}")
    if size_bytes > (memory := memory_bytes()):
        raise ValueError(f"more than the memory there is; give less than {format_size(memory)}")
    return size_bytes


def _parse_word(text: str) -> str:
    if not re.fullmatch(r"[\w.@:/+=-][\w.@:/+= -]*", text):
        raise ValueError("not a usable name; letters, digits and . _ - are")
    return text


def parse_endpoint(text: str) -> str:
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise ValueError("no endpoint URL; write it like https://host or http://host:9000")
    return text.rstrip("/")


def _parse_owner(find: Callable[[str], int], what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if re.fullmatch(r"\d{1,10}", text) and int(text) < 2**32 - 1:
            return int(text)
        try:
            return find(text)
        except (KeyError, ValueError):
            raise ValueError(f"no {what} of this machine; give a number or a name that `id` knows") from None

    return parse


def _parse_flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("takes no value; write just the option, or true or false in the file")
    return text == "true"


def _parse_durability(text: str) -> tuple[str, str]:
    """Return (pattern, "local" or "remote"); the pattern is "" for all paths."""
    pattern, _, value = text.rpartition("=")
    if value not in ("local", "remote"):
        raise ValueError("must be local or remote, or PATTERN=local or PATTERN=remote")
    return pattern.strip("/"), value


def _parse_dirty(text: str) -> int:
    size_bytes = parse_size(text)
    if size_bytes < TIER_BYTES_MIN:
        raise ValueError(f"too small for write-back; give at least {format_size(TIER_BYTES_MIN)}")
    return size_bytes


def _parse_bandwidth(text: str) -> int:
    size_bytes = parse_size(text)
    if size_bytes < 64 * KIB:
        raise ValueError("too little to end any upload; give at least 64K")
    return size_bytes


SIZE = Kind(parse_size, (str, int), "a size such as 100G")
FLAG = Kind(_parse_flag, (bool,), "true or false")
WORD = Kind(_parse_word, (str,), "a text")
DRAM = Kind(_parse_dram, (str, int), "a size such as 4G")
DURABILITY = Kind(_parse_durability, (str,), "local or remote, or a list of PATTERN=local or PATTERN=remote")
DIRTY = Kind(_parse_dirty, (str, int), "a size such as 100G")
BANDWIDTH = Kind(_parse_bandwidth, (str, int), "a size such as 100M")
PATH = Kind(parse_path, (str,), "a path")
CACHE = Kind(parse_cache, (str,), "a directory with or without a size, or a list of them")
UID = Kind(_parse_owner(lambda name: pwd.getpwnam(name).pw_uid, "user"), (int, str), "a user")
GID = Kind(_parse_owner(lambda name: grp.getgrnam(name).gr_gid, "group"), (int, str), "a group")
LOG_LEVEL = choice("debug", "info", "warning", "error")


def parse_lake(text: str, *, relaxed: bool) -> str:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme is None:
        path = parse_path(text)
        if not path.is_dir():
            raise ValueError("no such directory; give a directory, or s3://bucket[/prefix]")
        if not os.access(path, os.R_OK | os.X_OK):
            raise ValueError("the directory can't be read; mend its permissions")
        return str(path)
    if scheme[1] != "s3":
        raise ValueError(
            f"lakes of scheme {scheme[1]}:// are not known; give s3://bucket[/prefix] or a directory"
        )
    bucket, _, prefix = text.removeprefix("s3://").partition("/")
    _check_bucket(bucket, relaxed=relaxed)
    prefix = prefix.rstrip("/")
    if prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/")):
        raise ValueError("the prefix has an empty part, '.' or '..'; write it like s3://bucket/a/b")
    return f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"


def _check_bucket(bucket: str, *, relaxed: bool) -> None:
    """Raise ValueError unless S3 may have such a bucket (S3 User Guide, "Bucket naming rules").

    *relaxed*: another server's rules, which also allow capitals and underscores.
    """
    if not bucket:
        raise ValueError("no bucket; write it like s3://bucket/prefix")
    pattern = r"[A-Za-z0-9][\w.-]{1,253}[A-Za-z0-9]" if relaxed else r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
    address = re.fullmatch(r"(\d+\.){3}\d+", bucket)
    if not re.fullmatch(pattern, bucket, re.ASCII) or ".." in bucket or address:
        raise ValueError(f"{bucket!r} is no bucket name: 3 to 63 of a-z, 0-9, '-' and '.'; mend the URL")


def memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or less by its control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        limit = Path("/sys/fs/cgroup", group, "memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def dram_bytes_default() -> int:
    eighth = memory_bytes() // 8
    return min(eighth, DRAM_BYTES_DEFAULT_MAX) if eighth >= TIER_BYTES_MIN else 0
