"""Who opens in which mode: against a kernel that refuses what the real one refuses."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.config import CacheDirectory, LakeConfig, MountConfig
from cache.model import MIB
from cache.opens import Mode, OpenTable
from fusefs import device, passthrough
from fusefs.passthrough import Passthrough, choose


class Kernel:
    """Backing ids as fs/fuse/passthrough.c keeps them, modes as fs/fuse/iomode.c does."""

    def __init__(self) -> None:
        self.next_id = 1
        self.open_ids: set[int] = set()
        self.files: dict[int, list[int]] = {}  # Inode -> the backing id of each of its opens.
        self.error = 0

    def open_backing(self, fd: int, file: int) -> int:
        os.fstat(file)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self.next_id += 1
        self.open_ids.add(self.next_id - 1)
        return self.next_id - 1

    def close_backing(self, fd: int, backing_id: int) -> None:
        if backing_id not in self.open_ids:
            raise OSError(errno.ENOENT, "no such backing id")
        self.open_ids.remove(backing_id)

    def opened(self, inode: int, backing_id: int) -> None:
        """The answer to OPEN has come."""
        assert backing_id == 0 or backing_id in self.open_ids, "EIO"
        assert set(self.files.get(inode, [])) <= {backing_id}, "EIO: the modes are mixed"
        self.files.setdefault(inode, []).append(backing_id)

    def closed(self, inode: int) -> None:
        self.files[inode].pop()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(device, "open_backing", made.open_backing)
    monkeypatch.setattr(device, "close_backing", made.close_backing)
    return made


@pytest.fixture
def workers() -> list[Passthrough]:
    """Two workers of one mount."""
    opens = OpenTable()
    return [Passthrough(opens, 3), Passthrough(opens, 3)]


def whole() -> int | None:
    return os.open(os.devnull, os.O_RDONLY)


def missing() -> int | None:
    return None


def test_all_who_have_a_file_open_share_one_backing_id(kernel: Kernel, workers: list[Passthrough]) -> None:
    for worker in workers * 2:
        kernel.opened(5, worker.opened(5, whole, vid=b"v" * 16))
    assert kernel.open_ids == {1}
    for worker in workers:
        assert worker.opens.is_passed_through(b"v" * 16)
        assert not worker.opens.is_passed_through(b"w" * 16)
    for worker in workers * 2:
        kernel.closed(5)
        worker.closed(5)
    assert not kernel.open_ids and not workers[0].opens.is_passed_through(b"v" * 16)


def test_who_opens_a_file_that_is_open_in_cached_mode_joins(
    kernel: Kernel, workers: list[Passthrough]
) -> None:
    kernel.opened(5, workers[0].opened(5, missing))
    kernel.opened(5, workers[1].opened(5, whole))
    assert not kernel.open_ids
    for worker in workers:
        kernel.closed(5)
        worker.closed(5)
    kernel.opened(5, workers[1].opened(5, whole))
    assert kernel.open_ids == {1}


def test_an_open_by_passthrough_asks_for_no_file_again(kernel: Kernel, workers: list[Passthrough]) -> None:
    """It may have been evicted: the kernel holds it."""
    kernel.opened(5, workers[0].opened(5, whole))
    kernel.opened(5, workers[1].opened(5, missing))


def test_a_file_that_the_kernel_refuses_is_served_in_cached_mode(
    kernel: Kernel, workers: list[Passthrough], caplog: pytest.LogCaptureFixture
) -> None:
    kernel.error = errno.ELOOP
    for inode in (5, 6):
        assert workers[0].opened(inode, whole) == 0
        assert workers[0].opens.state(inode).mode is Mode.CACHED
    assert caplog.text.count("overlayfs") == 1


def test_requests_that_are_sent_again_change_nothing(kernel: Kernel, workers: list[Passthrough]) -> None:
    first, second = workers
    backing_id = first.opened(5, whole, request=10)
    assert second.opened(5, whole, request=10) == backing_id
    kernel.opened(5, backing_id)
    kernel.opened(5, second.opened(5, whole, request=12))
    kernel.closed(5)
    for worker in (first, second):
        worker.closed(5, request=14)
    assert kernel.open_ids == {backing_id}
    second.closed(5, request=16)
    assert not kernel.open_ids
    kernel.closed(5)
    kernel.opened(5, first.opened(5, whole, request=18))
    second.closed(5, request=16)
    assert kernel.open_ids == {2}, "the file is open again"


class Killed(BaseException):
    """Stands for SIGKILL: nothing that comes after it is done."""


def killed_in(worker: Passthrough, change: Callable[[], object]) -> None:
    with pytest.raises(Killed):
        change()
    worker.opens._holder = 0
    if worker.opens._thread_lock.locked():
        worker.opens._thread_lock.release()


def test_a_worker_killed_after_it_registered_a_file_leaks_nothing(
    kernel: Kernel, workers: list[Passthrough], monkeypatch: pytest.MonkeyPatch
) -> None:
    dying, healthy = workers
    kernel.opened(7, healthy.opened(7, whole))

    def open_backing(fd: int, file: int) -> int:
        kernel.open_backing(fd, file)
        raise Killed

    monkeypatch.setattr(device, "open_backing", open_backing)
    killed_in(dying, lambda: dying.opened(5, whole, request=10))
    assert kernel.open_ids == {1, 2}
    monkeypatch.setattr(device, "open_backing", kernel.open_backing)
    kernel.opened(5, healthy.opened(5, whole, request=10))
    assert kernel.open_ids == {1, 3}, "2 was of no use to anybody"
    kernel.opened(6, healthy.opened(6, whole))
    assert kernel.open_ids == {1, 3, 4}


def test_a_worker_killed_before_it_registered_a_file_closes_nobody_elses(
    kernel: Kernel, workers: list[Passthrough], monkeypatch: pytest.MonkeyPatch
) -> None:
    dying, healthy = workers

    def open_backing(fd: int, file: int) -> int:
        raise Killed

    for inode in (7, 8):
        kernel.opened(inode, healthy.opened(inode, whole))
    monkeypatch.setattr(device, "open_backing", open_backing)
    killed_in(dying, lambda: dying.opened(5, whole))
    monkeypatch.setattr(device, "open_backing", kernel.open_backing)
    for inode in (5, 6):
        kernel.opened(inode, healthy.opened(inode, whole))
    assert kernel.open_ids == {1, 2, 3, 4}


@pytest.mark.parametrize("sweeping", [True, False])
def test_what_a_worker_killed_in_the_last_close_left_is_taken_back(
    kernel: Kernel, workers: list[Passthrough], monkeypatch: pytest.MonkeyPatch, sweeping: bool
) -> None:
    dying, healthy = workers

    def close_backing(fd: int, backing_id: int) -> None:
        raise Killed

    kernel.opened(5, dying.opened(5, whole))
    kernel.closed(5)
    monkeypatch.setattr(device, "close_backing", close_backing)
    killed_in(dying, lambda: dying.closed(5, request=20))
    monkeypatch.setattr(device, "close_backing", kernel.close_backing)
    if sweeping:
        healthy.sweep()
        assert not kernel.open_ids
    else:
        kernel.opened(5, healthy.opened(5, whole))
        assert kernel.open_ids == {2}


def test_an_open_that_waited_is_answered_as_those_that_did_not(
    kernel: Kernel, workers: list[Passthrough]
) -> None:
    first, second = workers
    for request in (10, 12):
        first.counted(5, request=request, writing=request == 12)
    kernel.opened(5, second.opened(5, whole, request=14))
    for _ in range(2):
        kernel.opened(5, first.answered(5, missing))
    for writing in (True, False, False):
        kernel.closed(5)
        first.closed(5, writing=writing)
    assert not kernel.open_ids
    first.counted(5, request=20)
    kernel.opened(5, second.opened(5, missing, request=22))
    kernel.opened(5, first.answered(5, whole))
    assert not kernel.open_ids


def test_an_answer_to_a_request_that_another_worker_answered_long_ago_opens_nothing(
    kernel: Kernel, workers: list[Passthrough]
) -> None:
    slow, quick = workers
    slow.counted(5, request=10)
    kernel.opened(5, quick.opened(5, whole, request=10))
    kernel.closed(5)
    quick.closed(5, request=12)
    assert slow.answered(5, whole) == 0
    assert not slow.opens.state(5).is_open and not kernel.open_ids


def test_no_interleaving_mixes_modes(kernel: Kernel, workers: list[Passthrough]) -> None:
    """Answers reach the kernel late, and its RELEASE reaches us late."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    answers: list[tuple[int, int]] = []
    releases: list[int] = []
    waiting: list[int] = []
    requests = iter(range(2, 1 << 20, 2))
    for _ in range(20_000):
        worker, inode = chance.choice(workers), chance.randrange(5, 9)
        match chance.randrange(7):
            case 0:
                file = chance.choice((whole, missing))
                answers.append((inode, worker.opened(inode, file, request=next(requests))))
            case 1 if answers:
                kernel.opened(*answers.pop(chance.randrange(len(answers))))
            case 2 if kernel.files.get(inode):
                kernel.closed(inode)
                releases.append(inode)
            case 3 if releases:
                worker.closed(releases.pop(chance.randrange(len(releases))), request=next(requests))
            case 5:
                worker.counted(inode, request=next(requests))
                waiting.append(inode)
            case 6 if waiting:
                late = waiting.pop(chance.randrange(len(waiting)))
                answers.append((late, worker.answered(late, chance.choice((whole, missing)))))
            case 4 if chance.random() < 0.2:  # Time for all to be closed, so that modes change.
                answers += [(late, worker.answered(late, missing)) for late in waiting]
                for answer in answers:
                    kernel.opened(*answer)
                for number, opens in kernel.files.items():
                    releases += [number] * len(opens)
                    opens.clear()
                for number in releases:
                    worker.closed(number)
                answers, releases, waiting = [], [], []
                assert not kernel.open_ids


# Which of the two ways a mount takes


def config(**settings: object) -> MountConfig:
    settings = {"read_only": True, **settings}
    return MountConfig(LakeConfig("/lake"), Path("/m"), (CacheDirectory(Path("/c")),), **settings)  # type: ignore[arg-type]


def chosen(no_channel: str | None, failure: str | None, sample: tuple[int, int], **settings: object) -> str:
    features = choose(config(**settings), no_channel, failure, sample)
    on = [name for name, feature in features.items() if feature["on"]]
    assert all(feature["reason"] for feature in features.values())
    return " ".join(on)


SHARDS, SAMPLES = (10, 10 * 64 * MIB), (1000, 1000 * 110_000)


def test_auto_picks_passthrough_for_shards_and_no_open_for_samples() -> None:
    assert chosen(None, None, SHARDS) == "passthrough"
    assert chosen(None, None, SAMPLES) == "no_open"
    assert chosen(None, None, (0, 0)) == "no_open"
    assert chosen(None, "no kernel for it", SHARDS) == "no_open"
    assert chosen("not built", "not built", SHARDS) == ""
    assert "64.00 MiB" in str(choose(config(), None, None, SHARDS)["no_open"]["reason"])
    assert "0.10 MiB" in str(choose(config(), None, None, SAMPLES)["no_open"]["reason"])


def test_a_profile_picks_whatever_the_lake_holds() -> None:
    for sample in (SHARDS, SAMPLES):
        assert chosen(None, None, sample, profile="checkpoint") == "passthrough"
        assert chosen(None, "off", sample, profile="checkpoint") == ""
        assert chosen(None, "--profile dataset", sample, profile="dataset") == "no_open"
        assert chosen(None, None, sample, read_only=False) == "passthrough"


def test_passthrough_is_not_tried_where_it_is_not_wanted() -> None:
    assert passthrough.failure(config(passthrough="off"), -1, []) == "--passthrough off"
    assert "--profile dataset" in str(passthrough.failure(config(profile="dataset"), -1, []))
