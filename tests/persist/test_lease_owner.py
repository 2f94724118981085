"""Which owners count as gone, where the system does not say all."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

import backtest_kit as bk
from backtest_kit.errors import Conflict
from backtest_kit.persist import holder as holder_module
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.lease import Lease, acquire
from backtest_kit.persist.store_id import claim_store_id
from backtest_kit.seams import Seams

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


async def test_a_process_that_cannot_be_looked_at_is_alive(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not holder_module.is_gone(lease.holder)
    another = msgspec.structs.replace(lease.holder, started=-86_400.0)
    assert holder_module.is_gone(another)

    def denied(pid: int) -> None:
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", denied)
    assert not holder_module.is_gone(another)
    assert not holder_module.is_gone(msgspec.structs.replace(another, machine=""))


async def test_a_zombie_is_gone(lease: Lease) -> None:
    code = "import os, sys, time\nif os.fork() == 0: os._exit(0)\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        (child,) = psutil.Process(parent.pid).children()
        deadline = time.monotonic() + 10
        while child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.01)
        assert holder_module.is_gone(msgspec.structs.replace(lease.holder, pid=child.pid))
        parent.kill()


async def test_a_machine_without_proc_is_known_by_its_name_and_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder_module, "_IS_LINUX", False)
    store = MemoryStore()
    first = await acquire(lambda row: store, SCOPE)
    assert first.holder.machine.startswith(socket.gethostname())
    assert not holder_module.is_gone(first.holder)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
        assert holder_module.is_gone(msgspec.structs.replace(first.holder, pid=ended.pid))


async def test_a_fork_does_not_own_its_parents_lease(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    with pytest.raises(Conflict, match="not to its forks"):
        await lease.renew()
    monkeypatch.undo()
    await asyncio.gather(lease.renew())
    assert lease.held


class Simulated(Seams):
    """A program in which nothing is left to chance or to the system's clock."""

    def __init__(self) -> None:
        self.drawn = 0

    def wall_ms(self) -> int:
        return 1_000

    def elapsed(self) -> float:
        return 7.0

    def random_hex(self, digits: int) -> str:
        self.drawn += 1
        return f"{self.drawn - 1:0{digits}x}"


async def test_time_and_chance_are_those_of_the_kit(tmp_path: Path) -> None:
    seams = Simulated()
    kit = bk.Kit(tmp_path, seams=seams)
    store = MemoryStore()
    assert kit.persistence.seams is seams
    assert await claim_store_id(store, kit.persistence.seams) == "000001", "all zeros are no id"
    lease = await acquire(lambda row: store, SCOPE, seams=kit.persistence.seams)
    assert (lease.holder.owner, lease.holder.since) == (f"{2:032x}", 1_000)
    assert lease.held
    await kit.close()
