"""Who counts as gone, where the kernel does not tell all."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from backtest_kit.errors import Conflict
from backtest_kit.persist import holder as holder_module
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.lease import Lease, acquire

SCOPE = ("trend", "binance", "BTCUSDT")


@pytest.fixture
async def lease() -> Lease:
    store = MemoryStore()
    return await acquire(lambda row: store, SCOPE)


async def test_a_process_of_another_user_is_alive(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not holder_module.is_gone(lease.holder)


async def test_without_proc_nobody_is_declared_gone(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    assert holder_module.is_gone(msgspec.structs.replace(lease.holder, started="long ago"))

    def missing(path: Path, *_: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert holder_module._machine() == ""
    assert holder_module._state_of(os.getpid()) == ("", "")
    assert not holder_module.is_gone(msgspec.structs.replace(lease.holder, started="long ago"))
    assert not holder_module.is_gone(msgspec.structs.replace(lease.holder, machine=""))


async def test_a_fork_does_not_own_its_parents_lease(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    with pytest.raises(Conflict, match="not to its forks"):
        await lease.renew()
    monkeypatch.undo()
    await asyncio.gather(lease.renew())
    assert lease.held
