"""The loaders whose reads tests/traces/record.py records. Runs where torch, webdataset and h5py are.

Usage: loaders.py NAME DIR; prints the version of the library that reads.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

SEED = 0
BATCH = 16


def read(path: str) -> int:
    with open(path, "rb") as file:
        return len(file.read())


class Files:
    """A map-style dataset: files in the order of sorted names, as ImageFolder has them."""

    def __init__(self, directory: Path) -> None:
        self.paths = sorted(str(path) for path in directory.glob("*/*"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> int:
        return read(self.paths[index])


def map_style(directory: Path) -> str:
    import torch
    from torch.utils.data import DataLoader

    generator = torch.Generator().manual_seed(SEED)
    loader: Any = DataLoader(
        Files(directory), batch_size=BATCH, shuffle=True, num_workers=4, generator=generator
    )
    for _ in loader:
        pass
    return f"torch {torch.__version__}"


def _rank(directory: Path, rank: int, world: int) -> None:
    from torch.utils.data import DataLoader
    from torch.utils.data.distributed import DistributedSampler

    files = Files(directory)
    sampler: Any = DistributedSampler(files, num_replicas=world, rank=rank)  # type: ignore[arg-type, var-annotated]
    sampler.set_epoch(0)
    loader: Any = DataLoader(files, batch_size=BATCH, sampler=sampler, num_workers=2)  # type: ignore[arg-type, var-annotated]
    for _ in loader:
        pass


def distributed(directory: Path, world: int) -> str:
    import torch

    ranks = [multiprocessing.Process(target=_rank, args=(directory, rank, world)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert all(rank.exitcode == 0 for rank in ranks)
    return f"torch {torch.__version__}"


def shards(directory: Path) -> str:
    import webdataset

    urls = sorted(str(path) for path in directory.glob("*.tar"))
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(urls),
        webdataset.detshuffle(100, seed=SEED),
        webdataset.tarfile_to_samples(),
    )
    for _ in pipeline:
        pass
    return f"webdataset {webdataset.__version__}"


def hdf5(directory: Path) -> str:
    import random

    import h5py

    with h5py.File(directory / "records.h5", "r") as file:
        records = file["records"]
        for number in random.Random(SEED).sample(range(len(records)), 300):
            _ = records[number]
    return f"h5py {h5py.__version__}"


def tokens(directory: Path) -> str:
    import random

    import numpy as np

    mapped = np.memmap(directory / "tokens.bin", np.uint16, "r")
    dice = random.Random(SEED)
    for _ in range(300):
        start = dice.randrange(len(mapped) - 1025)
        _ = mapped[start : start + 1025].sum()
    return f"numpy {np.__version__}"


LOADERS = {
    "map-style": map_style,
    "distributed-2": lambda directory: distributed(directory, 2),
    "distributed-4": lambda directory: distributed(directory, 4),
    "shards": shards,
    "hdf5": hdf5,
    "tokens": tokens,
}

if __name__ == "__main__":
    os.environ["GOPEN_VERBOSE"] = "0"
    print(LOADERS[sys.argv[1]](Path(sys.argv[2])))
