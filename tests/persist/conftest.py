"""Shared by the tests of the stores."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.files import Disk
from backtest_kit.persist.testing.faults import FaultFS


@pytest.fixture
def faults() -> FaultFS:
    return FaultFS()


@pytest_asyncio.fixture
async def file_store(tmp_path: Path, faults: FaultFS) -> AsyncIterator[FileStore]:
    """A file store over `tmp_path / "dump"` whose disk fails as `faults` says."""
    store = FileStore(tmp_path / "dump", disk=Disk(faults))
    yield store
    faults.heal()
    await store.close()
    assert faults.opened == {}, "a descriptor was left open"
    assert faults.retried == [], "an fsync was tried again after it had failed"
