"""The options of `sluice mount`: what is accepted, from where, and the one line for what is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cache.config import CacheDirectory, MountConfig
from cache.errors import UsageError
from cache.model import GIB, MIB
from tools import cli, mount, options


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a lake, a mount point, a cache directory and things in the way."""
    for name in ("lake/below", "mnt", "cache", "full/entry"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(*argv: str) -> MountConfig:
    """Return the configuration for *argv* on top of a good lake, mount point and cache."""
    config, values = options.read(
        ["lake", "mnt", *([] if "--cache" in argv else ["--cache", "cache"]), *argv]
    )
    mount.check_world(config, values)
    return config


def test_the_defaults_are_those_of_the_help(here: Path) -> None:
    config = build()
    assert (config.lake.url, config.mountpoint) == (str(here / "lake"), here / "mnt")
    assert config.caches == (CacheDirectory(here / "cache", None),)
    assert 0 <= config.dram_bytes <= 4 * GIB
    assert (config.ttl_s, config.policy, config.retry_s, config.fetch_threads) == (60.0, "auto", 30.0, 32)
    assert config.workers >= 1
    assert (config.uid, config.gid) == (os.getuid(), os.getgid())
    assert (config.read_only, config.immutable, config.foreground, config.log_level) == (
        False,
        False,
        False,
        "info",
    )


def test_every_option_reaches_the_configuration(here: Path) -> None:
    (here / "ca.pem").write_text("")
    words = (
        "--cache cache:1G --cache other:64M --dram 64M --read-only --immutable --ttl 5 --workers 3"
        " --policy lru --endpoint-url http://localhost:9000/ --aws-profile me --region eu-1 --path-style"
        " --ca-bundle ca.pem --connect-timeout 1.5 --read-timeout 2 --retry 0 --fetch-threads 7"
        " --durability ckpt/*=remote --durability local --dirty-max 1G --upload-delay 1 --upload-open-delay 9"
        " --upload-threads 3 --upload-bandwidth 1M --keep-free 1M --allow-other --uid 1 --gid 2 --foreground"
        " --log-file log --log-level debug"
    )
    config = build(*words.split())
    assert config.caches == (CacheDirectory(here / "cache", GIB), CacheDirectory(here / "other", 64 * MIB))
    lake = config.lake
    assert (lake.endpoint_url, lake.aws_profile, lake.region) == ("http://localhost:9000", "me", "eu-1")
    assert (lake.path_style, lake.ca_bundle, lake.anonymous) == (True, here / "ca.pem", False)
    assert (lake.connect_timeout_s, lake.read_timeout_s) == (1.5, 2.0)
    assert (config.dram_bytes, config.ttl_s, config.workers, config.policy) == (64 * MIB, 5.0, 3, "lru")
    assert (config.retry_s, config.fetch_threads, config.free_space_min_bytes) == (0.0, 7, MIB)
    assert (config.immutable, config.allow_other, config.foreground) == (True, True, True)
    assert (config.durability, config.durability_default) == ((("ckpt/*", "remote"),), "local")
    assert (config.read_only, config.dirty_bytes_max, config.upload_bandwidth) == (True, GIB, MIB)
    assert (config.upload_delay_s, config.upload_open_delay_s, config.upload_threads) == (1.0, 9.0, 3)
    assert (config.uid, config.gid, config.log_file, config.log_level) == (1, 2, here / "log", "debug")


def test_the_file_takes_the_same_keys_and_the_command_line_wins(here: Path) -> None:
    (here / "a.toml").write_text(
        'lake = "s3://bucket/a/b/"\nmountpoint = "mnt"\ncache = ["cache:1G", "other"]\ndram = 67108864\n'
        'ttl = 5\nretry = 1.5\nanonymous = true\npolicy = "lru"\nuid = 7\n'
    )
    config, _ = options.read(["--config", "a.toml", "--ttl", "9", "--no-anonymous"])
    assert (config.lake.url, config.mountpoint) == ("s3://bucket/a/b", here / "mnt")
    assert [cache.path.name for cache in config.caches] == ["cache", "other"]
    assert (config.ttl_s, config.lake.anonymous) == (9.0, False)
    assert (config.dram_bytes, config.retry_s, config.policy, config.uid) == (64 * MIB, 1.5, "lru", 7)
    (here / "a.toml").write_text('cache = "cache"\n')
    assert build("--config", "a.toml", "--cache", "other").caches == (CacheDirectory(here / "other"),)


def test_fstab_options_are_options_of_the_table_and_generic_ones_are_passed_over(here: Path) -> None:
    generic = "rw,noauto,nofail,_netdev,user,x-systemd.automount,defaults,exec,suid,dev,noatime,relatime"
    config = build(
        "--cache", "cache", "-o", generic, "-o", "ro,allow_other,ttl=7,dram=0,policy=lru,endpoint_url=http://h:1"
    )  # fmt: skip
    assert (config.ttl_s, config.dram_bytes, config.policy, config.allow_other) == (7.0, 0, "lru", True)
    assert config.lake.endpoint_url == "http://h:1"
    config, _ = options.read(["lake", "mnt", "-o", r"cache=one:1G;two,cache=a\,b"])
    assert [cache.path.name for cache in config.caches] == ["one", "two", "a,b"]
    (here / "a.toml").write_text("ttl = 1\nretry = 2\n")
    config = build("-o", "config=a.toml,ttl=3")
    assert (config.ttl_s, config.retry_s) == (3.0, 2.0)


@pytest.mark.parametrize(
    ("text", "path", "size_bytes"),
    [
        ("c", "c", None),
        ("c:100G", "c", 100 * GIB),
        ("c:1.5TiB", "c", 1536 * GIB),
        ("a:b/c", "a:b/c", None),
        ("a:b:1G", "a:b", GIB),
    ],
)
def test_a_cache_is_a_directory_with_or_without_a_size(
    here: Path, text: str, path: str, size_bytes: int | None
) -> None:
    config, _ = options.read(["s3://bucket", "mnt", "--cache", text])
    assert config.caches == (CacheDirectory(here / path, size_bytes),)


# Arguments, and what the line must name: the option, the value, the mend.
BAD_ARGUMENTS = [
    ("", ["LAKE is missing", "sluice mount LAKE DIR"]),
    ("lake", ["DIR is missing", "sluice mount LAKE DIR"]),
    ("lake mnt extra", ["extra"]),
    ("gs://bucket mnt", ["lake", "gs://bucket", "s3://bucket"]),
    ("s3:// mnt", ["lake", "s3://", "no bucket", "s3://bucket/prefix"]),
    ("s3:///prefix mnt", ["no bucket"]),
    ("s3://Big_Bucket mnt", ["Big_Bucket", "no bucket name", "a-z"]),
    ("s3://ab mnt", ["'ab'", "3 to 63"]),
    ("s3://a..b mnt", ["'a..b'"]),
    ("s3://10.0.0.1 mnt", ["'10.0.0.1'"]),
    ("s3://bucket/a//b mnt", ["s3://bucket/a//b", "empty part"]),
    ("absent mnt", ["lake", "absent", "no such directory", "s3://bucket"]),
    ("file mnt", ["lake", "file", "no such directory"]),
    ("lake absent", ["mountpoint", "absent", "no such directory", "mkdir"]),
    ("lake file", ["mountpoint", "file", "not a directory"]),
    ("lake full", ["mountpoint", "full", "not empty"]),
    ("lake /proc", ["/proc", "mounted there already"]),
    ("lake lake/below", ["mountpoint", "lake/below", "inside the lake", "outside"]),
    ("lake mnt --cache mnt/c", ["--cache", "mnt/c", "inside the mount point", "outside"]),
    ("lake mnt --cache lake/c", ["--cache", "lake/c", "inside the lake", "outside"]),
    ("lake mnt --cache c --cache c", ["--cache", "/c", "given twice"]),
    ("lake mnt --cache file", ["--cache file", "not a directory"]),
    ("lake mnt --cache file/below", ["--cache file/below", "not a directory"]),
    ("lake mnt --cache /proc/cache", ["--cache /proc/cache"]),
    ("lake mnt --cache=", ["--cache", "no path"]),
    ("lake mnt --cache c:0", ["--cache c:0", "too small", "64.0 MiB"]),
    ("lake mnt --cache c:63M", ["--cache c:63M", "too small", "64.0 MiB"]),
    ("lake mnt --cache c:-5G", ["--cache c:-5G", "no size", "100G"]),
    ("lake mnt --cache c:big", ["--cache c:big", "no size", "100G"]),
    ("lake mnt --cache c:900P", ["--cache c:900P", "larger than its disk", "at most"]),
    ("lake mnt --dram -1G", ["--dram -1G", "no size", "512M"]),
    ("lake mnt --dram 1M", ["--dram 1M", "too small", "0 for none"]),
    ("lake mnt --dram 900T", ["--dram 900T", "memory", "less than"]),
    ("lake mnt --dram lots", ["--dram lots", "no size"]),
    ("lake mnt --ttl -5", ["--ttl -5", "from 0 to"]),
    ("lake mnt --ttl nan", ["--ttl nan", "from 0 to"]),
    ("lake mnt --ttl soon", ["--ttl soon", "number of seconds"]),
    ("lake mnt --workers 257", ["--workers 257", "from 0 to 256"]),
    ("lake mnt --workers -1", ["--workers -1", "from 0 to 256"]),
    ("lake mnt --workers 1.5", ["--workers 1.5", "whole number"]),
    ("lake mnt --policy fifo", ["--policy fifo", "auto, epoch, lru"]),
    ("lake mnt --endpoint-url localhost:9000", ["--endpoint-url localhost:9000", "http://host:9000"]),
    ("lake mnt --endpoint-url http://", ["--endpoint-url http://", "http://host:9000"]),
    ("lake mnt --endpoint-url http://h:x", ["--endpoint-url http://h:x", "http://host:9000"]),
    ("lake mnt --endpoint-url http://[", ["--endpoint-url http://[", "http://host:9000"]),
    ("lake mnt --aws-profile=", ["--aws-profile", "not a usable name"]),
    ("s3://bucket mnt --anonymous --aws-profile me", ["--aws-profile me", "--anonymous", "one of the two"]),
    ("lake mnt --ca-bundle absent.pem", ["--ca-bundle absent.pem", "no such file", "PEM"]),
    ("lake mnt --connect-timeout 0", ["--connect-timeout 0", "from 0.1"]),
    ("lake mnt --read-timeout inf", ["--read-timeout inf", "to 3600"]),
    ("lake mnt --retry -1", ["--retry -1", "from 0"]),
    ("lake mnt --fetch-threads 0", ["--fetch-threads 0", "from 1"]),
    ("lake mnt --keep-free x", ["--keep-free x", "no size"]),
    ("lake mnt --keep-free 900P", ["--keep-free 900P", "leaves nothing", "give less"]),
    ("lake mnt --uid nobody-here", ["--uid nobody-here", "number or a name"]),
    ("lake mnt --gid 99999999999", ["--gid 99999999999", "number or a name"]),
    ("lake mnt --durability never", ["--durability never", "local or remote"]),
    ("lake mnt --durability ckpt=often", ["--durability ckpt=often", "PATTERN=remote"]),
    ("lake mnt --dirty-max 1M", ["--dirty-max 1M", "too small", "64.0 MiB"]),
    ("lake mnt --upload-bandwidth 10", ["--upload-bandwidth 10", "at least 64K"]),
    ("lake mnt --upload-threads 0", ["--upload-threads 0", "from 1 to 256"]),
    ("lake mnt --log-file full", ["--log-file full", "a directory", "name a file"]),
    ("lake mnt --log-file absent/log", ["--log-file absent/log", "can't be written"]),
    ("lake mnt --log-level loud", ["--log-level loud", "debug, info"]),
    ("lake mnt --tttl 5", ["--tttl", "did you mean --ttl"]),
    ("lake mnt --ttl", ["--ttl", "expected one argument"]),
    ("lake mnt --config absent.toml", ["--config absent.toml", "No such file", "TOML"]),
    ("lake mnt --config full", ["--config full", "directory"]),
    ("lake mnt -o ttk=5", ["-o ttk=5", "did you mean ttl"]),
    ("lake mnt -o ttl=x", ["-o ttl=x", "number of seconds"]),
    ("lake mnt -o anonymous=yes", ["-o anonymous=yes", "takes no value"]),
    ("lake mnt -o remount", ["-o remount", "not an option"]),
]


@pytest.mark.parametrize(("arguments", "named"), BAD_ARGUMENTS, ids=[bad[0] or "-" for bad in BAD_ARGUMENTS])
def test_bad_input_gets_one_line_and_status_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: str, named: list[str]
) -> None:
    # A usable cache: else what is wrong with the default one could hide what is under test.
    extra = [] if "--cache" in arguments or arguments.count(" ") == 0 else ["--cache", "cache"]
    check_line(capsys, ["mount", *arguments.split(), *extra], named)


BAD_FILES = [
    ("ttk = 5", ["a.toml", "ttk", "unknown key", "did you mean ttl"]),
    ("[zzz]\nttl = 5", ["a.toml", "zzz", "unknown key", "sluice mount --help"]),
    ("ttl = ", ["a.toml", "not valid TOML", "end of document"]),
    ("retry = 1\nttl = = 5", ["a.toml", "not valid TOML", "line 2"]),
    ('ttl = "5"', ["a.toml", "ttl = '5'", "must be a number of seconds"]),
    ("ttl = true", ["a.toml", "ttl = True", "must be a number of seconds"]),
    ("ttl = -5", ["a.toml: ttl = -5", "from 0 to"]),
    ("workers = 1.5", ["a.toml", "workers = 1.5", "must be a whole number"]),
    ("anonymous = 1", ["a.toml", "anonymous = 1", "must be true or false"]),
    ("durability = 1", ["a.toml: durability = 1", "local or remote"]),
    ("cache = 5", ["a.toml", "cache = 5", "must be a directory"]),
    ("cache = ['c', 5]", ["a.toml", "cache = 5", "must be a directory"]),
    ("cache = ['c:0']", ["a.toml: cache = c:0", "too small"]),
    ("dram = 1.5", ["a.toml", "dram = 1.5", "must be a size"]),
    ("lake = 5", ["a.toml", "lake = 5", "must be a text"]),
    ("ca-bundle = 'absent'", ["a.toml: ca-bundle = absent", "no such file"]),
]


@pytest.mark.parametrize(("text", "named"), BAD_FILES, ids=[bad[0].split("\n")[0] for bad in BAD_FILES])
def test_a_bad_file_gets_one_line_and_status_2(
    here: Path, capsys: pytest.CaptureFixture[str], text: str, named: list[str]
) -> None:
    (here / "a.toml").write_text(text)
    cache = [] if text.startswith("cache") else ["--cache", "cache"]
    check_line(capsys, ["mount", "lake", "mnt", "--config", "a.toml", *cache], named)


def check_line(capsys: pytest.CaptureFixture[str], argv: list[str], named: list[str]) -> None:
    status = cli.main(argv)
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, ""), captured
    assert captured.err.startswith("sluice: ") and captured.err.count("\n") == 1, captured.err
    assert [text for text in named if text not in captured.err] == [], captured.err


def test_a_file_that_is_no_utf8_is_no_valid_toml(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.toml").write_bytes(b"ttl = \xff")
    check_line(capsys, ["mount", "lake", "mnt", "--config", "a.toml"], ["a.toml", "not valid TOML"])


def test_an_unwritable_cache_directory_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "cache" and access(path, mode)
    )  # Root may write anywhere, but on a read-only disk.
    with pytest.raises(UsageError, match=r"--cache cache: .* can't be written; mend its permissions"):
        build()


def test_a_dead_mount_in_the_way_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listdir(path: object) -> list[str]:
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(UsageError, match=r"mnt.*not connected; try `sluice umount .*mnt` first"):
        build()


def test_another_servers_bucket_may_have_other_names(here: Path) -> None:
    config, _ = options.read(["s3://Big_Bucket", "mnt", "--endpoint-url", "http://localhost:9000"])
    assert config.lake.url == "s3://Big_Bucket"


def test_the_help_shows_every_option(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mount", "--help"]) == 0
    shown = capsys.readouterr().out
    assert [option.name for option in options.OPTIONS if f"--{option.name}" not in shown] == []
