"""Which owners count as gone, where the system does not say all."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time

import msgspec
import psutil
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
