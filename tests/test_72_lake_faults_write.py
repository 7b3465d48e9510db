"""Writing while the lake fails, lies about what it did or goes away, and while the staging disk is full."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from botocore.exceptions import ConnectionClosedError

from tests.crash_driver import (
    TIMEOUT_S,
    BucketView,
    FolderView,
    LakeWatch,
    bytes_sent,
    check_lake,
    drain,
    files,
    known_pids,
    note_lake,
    points,
    running,
)
from tests.crash_model import Story, difference, observe
from tests.crash_script import digest, lines_told, script
from tests.disks import fill_up, small_disk
from tests.lossy_proxy import LossyProxy
from tests.mounting import MIB, Folder, LiveMount, Mounting, Prefix, content, kill_each, until
from tools.servers import Faults, SeaweedServer, SlowProxy

pytestmark = pytest.mark.timeout(TIMEOUT_S)

OPTIONS = ("--no-read-only", "--upload-delay=0.1", "--upload-open-delay=3600", "--keep-free=0")
# Not less: what is given up while the server is at it may happen after all, and later than what follows it.
# A request that is given up and then carried out all the same may undo what came after it: no real one may
# take so long, on a busy machine either.
IMPATIENT = ("--read-timeout=4", "--connect-timeout=4")
COUNT = 60
# A third of all requests: 503, reset before the server heard of it, no answer for longer than the time-out.
A_THIRD = Faults(slow_down_share=0.11, reset_share=0.11, hang_share=0.11, hang_s=7.0)


@pytest.fixture
def view(prefix: Prefix, s3_server: SeaweedServer) -> BucketView:
    bucket, _, below = prefix.url.removeprefix("s3://").partition("/")
    return BucketView(s3_server, bucket, below)


@pytest.fixture
def lossy(s3_server: SeaweedServer) -> Iterator[LossyProxy]:
    with LossyProxy(s3_server.endpoint_url, share=0.0, seed=72) as proxy:
        yield proxy


@pytest.fixture
def proxy(lossy: LossyProxy) -> Iterator[SlowProxy]:
    with SlowProxy(lossy.endpoint_url, seed=72) as slow:
        yield slow


def test_of_a_lost_answer_the_server_did_what_it_was_asked_to(
    lossy: LossyProxy, proxy: SlowProxy, s3_server: SeaweedServer, shared_bucket: str
) -> None:
    """The harness itself."""
    client, key = s3_server.client(lossy.endpoint_url), f"lossy-{os.getpid()}"
    client.put_object(Bucket=shared_bucket, Key=key, Body=b"one")
    assert (lossy.share, lossy.lost) == (0.0, 0)
    lossy.share = 1.0
    for endpoint_url in (lossy.endpoint_url, proxy.endpoint_url):
        with pytest.raises(ConnectionClosedError):
            s3_server.client(endpoint_url).put_object(
                Bucket=shared_bucket, Key=key, Body=endpoint_url.encode()
            )
        found = s3_server.client().get_object(Bucket=shared_bucket, Key=key)
        assert found["Body"].read() == endpoint_url.encode()
    assert lossy.lost >= 2


def perform(mount: LiveMount, story: Story, seed: int, count: int) -> None:
    """Perform the story's script, whose changes are all to work."""
    with running(mount.directory, seed, count) as performed:
        told = performed.finish()
    assert [line for line in told if line.event == "failed"] == []
    assert (fault := difference(story.states[-1], observe(mount.directory))) == "", fault


# --- The lake ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["nothing", "a third of requests", "a third of answers"])
def test_a_failing_lake_fails_no_change_and_gets_all_of_them(
    mounting: Mounting, prefix: Prefix, view: BucketView, proxy: SlowProxy, lossy: LossyProxy, how: str
) -> None:
    story = Story(script(1, 3 * COUNT))
    mount = mounting.mount(prefix.url, f"--endpoint-url={proxy.endpoint_url}", *OPTIONS, *IMPATIENT)
    with LakeWatch(view) as watch:
        proxy.faults = A_THIRD if how == "a third of requests" else Faults()
        lossy.share = 0.33 if how == "a third of answers" else 0.0
        perform(mount, story, seed=1, count=3 * COUNT)
        drain(mount)
        check_lake(story.states[-1], view)
        assert watch.torn(story.versions()) == set()
    assert (how == "a third of requests") == (sum(proxy.faults_dealt.values()) > 0)
    assert (how == "a third of answers") == (lossy.lost > 0)
    proxy.faults, lossy.share = Faults(), 0.0
    mount.remount()
    assert (fault := difference(story.states[-1], observe(mount.directory))) == "", fault
    assert "Traceback" not in mount.log()


def test_a_server_that_is_killed_again_and_again_gets_all_that_was_written(
    mounting: Mounting, prefix: Prefix, view: BucketView, s3_server: SeaweedServer
) -> None:
    story, roll = Story(script(2, COUNT)), random.Random(2)
    # Who is patient gives up no request that the server is still at: a killed one ends it at once.
    mount = mounting.mount(prefix.url, *prefix.options, *OPTIONS, "--connect-timeout=2")
    lines = sorted(roll.randrange(1, lines_told(story.operations)) for _ in range(points(few=2)))
    with LakeWatch(view) as watch, running(mount.directory, 2, COUNT) as performed:
        for line in lines:
            performed.wait_for(line)
            with restarted(s3_server):
                performed.wait_for(line + roll.randrange(20))
        told = performed.finish()
        assert [line for line in told if line.event == "failed"] == []
        drain(mount)
        check_lake(story.states[-1], view)
        assert watch.torn(story.versions()) == set()
    assert (fault := difference(story.states[-1], observe(mount.directory))) == "", fault


@contextmanager
def restarted(server: SeaweedServer) -> Iterator[None]:
    """Have no server while the block runs."""
    server.kill()
    try:
        yield
    finally:
        server.restart()


def test_all_die_while_the_lake_fails_and_the_next_mount_goes_on(
    mounting: Mounting, prefix: Prefix, view: BucketView, proxy: SlowProxy, lossy: LossyProxy
) -> None:
    mount = mounting.mount(prefix.url, f"--endpoint-url={proxy.endpoint_url}", *OPTIONS, *IMPATIENT)
    versions: set[str] = set()
    with LakeWatch(view) as watch:
        for point in range(points(few=2)):
            proxy.faults, lossy.share = A_THIRD, 0.1
            top = f"p{point}"
            story, roll = Story(script(point, COUNT, top)), random.Random(point)
            versions |= story.versions()
            with running(mount.directory, point, COUNT, top) as performed:
                performed.wait_for(roll.randrange(1, lines_told(story.operations)))
                mount.kill_all()
                told = performed.finish()
            mount.unmount()
            proxy.faults, lossy.share = Faults(), 0.0
            mount.mount()
            found = observe(mount.directory)
            ours = {path: body for path, body in found.items() if path.split("/")[0] == top}
            assert (fault := story.fault_after_kill(told, ours)) == "", fault
            versions |= {digest(body) for body in files(ours).values()}
            drain(mount)
            check_lake(found, view)
            assert watch.torn(versions) == set()


@pytest.mark.parametrize("who", ["mover", "all"])
def test_of_a_large_file_only_the_parts_that_were_not_there_are_sent_again(
    mounting: Mounting, prefix: Prefix, view: BucketView, who: str
) -> None:
    body = content(100 * MIB)
    mount = mounting.mount(
        prefix.url, *prefix.options, *OPTIONS, "--upload-bandwidth=24M", "--upload-threads=1"
    )
    (mount.directory / "large").write_bytes(body)
    until(lambda: view.part_bytes() >= 32 * MIB, "two parts have been sent")
    if who == "all":
        mount.kill_all()
    else:
        kill_each(mount.pids()["mover"])
    unsent = note_lake(view).bytes({"large": body}) + 16 * MIB * (who == "mover")  # A part may end meanwhile.
    assert unsent < len(body)
    if who == "all":
        mount.unmount()
        mount.mount()
    until(lambda: known_pids(mount), "all are there")
    drain(mount)
    assert bytes_sent(mount) <= 1.1 * unsent
    check_lake({"large": body}, view)
    assert mount.read_anew("large") == body
    assert mount.requests()["get"] == 0, "what was sent is clean cache"


# --- The staging disk ----------------------------------------------------------------------------


def write_until_full(directory: Path, body: bytes) -> tuple[dict[str, bytes], str]:
    """Write file after file until a write(2) fails with ENOSPC. Return those that are whole, and the name of
    the one that is not. Fails when anything else does, close(2) above all."""
    whole: dict[str, bytes] = {}
    while True:
        name = f"f{len(whole)}"
        file = (directory / name).open("wb", buffering=0)
        try:
            written = 0
            while written < len(body):
                written += file.write(body[written:])
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return whole, name
        finally:
            file.close()
        whole[name] = body


@pytest.mark.parametrize("dies", [False, True])
def test_a_full_staging_disk_is_enospc_at_write_and_loses_nothing(
    mounting: Mounting, folder: Folder, tmp_path_factory: pytest.TempPathFactory, dies: bool
) -> None:
    view, body = FolderView(folder), content(3 * MIB)
    with small_disk(tmp_path_factory.mktemp("full"), 160 * MIB) as disk:
        options = ("--no-read-only", "--upload-delay=3600", "--dirty-max=1G")
        mount = mounting.prepare(folder.url, f"--cache={disk / 'cache'}:64M", *options)
        mount.cache = disk / "cache"
        mount.mount()
        try:
            balloon = fill_up(disk, leave_bytes=20 * MIB)
            whole, cut_off = write_until_full(mount.directory, body)
            assert whole
            if dies:
                mount.crash()
                balloon.unlink()
                mount.mount()
            else:
                balloon.unlink()
            for name in whole:
                assert mount.read(name) == body
            (mount.directory / cut_off).unlink(missing_ok=True)
            until(lambda: can_write(mount, "later"), "there is room again")
            drain(mount)
            check_lake({**whole, "later": b"later"}, view)
        finally:
            mount.end()


def can_write(mount: LiveMount, name: str) -> bool:
    try:
        (mount.directory / name).write_bytes(name.encode())
    except OSError:
        return False
    return True
