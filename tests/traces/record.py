"""Records the traces in this directory anew: real loaders read through real mounts, `sluice trace` watches.

Usage, from the root of a checkout: python -m tests.traces.record PYTHON
PYTHON is an interpreter that has torch, webdataset and h5py. Makes each set of files as a lake in a
temporary directory. What is kept of a trace names no path: files are numbered in listing order.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from cache.config import LakeConfig
from cache.lake.directory import DirectoryLake
from tests.traces.loaders import LOADERS
from tools.mounted import Mounted, sluice_command
from tools.simulate.trace import read_trace

HERE = Path(__file__).parent
CLASSES, CLASS_FILES = 20, 40
SHARDS, SHARD_SAMPLES = 256, 2
RECORDS, RECORD_BYTES = 2000, 16_384  # In 32 MB, four groups.


def make_samples(lake: Path) -> None:
    for name in range(CLASSES):
        folder = lake / f"class{name:02}"
        folder.mkdir(parents=True)
        for number in range(CLASS_FILES):
            (folder / f"{number:04}.jpg").write_bytes(os.urandom(2000))


def make_shards(lake: Path) -> None:
    lake.mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(lake / f"{shard:04}.tar", "w") as file:
            for sample in range(SHARD_SAMPLES):
                info = tarfile.TarInfo(f"{shard:04}{sample:02}.cls")
                info.size = 600
                file.addfile(info, io.BytesIO(os.urandom(600)))


def make_tokens(lake: Path) -> None:
    lake.mkdir(parents=True)
    (lake / "tokens.bin").write_bytes(os.urandom(RECORDS * RECORD_BYTES))


def make_hdf5(lake: Path, python: str) -> None:
    lake.mkdir(parents=True)
    code = (
        "import h5py, numpy, sys; f = h5py.File(sys.argv[1], 'w');"
        f" f['records'] = numpy.random.bytes({RECORDS * RECORD_BYTES}) and"
        f" numpy.random.randint(0, 255, ({RECORDS}, {RECORD_BYTES}), 'uint8'); f.close()"
    )
    subprocess.run([python, "-c", code, str(lake / "records.h5")], check=True)


def make(name: str, lake: Path, python: str) -> None:
    makers = {"shards": make_shards, "tokens": make_tokens}
    if name == "hdf5":
        make_hdf5(lake, python)
    else:
        makers.get(name, make_samples)(lake)


def numbered(lake: Path) -> dict[str, int]:
    """Return the number in listing order of each file, by the version that a trace names it with."""
    listed = DirectoryLake(LakeConfig(str(lake)))
    found: list[tuple[str, str]] = []
    token = None
    while True:
        page = listed.list_page("", delimiter=False, token=token)
        found += [(info.version.key, info.version.id.hex()) for info in page.objects]
        if (token := page.next_token) is None:
            return {vid: number for number, (_, vid) in enumerate(sorted(found))}


def record(name: str, python: str, work: Path) -> None:
    lake, raw = work / name / "lake", work / name / "trace"
    make(name, lake, python)
    mount = Mounted(str(lake), work / name / "mount", work / name / "cache", ["--read-only", "--dram=0"])
    with mount:
        command = [sluice_command(), "trace", str(mount.directory), str(raw), "--seconds", "600"]
        recording = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not (raw.exists() and raw.stat().st_size):
            time.sleep(0.05)
        loader = [python, str(HERE / "loaders.py"), name, str(mount.directory)]
        library = subprocess.run(loader, check=True, capture_output=True, text=True).stdout.split("\n")[-2]
        time.sleep(1.5)  # Hits are told up to a quarter of a second late, the recording every second.
        recording.send_signal(2)
        recording.wait()
    write(name, library, numbered(lake), raw)


def write(name: str, library: str, numbers: dict[str, int], raw: Path) -> None:
    names = [json.loads(line)[1] for line in raw.read_text().splitlines() if line.startswith("[")]
    trace = read_trace(str(raw))
    kept = {
        "loader": name,
        "library": library,
        "files": len(numbers),
        # File, and group within it where that is large.
        "uses": [[numbers[item[:32]], *([int(item[32:], 16)] if item[32:] else [])] for item in names],
        "at_ms": [round(at_ms) for at_ms in trace.at_ms],
    }
    packed = gzip.compress(json.dumps(kept, separators=(",", ":")).encode(), 9, mtime=0)
    (HERE / f"{name}.json.gz").write_bytes(packed)
    print(f"{name}: {len(names)} uses of {len(numbers)} files by {library}, {len(packed)} bytes")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        for each in sys.argv[2:] or LOADERS:
            record(each, sys.argv[1], Path(directory))
