"""Several processes on one root."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.samples import size

from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS

pytestmark = pytest.mark.crash

STATE = CONTRACTS["state"]
KEY = ("counter", "shared")

INCREMENT = """
import asyncio, sys
from backtest_kit.errors import Conflict
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import ABSENT, Write

async def main(root, count):
    store = FileStore(root)
    state, key = CONTRACTS["state"], ("counter", "shared")
    done = 0
    while done < count:
        found = await store.get(state, key)
        value, expect = (found.value, found.rev) if found else (0, ABSENT)
        try:
            await store.put(Write(state, key, value + 1, expect=expect))
        except Conflict:
            continue
        done += 1
    await store.close()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment)


@pytest.mark.sampled
async def test_no_increment_of_eight_processes_is_lost(tmp_path: Path) -> None:
    each = size(150, 1_000)
    processes = [start(INCREMENT, str(tmp_path), str(each)) for _ in range(8)]
    assert [await asyncio.to_thread(process.wait, 240) for process in processes] == [0] * 8
    store = FileStore(tmp_path)
    found = await store.get(STATE, KEY)
    assert found is not None
    assert (found.value, found.rev) == (8 * each, 8 * each)
    await store.close()
