"""Random changes, then the index is lost: what the journal gives back is what was shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from cache.index import remove_index
from cache.store import boot_id
from tests.changing import Files, objects
from tests.test_49_changes_model import Model, Walk, check_lake, config, start
from tests.wiring import LAKES, Shared, open_cache, requests_carried_out

SEEDS = int(os.environ.get("SLUICE_MODEL_SEEDS", "8"))
FIRST_SEED = int(os.environ.get("SLUICE_MODEL_FIRST_SEED", "0"))
STEPS = 20
MOUNTS = 3
_LIMIT_S = 60.0


@pytest.mark.parametrize("is_sent", [False, True], ids=["held back", "sent in between"])
@pytest.mark.parametrize("kind", LAKES)
@pytest.mark.parametrize("seed", sorted({24, *range(FIRST_SEED, FIRST_SEED + SEEDS)}))
async def test_a_lost_index_is_made_anew_from_the_journal(
    tmp_path: Path, kind: str, seed: int, is_sent: bool
) -> None:
    """*is_sent*: the uploader is stopped anywhere in its work, else it has not begun."""
    lake, model, steps = LAKES[kind](tmp_path / "lake"), Model(start()), list[str]()
    lake.fill({path: body for path, body in start().items() if body is not None})
    (tmp_path / "boot").write_text(boot_id())  # The machine goes on: all bytes written are there.
    try:
        with trio.fail_after(_LIMIT_S):
            for mount in range(MOUNTS):
                is_last = mount == MOUNTS - 1
                upload = config(seed) if is_sent or is_last else None
                async with open_cache(
                    tmp_path, lake, writable=True, upload=upload, shared=Shared.make(), lake_threads=40
                ) as cache:
                    walk = Walk(seed * 3 + mount, Files(cache), model, lake)
                    walk.serial, walk.steps = mount * 1000, steps
                    assert cache.writing is not None
                    assert cache.writing.ledger.recovered.index_was_lost
                    assert await walk.files.tree() == model.tree
                    for _ in range(STEPS):
                        await walk.step()
                    await cache.writing.keeper.settled()
                    walk.release()
                    if is_last:
                        assert cache.uploader is not None
                        await cache.uploader.drain()
                        check_lake(cache, model)
                await requests_carried_out(cache)
                remove_index(tmp_path)
                steps.append("the index is lost")
    except BaseException:
        print("seed", seed, *steps, sep="\n  ")
        print("rows", *cache.table.rows.items(), "running", cache.table.running, sep="\n  ")
        print("objects", *objects(cache).items(), sep="\n  ")
        raise
