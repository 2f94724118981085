"""Rigs on the stores that need no server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.live.rig import Rig

import backtest_kit as bk
from backtest_kit.persist.store import Store


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return bk.MemoryStore() if request.param == "memory" else bk.FileStore(tmp_path / "store")


@pytest_asyncio.fixture(autouse=True)
async def closing() -> AsyncIterator[None]:
    Rig.made.clear()
    yield
    for rig in Rig.made:
        await rig.close()


@pytest.fixture
def rig(tmp_path: Path, store: Store) -> Rig:
    return Rig(tmp_path, store)


@pytest.fixture
def memory_rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path, bk.MemoryStore())
