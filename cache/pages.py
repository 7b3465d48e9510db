"""LMDB files that are shorter than their pages: to touch what is not there would end the process (SIGBUS).

A file that was cut off is such a one, but so may be a good one: pages at its end that a transaction took
and gave back are never written (3 of 18,000 commits of random changes ended so). To tell the two
apart the file is made as long as its pages, and read: what is not there are zeroes then, an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import lmdb


def missing_bytes(env: lmdb.Environment, directory: Path) -> int:
    """Return how many bytes data.mdb lacks. Touches the first two pages only, which LMDB itself checks."""
    least_bytes = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    return max(0, least_bytes - data_file(directory).stat().st_size)


def lengthen(directory: Path, by_bytes: int) -> None:
    path = data_file(directory)
    os.truncate(path, path.stat().st_size + by_bytes)


def use_all(env: lmdb.Environment, names: Iterable[str]) -> None:
    """Read every value, and write one. Raises lmdb.Error where a page that this takes is no page."""
    probe = env.open_db(b"probe")
    with env.begin(write=True) as txn:
        for name in names:
            for _ in txn.cursor(db=env.open_db(name.encode(), txn=txn, create=False)):
                pass  # The values are read with it.
        txn.put(b"probe", b"", db=probe)  # Takes a page from the list of free ones.
        txn.drop(probe)


def data_file(directory: Path) -> Path:
    return directory / "data.mdb"
