"""The options of `sluice mount`: one table, from which the command line, the TOML file and fstab are read.

`read()` turns an argument list into a `MountConfig`, or raises UsageError with one line that names
the option, its value and the mend. Precedence: command line, `-o`, file, default.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cache.config import (
    CacheDirectory,
    LakeConfig,
    MountConfig,
    check_runnable,
    default_cache_path,
)
from cache.errors import UsageError
from cache.model import GIB, MIB
from tools import option_kinds as kinds

TIER_BYTES_MIN = 64 * MIB  # Eight small objects: with less, a tier only moves bytes to and fro.
DRAM_BYTES_DEFAULT_MAX = 4 * GIB

# What mount(8) and systemd put into fstab lines and what says nothing to us.
GENERIC_OPTIONS = re.compile(
    r"defaults|auto|noauto|nofail|_netdev|user|nouser|users|owner|group|(no)?exec|(no)?suid|(no)?dev"
    r"|(no)?(dir|rel|strict)?atime|(no)?lazytime|sync|async|dirsync|silent|loud|comment|fsname|subtype|x-.*"
)


@dataclass(frozen=True, slots=True)
class Option:
    name: str  # On the command line after "--", in the TOML file and in fstab alike.
    kind: kinds.Kind
    help: str
    default: str = ""  # As shown in the help.
    metavar: str | None = None  # None: a flag.
    repeatable: bool = False


@dataclass(frozen=True, slots=True)
class Given:
    """A value as somebody wrote it. *mention* starts the error line: "--ttl -5", "a.toml: ttl = -5"."""

    value: str
    mention: str


def check_output(name: str, path: Path) -> None:
    """Raise UsageError unless a file can be written there: before the work whose result it is to hold."""
    if path.is_dir():
        raise UsageError(f"{name} {path}: is a directory; give a file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{name} {path}: its directory does not exist; make it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"{name} {path}: may not be written by this user; name another file")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UsageErrors of one line with the closest option."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message)
        if unknown and not unknown[1].startswith("-"):
            message = f"{unknown[1]}: one argument too many for `{self.prog}`"
        elif unknown:
            near = closest(unknown[1].split("=")[0], list(self._option_string_actions))
            message = f"{unknown[1]}: not an option of `{self.prog}`{near}"
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def closest(word: str, known: Sequence[str]) -> str:
    """Return "; did you mean X?" for the nearest of *known*, or ""."""
    bare = {name.lstrip("-"): name for name in known}
    near = difflib.get_close_matches(word.lstrip("-"), bare, n=1, cutoff=0.6)
    return f"; did you mean {bare[near[0]]}?" if near else ""


_CACHE_DEFAULT = "half of what is free below ~/.cache/sluice (root: /var/cache/sluice)"

OPTIONS = (
    Option(
        "cache",
        kinds.CACHE,
        "cache directory; once for each disk",
        _CACHE_DEFAULT,
        "DIR[:SIZE]",
        repeatable=True,
    ),
    Option("dram", kinds.DRAM, "tier in memory; 0 for none", "an eighth of the memory, at most 4G", "SIZE"),
    Option("read-only", kinds.FLAG, "mount for reading only; opens then cost no request"),
    Option("immutable", kinds.FLAG, "objects never change: never ask the lake again about what is known"),
    Option("ttl", kinds.seconds(0, 365 * 86400), "how long names and sizes are believed", "60", "SECONDS"),
    Option(
        "workers", kinds.count(0, 256), "processes that answer; 0: one for all", "one for each two cores", "N"
    ),
    Option(
        "policy",
        kinds.choice("auto", "epoch", "lru"),
        "what leaves a full cache first; auto: by what is seen, epochs, scans or files read again and again",
        "auto",
        "auto|epoch|lru",
    ),
    Option(
        "read-ahead",
        kinds.choice("none", "file", "set"),
        "file: within large files; set: also the rest of a sample set once an epoch over it is seen",
        "set",
        "none|file|set",
    ),
    Option(
        "profile",
        kinds.choice("auto", "dataset", "checkpoint"),
        "dataset: opens cost no request; checkpoint: an open that meets a changed object looks it up again",
        "auto",
        "auto|dataset|checkpoint",
    ),
    Option(
        "passthrough",
        kinds.choice("auto", "all", "off"),
        "auto: the kernel reads cached files itself; all: it reads and writes staging files, too; off: never",
        "auto",
        "auto|all|off",
    ),
    Option("endpoint-url", kinds.Kind(kinds.parse_endpoint, (str,), "a URL"), "S3 server", "Amazon's", "URL"),
    Option("aws-profile", kinds.WORD, "profile of the AWS configuration", "boto3's choice", "NAME"),
    Option("region", kinds.WORD, "region of the bucket", "boto3's choice", "NAME"),
    Option("anonymous", kinds.FLAG, "sign no request: for public buckets"),
    Option("path-style", kinds.FLAG, "the bucket in the path, not in the host name", "with --endpoint-url"),
    Option("ca-bundle", kinds.PATH, "certificates to trust (PEM)", "boto3's choice", "FILE"),
    Option("connect-timeout", kinds.seconds(0.1, 3600), "limit for connecting to the lake", "5", "SECONDS"),
    Option("read-timeout", kinds.seconds(0.1, 3600), "limit for silence of the lake", "20", "SECONDS"),
    Option(
        "retry", kinds.seconds(0, 86400), "how long a request to a failing lake is repeated", "30", "SECONDS"
    ),
    Option("fetch-threads", kinds.count(1, 1024), "requests to the lake at one time", "32", "N"),
    Option(
        "durability",
        kinds.DURABILITY,
        "when fsync and close return: on this disk, or in the lake; with PATTERN=, for the paths that fit",
        "local",
        "[PATTERN=]local|remote",
        repeatable=True,
    ),
    Option("dirty-max", kinds.DIRTY, "bytes that wait for their upload", "half of what is free", "SIZE"),
    Option(
        "upload-delay", kinds.seconds(0, 86400), "quiet time before a closed file is sent", "2", "SECONDS"
    ),
    Option(
        "upload-open-delay",
        kinds.seconds(0, 86400),
        "quiet time before a file is sent that is still open for writing",
        "30",
        "SECONDS",
    ),
    Option("upload-threads", kinds.count(1, 256), "uploads at one time", "8", "N"),
    Option("upload-bandwidth", kinds.BANDWIDTH, "bytes a second for uploads", "all there is", "SIZE"),
    Option("keep-free", kinds.SIZE, "space left free on the disk of each cache directory", "1G", "SIZE"),
    Option("allow-other", kinds.FLAG, "let other users in"),
    Option("uid", kinds.UID, "owner shown for every file", "yours", "UID"),
    Option("gid", kinds.GID, "group shown for every file", "yours", "GID"),
    Option("foreground", kinds.FLAG, "stay in the foreground and log to standard error"),
    Option("log-file", kinds.PATH, "where to log", '"log" in the first cache directory', "FILE"),
    Option("log-level", kinds.LOG_LEVEL, "what to log", "info", "debug|info|warning|error"),
)
_BY_NAME = {option.name: option for option in OPTIONS}
_POSITIONALS = ("lake", "mountpoint")  # Keys of the TOML file besides the options.


def mount_parser() -> Parser:
    """Return the parser of `sluice mount`, made from the table."""
    parser = Parser(
        prog="sluice mount",
        description="Mount a data lake. Every option is a key of the TOML file and a word for -o, too.",
    )
    parser.add_argument("lake", nargs="?", metavar="LAKE", help="s3://bucket[/prefix] or a directory")
    parser.add_argument("mountpoint", nargs="?", metavar="DIR", help="an empty directory")
    parser.add_argument("--config", metavar="FILE", help="TOML file with options")
    parser.add_argument("-o", action="append", default=[], metavar="OPTIONS", help="as in /etc/fstab")
    for flag in ("-n", "-s", "-v"):  # mount(8) passes them on; they say nothing to us.
        parser.add_argument(flag, action="store_true", dest=f"_{flag}", help=argparse.SUPPRESS)
    for option in OPTIONS:
        text = option.help + (f" (default: {option.default})" if option.default else "")
        text = text.replace("%", "%%")
        if option.metavar is None:
            parser.add_argument(f"--{option.name}", action=argparse.BooleanOptionalAction, help=text)
        else:
            action = "append" if option.repeatable else "store"
            parser.add_argument(f"--{option.name}", action=action, metavar=option.metavar, help=text)
    return parser


def _from_command_line(arguments: argparse.Namespace) -> dict[str, list[Given]]:
    given: dict[str, list[Given]] = {}
    for name in _POSITIONALS:
        if (text := getattr(arguments, name)) is not None:
            given[name] = [Given(text, f"{name} {text!r}")]
    for option in OPTIONS:
        value = getattr(arguments, option.name.replace("-", "_"))
        if isinstance(value, bool):
            given[option.name] = [Given(str(value).lower(), f"--{'' if value else 'no-'}{option.name}")]
        elif value is not None:
            texts = value if isinstance(value, list) else [value]
            given[option.name] = [Given(text, f"--{option.name} {text}") for text in texts]
    return given


def _from_fstab(words: str) -> tuple[dict[str, list[Given]], str | None]:
    """Return the values of an -o list, and its `config` if it has one."""
    given: dict[str, list[Given]] = {}
    config: str | None = None
    for word in re.split(r"(?<!\\),", words):  # libfuse's way to write a comma: backslash, comma.
        word = word.replace("\\,", ",").strip()
        key, equals, value = word.partition("=")
        name = key.replace("_", "-")
        if not word or GENERIC_OPTIONS.fullmatch(key):
            continue
        if name == "config":
            config = value
        elif name in ("ro", "rw"):
            given["read-only"] = [Given(str(name == "ro").lower(), f"-o {name}")]
        elif (option := _BY_NAME.get(name)) is None:
            raise UsageError(f"-o {word}: not an option of SluiceFS{closest(name, list(_BY_NAME))}")
        elif option.metavar is None:
            given[name] = [Given(value if equals else "true", f"-o {word}")]
        elif option.repeatable:
            given.setdefault(name, []).extend(Given(v, f"-o {key}={v}") for v in value.split(";") if v)
        else:
            given[name] = [Given(value, f"-o {word}")]
    return given, config


def _from_file(path: Path) -> dict[str, list[Given]]:
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}; name a readable TOML file") from error
    except ValueError as error:  # Also bytes that are no UTF-8.
        raise UsageError(f"--config {path}: not valid TOML: {error}") from error
    given: dict[str, list[Given]] = {}
    for key, value in table.items():
        known = [*_BY_NAME, *_POSITIONALS]
        if key not in known:
            raise UsageError(
                f"{path}: {key}: unknown key{closest(key, known) or '; see `sluice mount --help`'}"
            )
        given[key] = _from_toml_value(path, key, value)
    return given


def _from_toml_value(path: Path, key: str, value: Any) -> list[Given]:
    option = _BY_NAME.get(key)
    kind = option.kind if option else kinds.WORD
    several = option is not None and option.repeatable and isinstance(value, list)
    items: list[Any] = value if several else [value]
    for item in items:
        wrong_bool = isinstance(item, bool) and bool not in kind.toml_types
        if wrong_bool or not isinstance(item, kind.toml_types):
            raise UsageError(f"{path}: {key} = {item!r}: must be {kind.wanted}")
    texts = [str(item).lower() if isinstance(item, bool) else str(item) for item in items]
    return [Given(text, f"{path}: {key} = {text}") for text in texts]


# --- Checks ------------------------------------------------------------------------------------


class Values:
    """What was given, with the winners only; parsed on request."""

    def __init__(self, given: dict[str, list[Given]]) -> None:
        self._given = given

    def all(self, name: str) -> list[tuple[Any, str]]:
        """Return the parsed values of option *name* with their mentions; empty if it was not given."""
        return [
            (checked(given, _BY_NAME[name].kind.parse), given.mention) for given in self._given.get(name, [])
        ]

    def get(self, name: str, default: Any) -> Any:
        parsed = self.all(name)
        return parsed[-1][0] if parsed else default

    def mention(self, name: str) -> str:
        return self._given[name][-1].mention if name in self._given else f"--{name} (default)"

    def positional(self, name: str, metavar: str) -> Given:
        if name not in self._given:
            raise UsageError(
                f"{metavar} is missing: write `sluice mount LAKE DIR` or `{name} = …` in the file"
            )
        return self._given[name][-1]


def checked(given: Given, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(given.value)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a home or a link without end.
        raise UsageError(f"{given.mention}: {error}") from error


def read(argv: Sequence[str]) -> tuple[MountConfig, Values]:
    """Return the configuration for the arguments after `sluice mount`, and who gave what.

    Each value and their combinations are checked; `tools/mount.py` checks them against the disk.
    Raises UsageError.
    """
    arguments = mount_parser().parse_args(_joined(argv))
    fstab, config = _from_fstab(",".join(arguments.o))
    config = arguments.config or config
    file = _from_file(Path(config).expanduser()) if config is not None else {}
    values = Values({**file, **fstab, **_from_command_line(arguments)})
    return _build(values), values


def _joined(argv: Sequence[str]) -> list[str]:
    """Return *argv* with "--dram", "-1G" made one word: argparse would take the size for an option."""
    words: list[str] = []
    for word in argv:
        if words and re.match(r"-\.?\d", word) and words[-1].removeprefix("--") in _BY_NAME:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _build(values: Values) -> MountConfig:
    lake = _lake(values)
    mountpoint_given = values.positional("mountpoint", "DIR")
    caches = tuple(parsed for parsed, _ in values.all("cache")) or (CacheDirectory(default_cache_path(lake)),)
    durability = [pair for pair, _ in values.all("durability")]
    config = MountConfig(
        lake=lake,
        mountpoint=checked(mountpoint_given, kinds.parse_path),
        caches=caches,
        dram_bytes=values.get("dram", kinds.dram_bytes_default()),
        read_only=values.get("read-only", False),
        durability=tuple(pair for pair in durability if pair[0]),
        durability_default=next((value for pattern, value in reversed(durability) if not pattern), "local"),
        dirty_bytes_max=values.get("dirty-max", None),
        upload_delay_s=values.get("upload-delay", 2.0),
        upload_open_delay_s=values.get("upload-open-delay", 30.0),
        upload_threads=values.get("upload-threads", 8),
        upload_bandwidth=values.get("upload-bandwidth", None),
        immutable=values.get("immutable", False),
        ttl_s=values.get("ttl", 60.0),
        workers=values.get("workers", max(1, len(os.sched_getaffinity(0)) // 2)),
        policy=values.get("policy", "auto"),
        read_ahead=values.get("read-ahead", "set"),
        profile=values.get("profile", "auto"),
        passthrough=values.get("passthrough", "auto"),
        allow_other=values.get("allow-other", False),
        uid=values.get("uid", os.getuid()),
        gid=values.get("gid", os.getgid()),
        retry_s=values.get("retry", 30.0),
        fetch_threads=values.get("fetch-threads", 32),
        free_space_min_bytes=values.get("keep-free", GIB),
        foreground=values.get("foreground", False),
        log_file=values.get("log-file", None),
        log_level=values.get("log-level", "info"),
    )
    check_runnable(config)
    return config


def _lake(values: Values) -> LakeConfig:
    given = values.positional("lake", "LAKE")
    endpoint = values.get("endpoint-url", None)
    lake = LakeConfig(
        url=checked(given, lambda text: kinds.parse_lake(text, relaxed=endpoint is not None)),
        endpoint_url=endpoint,
        aws_profile=values.get("aws-profile", None),
        region=values.get("region", None),
        anonymous=values.get("anonymous", False),
        path_style=values.get("path-style", None),
        ca_bundle=values.get("ca-bundle", None),
        connect_timeout_s=values.get("connect-timeout", 5.0),
        read_timeout_s=values.get("read-timeout", 20.0),
    )
    if lake.anonymous and lake.aws_profile is not None:
        raise UsageError(f"{values.mention('aws-profile')}: contradicts --anonymous; give one of the two")
    if lake.ca_bundle is not None and not lake.ca_bundle.is_file():
        raise UsageError(f"{values.mention('ca-bundle')}: no such file; name a PEM file with certificates")
    return lake
