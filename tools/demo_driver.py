"""The demo: a real S3 server, a real dataset in it, and a training run that reads it through SluiceFS.

The training script knows nothing of SluiceFS. Where its bytes came from is told by the mount's own
counters, taken at each line that the script prints for an epoch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tools import demo_dataset
from tools.mounted import Mounted, MountFailed
from tools.servers import Faults, SeaweedServer, ServerError, SlowProxy

LATENCY_S = 0.020  # To each first byte, as from a lake in the same region.
BUCKET = "lake"
PREFIX = "digits"
EPOCHS = 10
LOADERS = 4
CHECKPOINT = "checkpoints/model.pickle"  # In the mount, so that it goes to the lake.
ACCURACY = 0.95
EPOCH_LINE = re.compile(
    r"epoch (?P<epoch>\d+): (?P<seconds>[\d.]+) s, accuracy (?P<accuracy>[\d.]+),"
    r" read (?P<files>\d+) files (?P<bytes>\d+) bytes"
)


class DemoFailed(Exception):
    """A step failed. The text says which, and what was printed."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What the mount has counted so far, or between two moments."""

    reads_bytes: Mapping[str, int]  # By source: dram, nvme, lake.
    get_requests: int
    fetched_bytes: int

    @classmethod
    def of(cls, status: Mapping[str, Any]) -> Counters:
        """Take them from what `sluice status --json` printed."""
        lake = status["lake_io"]
        return cls(status["reads"]["bytes_by_source"], lake["requests"]["get"], lake["bytes_fetched"])

    def since(self, before: Counters) -> Counters:
        reads = {name: count - before.reads_bytes.get(name, 0) for name, count in self.reads_bytes.items()}
        gets, fetched = self.get_requests - before.get_requests, self.fetched_bytes - before.fetched_bytes
        return Counters(reads, gets, fetched)


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch's cost. *spent*: the counters' growth; what did not reach the mount, the kernel had."""

    number: int
    seconds: float
    accuracy: float
    files: int
    read_bytes: int
    spent: Counters

    @property
    def page_cache_bytes(self) -> int:
        return max(0, self.read_bytes - sum(self.spent.reads_bytes.values()))


def counters(mount: Mounted) -> Counters:
    return Counters.of(mount.status())


@contextmanager
def own_session(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run *command* in a session of its own, which ends with the block, loader processes included."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def train(mount: Mounted, arguments: Sequence[str]) -> list[Epoch]:
    """Run the training script over the mount; return its epochs. Raises DemoFailed if it fails."""
    script = str(Path(__file__).with_name("demo_train.py"))
    command = [sys.executable, script, str(mount.directory), *arguments]
    epochs: list[Epoch] = []
    before = counters(mount)
    with own_session(command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"   {line}", end="", flush=True)
            if found := EPOCH_LINE.match(line):
                after = paused(process, lambda: counters(mount))
                epochs.append(_epoch(found, after.since(before)))
                before = after
        status = process.wait()
    if status != 0:
        raise DemoFailed(f"the training script ended with status {status}")
    return epochs


def paused(process: subprocess.Popen[str], take: Callable[[], Counters]) -> Counters:
    """Return what *take* returns while *process*'s group stands still: the next epoch can't begin."""
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        return take()
    finally:
        os.killpg(process.pid, signal.SIGCONT)


def _epoch(found: re.Match[str], spent: Counters) -> Epoch:
    return Epoch(
        number=int(found["epoch"]),
        seconds=float(found["seconds"]),
        accuracy=float(found["accuracy"]),
        files=int(found["files"]),
        read_bytes=int(found["bytes"]),
        spent=spent,
    )


def print_table(title: str, epochs: Sequence[Epoch]) -> None:
    sources = ("page cache", "dram", "nvme", "lake")
    print(f"\n{title}: where the bytes of each epoch came from")
    print(
        f"{'epoch':>5} {'seconds':>8} {'accuracy':>8}", *(f"{name:>10}" for name in sources), f"{'GETs':>6}"
    )
    for epoch in epochs:
        of_source = {"page cache": epoch.page_cache_bytes, **epoch.spent.reads_bytes}
        shares = (f"{of_source.get(name, 0):>10,}" for name in sources)
        cost = f"{epoch.number:>5} {epoch.seconds:>8.2f} {epoch.accuracy:>8.3f}"
        print(cost, *shares, f"{epoch.spent.get_requests:>6,}")
    print(flush=True)


def require(holds: bool, claim: str) -> None:
    """Print *claim*, or raise DemoFailed when it does not hold."""
    if not holds:
        raise DemoFailed(f"not so: {claim}")
    print(f"ok: {claim}", flush=True)


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def demo(work: Path) -> None:
    """Run the whole demo with its files below *work*. Raises DemoFailed, ServerError, OSError."""
    with ExitStack() as stack:
        say("starting an S3 server (SeaweedFS)")
        server = stack.enter_context(SeaweedServer(work / "server"))
        server.create_bucket(BUCKET)
        start_s = time.monotonic()
        files, size_bytes = demo_dataset.upload(server.client(), BUCKET, PREFIX)
        took_s = time.monotonic() - start_s
        say(
            f"put {files:,} real handwritten digits, {size_bytes:,} bytes,"
            f" into s3://{BUCKET}/{PREFIX} in {took_s:.1f} s"
        )
        proxy = stack.enter_context(SlowProxy(server.endpoint_url, Faults(latency_s=LATENCY_S)))
        say(f"from here on the lake is {LATENCY_S * 1000:.0f} ms away: a proxy delays each request")
        mount = Mounted(
            f"s3://{BUCKET}/{PREFIX}",
            work / "data",
            work / "cache",
            [f"--cache={work / 'cache'}:1G", "--dram=64M", f"--endpoint-url={proxy.endpoint_url}"],
            server.environment(),
        )
        stack.callback(mount.unmount_if_mounted)
        try:
            _train_twice(mount, size_bytes, lambda: _stored_bytes(server, CHECKPOINT))
        except BaseException:
            print(f"demo: the end of the mount's log:\n{mount.log_tail()}", file=sys.stderr)
            raise


def _stored_bytes(server: SeaweedServer, path: str) -> bytes:
    """Return what the bucket has under *path*, asked by a client that knows no mount."""
    body: bytes = server.client().get_object(Bucket=BUCKET, Key=f"{PREFIX}/{path}")["Body"].read()
    return body


def _train_twice(mount: Mounted, size_bytes: int, stored: Callable[[], bytes]) -> None:
    """Train, unmount, mount and train on. *stored* returns the checkpoint as the lake has it."""
    checkpoint = ["--checkpoint", str(mount.directory / CHECKPOINT)]
    say(f"sluice mount s3://{BUCKET}/{PREFIX} {mount.directory}")
    mount.mount()
    say(f"training, {EPOCHS} shuffled epochs, {LOADERS} loader processes, plain open() and read()")
    common = ["--loaders", str(LOADERS), "--accuracy", str(ACCURACY), *checkpoint]
    first = train(mount, ["--epochs", str(EPOCHS), *common])
    saved = (mount.directory / CHECKPOINT).read_bytes()
    say("sluice umount, which waits until the lake has the checkpoint")
    mount.unmount()
    require(stored() == saved, f"the bucket holds the checkpoint, {len(saved):,} bytes")
    say("sluice mount, again, and two more epochs from the checkpoint")
    mount.mount()
    second = train(mount, ["--epochs", "2", *common])
    saved = (mount.directory / CHECKPOINT).read_bytes()
    mount.unmount()
    require(stored() == saved, "and then the new one")
    print_table("first mount", first)
    print_table("after the remount", second)
    require(first[-1].accuracy >= ACCURACY, f"the model reached {ACCURACY:.2f} on digits it had not seen")
    require(
        first[0].spent.fetched_bytes == size_bytes, "the first epoch fetched each byte once from the lake"
    )
    gets = sum(epoch.spent.get_requests for epoch in first[1:])
    require(gets == 0, "the other epochs fetched nothing")
    gets = sum(epoch.spent.get_requests for epoch in second)
    require(gets == 0, "nor did those after the remount: the cache outlives the mount")


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/demo", description=__doc__)
    parser.add_argument("--workdir", type=Path, help="where its files go while it runs")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    work = Path(tempfile.mkdtemp(prefix="sluice-demo-", dir=arguments.workdir))
    start_s = time.monotonic()
    try:
        demo(work)
    except (DemoFailed, MountFailed, ServerError) as error:
        print(f"demo: FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; everything is unmounted and removed", file=sys.stderr)
        return 130
    finally:
        if (work / "data").is_mount():  # Removing its files would go through the mount.
            print(f"demo: {work / 'data'} is still mounted", file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)
    say(f"done in {time.monotonic() - start_s:.0f} s; unmounted and cleaned up")
    return 0


if __name__ == "__main__":
    sys.exit(main())
