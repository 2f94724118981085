"""Several processes on one root."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.crash.increment import KEY, STATE, increment
from tests.forks import FORKS
from tests.samples import size

from backtest_kit.persist.backends.file import FileStore

pytestmark = pytest.mark.crash


@pytest.mark.sampled
async def test_no_increment_of_eight_processes_is_lost(tmp_path: Path) -> None:
    each = size(150, 1_000)
    processes = [FORKS.Process(target=increment, args=(str(tmp_path), each)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        await asyncio.to_thread(process.join, 240)
    assert [process.exitcode for process in processes] == [0] * 8
    store = FileStore(tmp_path)
    found = await store.get(STATE, KEY)
    assert found is not None
    assert (found.value, found.rev) == (8 * each, 8 * each)
    await store.close()
