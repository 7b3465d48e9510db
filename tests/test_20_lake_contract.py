"""What every lake promises: one suite for S3 (with and without obstore), directory and fake."""

from __future__ import annotations

import os
import random
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cache.config import LakeConfig
from cache.errors import (
    LakeError,
    LakeMisconfigured,
    LakeUnavailable,
    ObjectChanged,
    ObjectExists,
    ObjectMissing,
)
from cache.lake.base import Lake, ListPage
from cache.lake.directory import DirectoryLake
from cache.lake.fake import FakeLake
from cache.lake.open import open_lake
from cache.lake.s3 import S3Lake
from cache.model import ObjectInfo, ObjectVersion
from tools.servers import SeaweedServer

ODD_KEYS = [
    "a b",
    " lead",
    "trail ",
    "a+b",
    "100%",
    "a%2Fb",
    "%41",
    "trailing.",
    "...",
    "..a",
    "über/ñandú/日本語",
    "e\u0301 is not \xe9",
    "\U0001f40d",
    "quote'\"<>&;`",
    "a#b?c=d",
    "a|b{c}[d]^e",
    "a:b@c,d!e$f(g)*~",
    "x" * 255,
    "/".join(["deep"] * 40),
    "new\nline",
    "tab\there",
    "\x7f",
]  # No backslash: SeaweedFS turns it into a slash.


@pytest.fixture(params=["s3", "s3-boto3", "directory", "fake"])
def lake(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lake]:
    """An empty lake. Those on S3 and on disk lie below a prefix, with neighbours beside it."""
    made: Lake
    if request.param.startswith("s3"):
        made = _s3_lake(request)
    elif request.param == "directory":
        (tmp_path / "lake").mkdir()
        made = DirectoryLake(LakeConfig(str(tmp_path / "lake")))
    else:
        made = FakeLake()
    yield made
    made.close()


def _s3_lake(request: pytest.FixtureRequest) -> Lake:
    server: SeaweedServer = request.getfixturevalue("s3_server")
    bucket: str = request.getfixturevalue("shared_bucket")
    request.getfixturevalue("s3_credentials")
    config = LakeConfig(f"s3://{bucket}/{secrets.token_hex(4)}/", endpoint_url=server.endpoint_url)
    return S3Lake(config, use_obstore=request.param == "s3")


def listed(lake: Lake, prefix: str = "", *, delimiter: bool = False, keys_max: int = 1000) -> ListPage:
    """Return a whole listing as one page, and check that no page was larger than asked."""
    objects: list[ObjectInfo] = []
    prefixes: list[str] = []
    token: str | None = None
    while True:
        page = lake.list_page(prefix, delimiter=delimiter, token=token, keys_max=keys_max)
        assert len(page.objects) + len(page.prefixes) <= keys_max
        objects += page.objects
        prefixes += page.prefixes
        token = page.next_token
        if token is None:
            return ListPage(objects, prefixes, None)


def keys_of(page: ListPage) -> list[str]:
    return [info.version.key for info in page.objects]


def fill(lake: Lake, *keys: str) -> None:
    for key in keys:
        lake.put(key, key.encode())


def read(lake: Lake, version: ObjectVersion) -> bytes:
    return bytes(lake.get_range(version, 0, version.size_bytes)) if version.size_bytes else b""


def test_check_accepts_an_empty_lake(lake: Lake) -> None:
    lake.check()


def test_an_empty_prefix_gives_an_empty_page(lake: Lake) -> None:
    for prefix in ("", "none/", "none", "a//b/", "../", "/"):
        for delimiter in (True, False):
            assert lake.list_page(prefix, delimiter=delimiter) == ListPage([], [], None)


def test_head_listing_and_put_agree_on_the_version(lake: Lake) -> None:
    info = lake.put("dir/file", b"content", metadata={"mode": "644", "other": "x y"})
    assert info.version.size_bytes == 7
    assert info.version.etag.startswith('"') and info.version.etag.endswith('"')
    assert lake.head("dir/file").version == info.version
    assert lake.head("dir/file").metadata == {"mode": "644", "other": "x y"}
    (shown,) = listed(lake).objects
    assert shown.version == info.version
    assert shown.mtime_ns == lake.head("dir/file").mtime_ns
    assert shown.metadata == {}


def test_head_of_what_is_not_there_is_object_missing(lake: Lake) -> None:
    fill(lake, "dir/file")
    for key in ("none", "dir", "dir/file/below", "di"):  # Not "dir/": SeaweedFS finds that, as a directory.
        with pytest.raises(ObjectMissing):
            lake.head(key)


def test_a_delimiter_rolls_up_what_lies_deeper(lake: Lake) -> None:
    fill(lake, "a", "b/1", "b/2", "b/c/3", "b.txt", "d/e/4")
    page = listed(lake, delimiter=True)
    assert sorted(keys_of(page)) == ["a", "b.txt"]
    assert sorted(page.prefixes) == ["b/", "d/"]
    page = listed(lake, "b/", delimiter=True)
    assert sorted(keys_of(page)) == ["b/1", "b/2"]
    assert page.prefixes == ["b/c/"]


def test_a_prefix_need_not_end_at_a_slash(lake: Lake) -> None:
    fill(lake, "sample-1", "sample-2", "same/x", "other", "sa")
    assert sorted(keys_of(listed(lake, "sample"))) == ["sample-1", "sample-2"]
    page = listed(lake, "sam", delimiter=True)
    assert sorted(keys_of(page)) == ["sample-1", "sample-2"]
    assert page.prefixes == ["same/"]


@pytest.mark.parametrize("delimiter", [True, False])
@pytest.mark.parametrize("keys_max", [1, 3, 1000])
def test_pages_together_give_each_key_once(lake: Lake, delimiter: bool, keys_max: int) -> None:
    keys = [f"d{i}/f{j}" for i in range(4) for j in range(3)] + [f"d{i}" + "-x" for i in range(4)] + ["z"]
    fill(lake, *keys)
    page = listed(lake, delimiter=delimiter, keys_max=keys_max)
    if delimiter:
        assert sorted(page.prefixes) == ["d0/", "d1/", "d2/", "d3/"]
        keys = [key for key in keys if "/" not in key]
    assert sorted(keys_of(page)) == sorted(keys)


def test_start_after_leaves_out_what_comes_before_and_itself(lake: Lake) -> None:
    fill(lake, "a", "b", "c/1", "c/2", "d")
    assert sorted(keys_of(lake.list_page("", delimiter=False, start_after="b"))) == ["c/1", "c/2", "d"]
    assert keys_of(lake.list_page("c/", delimiter=False, start_after="c/1")) == ["c/2"]
    page = lake.list_page("", delimiter=True, start_after="a")
    assert (sorted(keys_of(page)), page.prefixes) == (["b", "d"], ["c/"])
    assert lake.list_page("", delimiter=False, start_after="zz") == ListPage([], [], None)


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys_are_stored_listed_read_and_deleted(lake: Lake, key: str) -> None:
    info = lake.put(key, key.encode())
    assert keys_of(listed(lake)) == [key]
    assert lake.head(key).version == info.version
    assert read(lake, info.version) == key.encode()
    assert lake.copy(info.version, "copy of " + key[:200]).version.size_bytes == len(key.encode())
    assert lake.delete_many([key, "copy of " + key[:200]]) == {}
    assert listed(lake).objects == []


def test_zero_byte_objects_are_objects(lake: Lake) -> None:
    info = lake.put("empty", b"")
    assert info.version.size_bytes == 0
    assert lake.head("empty").version == info.version
    assert [shown.version for shown in listed(lake).objects] == [info.version]
    assert lake.copy(info.version, "copy").version.size_bytes == 0


def test_ranges_return_exactly_their_bytes(lake: Lake) -> None:
    content = random.Random(1).randbytes(300_000)
    version = lake.put("sample", memoryview(content)).version
    for offset, length in [(0, 1), (0, 300_000), (299_999, 1), (131_072, 131_072), (7, 150_000)]:
        body = lake.get_range(version, offset, length)
        assert memoryview(body).nbytes == length
        assert bytes(body) == content[offset : offset + length]


def test_pieces_add_up_to_the_range(lake: Lake) -> None:
    content = random.Random(2).randbytes(1_300_000)
    version = lake.put("sample", memoryview(content)).version
    for offset, length in [(0, 1), (0, 1_300_000), (131_072, 1_048_576), (7, 300_000)]:
        pieces = list(lake.get_pieces(version, offset, length))  # Kept: none is to change meanwhile.
        assert all(pieces) and b"".join(pieces) == content[offset : offset + length]


def test_pieces_are_never_those_of_another_version(lake: Lake) -> None:
    old = lake.put("sample", bytes(600_000)).version
    new = lake.put("sample", b"1" * 600_000).version
    with pytest.raises(ObjectChanged):
        list(lake.get_pieces(old, 0, 600_000))
    lake.delete_many(["sample"])
    with pytest.raises(ObjectMissing):
        list(lake.get_pieces(new, 0, 600_000))


def test_a_changed_object_is_never_read_as_the_old_one(lake: Lake) -> None:
    old = lake.put("sample", b"old bytes").version
    new = lake.put("sample", b"new bytes").version
    assert new.etag != old.etag
    with pytest.raises(ObjectChanged):
        lake.get_range(old, 0, 9)
    shorter = lake.put("sample", b"new").version
    with pytest.raises(ObjectChanged):
        lake.get_range(new, 5, 4)
    assert read(lake, shorter) == b"new"


def test_reading_a_deleted_object_is_object_missing(lake: Lake) -> None:
    version = lake.put("sample", b"bytes").version
    lake.delete_many(["sample"])
    with pytest.raises(ObjectMissing):
        lake.get_range(version, 0, 5)


def test_conditional_puts_hold_their_condition(lake: Lake) -> None:
    first = lake.put("key", b"1", if_none_match=True).version
    with pytest.raises(ObjectExists):
        lake.put("key", b"2", if_none_match=True)
    with pytest.raises(ObjectChanged):
        lake.put("key", b"2", if_match='"0123456789abcdef0123456789abcdef"')
    with pytest.raises(ObjectChanged):
        lake.put("none", b"2", if_match=first.etag)
    second = lake.put("key", b"22", if_match=first.etag).version
    assert read(lake, second) == b"22"
    assert keys_of(listed(lake)) == ["key"]


def test_of_many_creators_at_once_one_wins(lake: Lake) -> None:
    start = threading.Barrier(4)

    def create(number: int) -> ObjectVersion | None:
        start.wait()
        try:
            return lake.put("key", b"%d" % number, if_none_match=True).version
        except (ObjectExists, LakeUnavailable):  # 409: S3 met the other while it was under way.
            return None

    with ThreadPoolExecutor(4) as pool:
        winners = [version for version in pool.map(create, range(4)) if version]
    assert [lake.head("key").version] == winners


def test_a_multipart_upload_appears_whole_when_completed(lake: Lake) -> None:
    pieces = [random.Random(number).randbytes(lake.part_bytes_min + number) for number in (1, 2)] + [b"end"]
    upload_id = lake.start_multipart("big", metadata={"mode": "600"})
    numbered = list(enumerate(pieces, 1))
    parts = [lake.put_part("big", upload_id, number, piece) for number, piece in reversed(numbered)]
    assert lake.list_parts("big", upload_id) == sorted(parts, key=lambda part: part.number)
    assert listed(lake).objects == []
    info = lake.complete_multipart("big", upload_id, parts)
    assert info.version == lake.head("big").version
    assert info.version.size_bytes == sum(map(len, pieces))
    assert lake.head("big").metadata == {"mode": "600"}
    assert read(lake, info.version) == b"".join(pieces)


def test_an_aborted_upload_is_gone_and_may_be_aborted_again(lake: Lake) -> None:
    upload_id = lake.start_multipart("big")
    part = lake.put_part("big", upload_id, 1, b"part")
    lake.abort_multipart("big", upload_id)
    lake.abort_multipart("big", upload_id)
    with pytest.raises(ObjectMissing):
        lake.list_parts("big", upload_id)
    with pytest.raises(LakeError):
        lake.complete_multipart("big", upload_id, [part])
    assert listed(lake).objects == []


def test_completing_holds_the_conditions_of_a_put(lake: Lake) -> None:
    present = lake.put("key", b"present").version
    upload_id = lake.start_multipart("key")
    part = lake.put_part("key", upload_id, 1, b"part")
    with pytest.raises(ObjectExists):
        lake.complete_multipart("key", upload_id, [part], if_none_match=True)
    with pytest.raises(ObjectChanged):
        lake.complete_multipart("key", upload_id, [part], if_match='"0123456789abcdef0123456789abcdef"')
    assert read(lake, present) == b"present"
    info = lake.complete_multipart("key", upload_id, [part], if_match=present.etag)
    assert read(lake, info.version) == b"part"


def test_a_copy_takes_the_bytes_and_the_metadata(lake: Lake) -> None:
    source = lake.put("from/file", b"content", metadata={"mode": "644"}).version
    copied = lake.copy(source, "to/file").version
    assert lake.head("to/file").version == copied
    assert lake.head("to/file").metadata == {"mode": "644"}
    assert read(lake, copied) == b"content"
    assert read(lake, source) == b"content"


def test_a_copy_of_a_version_that_is_gone_is_refused(lake: Lake) -> None:
    source = lake.put("file", b"old").version
    lake.put("file", b"new!")
    with pytest.raises(ObjectChanged):
        lake.copy(source, "copy")
    lake.delete_many(["file"])
    with pytest.raises(ObjectMissing):
        lake.copy(source, "copy")
    assert listed(lake).objects == []


def test_deleting_many_deletes_all_and_misses_none(lake: Lake) -> None:
    keys = [f"d/{number:04}" for number in range(30)]
    fill(lake, *keys, "kept")
    assert lake.delete_many([*keys, "d/none", "none/none"]) == {}
    assert keys_of(listed(lake)) == ["kept"]
    assert lake.delete_many([]) == {}


def test_many_threads_may_use_one_lake(lake: Lake) -> None:
    def use(number: int) -> bool:
        content = b"%d" % number * 1000
        version = lake.put(f"t/{number}", content).version
        return read(lake, version) == content and lake.head(f"t/{number}").version == version

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(40)))
    assert len(listed(lake, "t/", keys_max=7).objects) == 40


# What only some lakes can show.


def test_the_lake_prefix_hides_its_neighbours(
    s3_server: SeaweedServer, bucket: str, s3_credentials: None
) -> None:
    for key in ("p/", "p/a", "p/d/b", "p2/c", "pa"):
        s3_server.client().put_object(Bucket=bucket, Key=key, Body=b"x")
    for url in (f"s3://{bucket}/p", f"s3://{bucket}/p/"):
        lake = S3Lake(LakeConfig(url, endpoint_url=s3_server.endpoint_url))
        page = listed(lake, delimiter=True)
        assert (keys_of(page), page.prefixes) == (["a"], ["d/"])
        assert lake.url == f"s3://{bucket}/p"


def test_a_large_object_is_copied_in_parts(
    s3_server: SeaweedServer, bucket: str, s3_credentials: None
) -> None:
    lake = S3Lake(LakeConfig(f"s3://{bucket}", endpoint_url=s3_server.endpoint_url))
    lake.copy_bytes_max, lake.copy_part_bytes = 6 << 20, 5 << 20
    content = random.Random(3).randbytes((11 << 20) + 1)
    source = lake.put("source", content, metadata={"mode": "644"}).version
    copied = lake.copy(source, "copy").version
    assert read(lake, copied) == content
    assert lake.head("copy").metadata == {"mode": "644"}
    stale = ObjectVersion("source", '"0123456789abcdef0123456789abcdef"', source.size_bytes)
    with pytest.raises(ObjectChanged):
        lake.copy(stale, "copy 2")


def test_more_keys_than_one_request_takes_are_deleted(
    s3_server: SeaweedServer, bucket: str, s3_credentials: None
) -> None:
    lake = S3Lake(LakeConfig(f"s3://{bucket}", endpoint_url=s3_server.endpoint_url))
    lake.put("last", b"x")
    assert lake.delete_many([*(f"none/{number}" for number in range(2500)), "last"]) == {}
    assert listed(lake).objects == []


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "lake").mkdir()
    (tmp_path / "outside").write_text("secret")
    return tmp_path / "lake"


@pytest.fixture
def directory_lake(directory: Path) -> DirectoryLake:
    return DirectoryLake(LakeConfig(str(directory)))


def test_a_directory_lists_in_byte_order_of_keys(directory_lake: DirectoryLake) -> None:
    keys = ["a", "a-b", "a.d/y", "a/b", "a/b-c", "a/b/c"[:3] + "z/q", "a0", "é", "\U0001f40d"]
    keys.remove("a")  # A key that is also a directory does not fit a directory.
    fill(directory_lake, *keys)
    for keys_max in (1, 2, 1000):
        found = keys_of(listed(directory_lake, keys_max=keys_max))
        assert found == sorted(keys, key=str.encode)


def test_links_out_of_a_directory_are_neither_shown_nor_followed(
    directory: Path, directory_lake: DirectoryLake
) -> None:
    (directory / "link").symlink_to(directory.parent / "outside")
    (directory / "up").symlink_to(directory.parent)
    (directory / "dangling").symlink_to("nowhere")
    os.mkfifo(directory / "fifo")
    assert listed(directory_lake, delimiter=True) == ListPage([], [], None)
    assert listed(directory_lake, "up/", delimiter=False) == ListPage([], [], None)
    for key in ("link", "up/outside", "dangling", "fifo", "../outside", "/etc/passwd", "a/../../outside"):
        with pytest.raises(ObjectMissing):
            directory_lake.head(key)
    for key in ("up/new", "../new", ".sluice-lake/lock", "a//b", "./a"):
        with pytest.raises(LakeError):
            directory_lake.put(key, b"x")
    directory_lake.delete_many(["up/outside", "../outside"])
    assert (directory.parent / "outside").read_text() == "secret"
    assert not (directory.parent / "new").exists()


def test_links_within_a_directory_are_followed_but_never_in_circles(
    directory: Path, directory_lake: DirectoryLake
) -> None:
    fill(directory_lake, "d/file")
    (directory / "alias").symlink_to("d")
    (directory / "d" / "circle").symlink_to("..")
    assert keys_of(listed(directory_lake)) == ["alias/file", "d/file"]
    assert listed(directory_lake, delimiter=True).prefixes == ["alias/", "d/"]
    assert listed(directory_lake, "d/", delimiter=True).prefixes == []
    assert read(directory_lake, directory_lake.head("alias/file").version) == b"d/file"


def test_a_file_written_in_place_is_a_changed_object(directory: Path, directory_lake: DirectoryLake) -> None:
    version = directory_lake.put("file", b"old").version
    with open(directory / "file", "r+b") as file:
        file.write(b"new")
    with pytest.raises(ObjectChanged):
        directory_lake.get_range(version, 0, 3)


def test_names_that_are_no_utf8_are_keys_with_surrogates(
    directory: Path, directory_lake: DirectoryLake
) -> None:
    (directory / os.fsdecode(b"\xff\xfe")).write_bytes(b"content")
    (info,) = listed(directory_lake).objects
    assert info.version.key.encode("utf-8", "surrogateescape") == b"\xff\xfe"
    assert read(directory_lake, info.version) == b"content"


def test_an_empty_directory_is_a_prefix_and_can_be_made_and_deleted(directory_lake: DirectoryLake) -> None:
    directory_lake.put("made/below/", b"")
    assert listed(directory_lake, delimiter=True) == ListPage([], ["made/"], None)
    assert listed(directory_lake) == ListPage([], [], None)
    assert directory_lake.head("made/below/").version.size_bytes == 0
    assert directory_lake.delete_many(["made/"]) == {}  # Not empty: stays.
    assert directory_lake.delete_many(["made/below/", "made/"]) == {}
    assert listed(directory_lake, delimiter=True) == ListPage([], [], None)


def test_metadata_survives_where_there_are_no_extended_attributes(
    directory_lake: DirectoryLake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    monkeypatch.setattr(os, "getxattr", refuse)
    info = directory_lake.put("file", b"1", metadata={"mode": "644"})
    assert directory_lake.head("file").metadata == {"mode": "644"}
    directory_lake.copy(info.version, "copy")
    assert directory_lake.head("copy").metadata == {"mode": "644"}
    directory_lake.put("file", b"2")
    assert directory_lake.head("file").metadata == {}


def test_a_directory_that_vanished_is_unavailable_and_not_empty(
    directory: Path, directory_lake: DirectoryLake
) -> None:
    fill(directory_lake, "file")
    directory.rename(directory.with_name("moved"))
    for request in (
        lambda: directory_lake.head("file"),
        lambda: directory_lake.list_page("", delimiter=True),
        lambda: directory_lake.put("file", b"x"),
    ):
        with pytest.raises(LakeUnavailable, match="gone"):
            request()
    directory.with_name("moved").rename(directory)
    assert directory_lake.head("file").version.size_bytes == 4


def test_a_listing_goes_on_when_its_scan_is_forgotten(directory: Path, directory_lake: DirectoryLake) -> None:
    fill(directory_lake, *(f"d/{number}" for number in range(9)))
    page = directory_lake.list_page("", delimiter=False, keys_max=4)
    other = DirectoryLake(LakeConfig(str(directory)))
    rest = other.list_page("", delimiter=False, keys_max=9, token=page.next_token)
    assert keys_of(page) + keys_of(rest) == [f"d/{number}" for number in range(9)]


def test_what_killed_writers_left_is_deleted_after_a_day(directory: Path) -> None:
    incoming = directory / ".sluice-lake" / "incoming"
    incoming.mkdir(parents=True)
    for name, age_s in (("old", 90_000), ("new", 60)):
        (incoming / name).write_bytes(b"part of a file")
        os.utime(incoming / name, (time.time() - age_s,) * 2)
    DirectoryLake(LakeConfig(str(directory))).put("key", b"x")
    assert [path.name for path in incoming.iterdir()] == ["new"]


@pytest.mark.parametrize("url", ["relative", "/no/such/directory", "/dev/null", "s3://"])
def test_a_lake_that_can_not_be_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(LakeMisconfigured) as caught:
        open_lake(LakeConfig(url))
    assert str(caught.value).startswith(f"{url}: ")


def test_a_directory_lake_is_opened_without_importing_boto3(directory: Path) -> None:
    program = (
        "import sys; from cache.config import LakeConfig; from cache.lake.open import open_lake\n"
        "open_lake(LakeConfig(sys.argv[1])).check(); assert 'boto3' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(directory)], check=True)


def test_the_fake_deals_the_faults_it_is_told() -> None:
    lake = FakeLake(fault=lambda verb, key: "truncate" if verb == "get" else None)
    version = lake.put("key", b"bytes").version
    with pytest.raises(LakeUnavailable):
        lake.get_range(version, 0, 5)
    lake.fault = lambda verb, key: ObjectMissing(key) if verb == "head" else None
    with pytest.raises(ObjectMissing):
        lake.head("key")
    assert read(lake, version) == b"bytes"
    assert lake.requests == {"put": 1, "get": 2, "head": 1}


def test_the_fake_holds_requests_at_a_gate() -> None:
    lake = FakeLake()
    version = lake.put("key", b"bytes").version
    lake.gates["get"] = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(read, lake, version)
        assert not future.done()
        lake.gates["get"].set()
        assert future.result(10) == b"bytes"
