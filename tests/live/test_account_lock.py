"""On one machine, one store at a time trades a symbol of an account."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.live.rig import WHERE, Rig, UntilClock

import backtest_kit as bk
from backtest_kit.broker.order_ids import parse
from backtest_kit.broker.paper import PaperBroker
from backtest_kit.errors import Conflict, RetryLater
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.locks import try_lock
from backtest_kit.persist.store_id import claim_store_id, read_store_id
from backtest_kit.run.live import account_lock
from backtest_kit.run.live.account_lock import AccountLock, account_locked, lock_directory

HOLDER = """
import sys
from pathlib import Path
from backtest_kit.run.live.account_lock import AccountLock

AccountLock(
    "spot:key", "BTCUSDT", store_id="0a1b2c", place="file:/theirs", strategy_name="trend", directory=Path(sys.argv[1])
).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def lock(directory: Path, store_id: str = "0a1b2c", **fields: str) -> AccountLock:
    given = {"account": "spot:key", "symbol": "BTCUSDT", "place": "file:/mine", **fields}
    return AccountLock(
        given["account"],
        given["symbol"],
        store_id=store_id,
        place=given["place"],
        strategy_name="trend",
        directory=directory,
    )


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, of another store, that has the lock."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_processes_of_one_store_share_a_symbol_and_another_store_is_refused(tmp_path: Path) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            mine = lock(tmp_path)
            stack.callback(mine.release)
            mine.acquire()
        with pytest.raises(Conflict, match=f"traded from another store: process {os.getpid()} on .*store 0a1b2c at"):
            lock(tmp_path, "ffffff").acquire()
    lock(tmp_path, "ffffff").acquire()


@pytest.mark.parametrize("symbol", ["BTC/USDT", "BTC/USDT:USDT", "btcusdt"])
def test_one_symbol_has_several_spellings(tmp_path: Path, symbol: str) -> None:
    mine = lock(tmp_path)
    mine.acquire()
    with pytest.raises(Conflict):
        lock(tmp_path, "ffffff", symbol=symbol).acquire()
    lock(tmp_path, "ffffff", symbol="ETHUSDT").acquire()
    lock(tmp_path, "ffffff", account="futures:key").acquire()
    mine.release()


def test_a_copy_of_a_store_is_another_store(tmp_path: Path) -> None:
    mine = lock(tmp_path)
    mine.acquire()
    with pytest.raises(Conflict, match=r"at file:/mine\. This is store 0a1b2c at file:/copy"):
        lock(tmp_path, place="file:/copy").acquire()
    mine.release()


def test_a_kill_gives_the_lock_back(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    mine = lock(tmp_path, "ffffff")
    with pytest.raises(Conflict, match=f"process {holder.pid} on .*strategy trend, store 0a1b2c at file:/theirs"):
        mine.acquire()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    mine.acquire()
    (place,) = tmp_path.iterdir()
    assert len(list(place.iterdir())) == 2, "the guard and our own"
    mine.release()


def test_what_is_forked_does_not_keep_the_lock(tmp_path: Path) -> None:
    mine = lock(tmp_path)
    mine.acquire()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        mine.release()
        lock(tmp_path, "ffffff").acquire()
        child.kill()


def test_the_files_are_private_and_have_no_secret(tmp_path: Path) -> None:
    mine = lock(tmp_path / "locks", account="spot:my-secret-key")
    mine.acquire()
    files = [tmp_path / "locks", *(tmp_path / "locks").rglob("*")]
    assert {stat.S_IMODE(each.stat().st_mode) for each in files if each.is_dir()} == {0o700}
    assert {stat.S_IMODE(each.stat().st_mode) for each in files if each.is_file()} == {0o600}
    assert not any("secret" in str(each) for each in files)
    assert not any(b"secret" in each.read_bytes() for each in files if each.is_file())
    mine.release()
    mine.release()
    mine.acquire()  # a run that was cancelled meanwhile takes nothing any more
    lock(tmp_path / "locks", "ffffff", account="spot:my-secret-key").acquire()


def test_a_directory_that_is_kept_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock(tmp_path).acquire()
    (guard,) = tmp_path.rglob("guard")
    monkeypatch.setattr(account_lock, "_PATIENCE_S", 0.0)
    fd = os.open(guard, os.O_RDWR)
    assert try_lock(fd)
    with pytest.raises(RetryLater, match=r"has held .*guard for 0 s"):
        lock(tmp_path).acquire()
    os.close(fd)


def test_a_lock_that_is_given_back_while_it_is_looked_at_is_no_error(tmp_path: Path) -> None:
    """A link that leads nowhere is listed, and is not there when it is opened."""
    lock(tmp_path).acquire()
    (place,) = tmp_path.iterdir()
    (place / "0").symlink_to(place / "gone")
    mine = lock(tmp_path)
    mine.acquire()
    with pytest.raises(Conflict):
        lock(tmp_path, "ffffff").acquire()
    mine.release()


def test_a_lock_that_does_not_say_whose_it_is_refuses_everybody(tmp_path: Path) -> None:
    lock(tmp_path).acquire()
    (place,) = tmp_path.iterdir()
    fd = os.open(place / "0", os.O_RDWR | os.O_CREAT)
    assert try_lock(fd)
    with pytest.raises(Conflict, match="another process, from an unknown store"):
        lock(tmp_path).acquire()
    os.close(fd)
    lock(tmp_path).acquire()


def test_the_directory_is_the_users_own(tmp_path: Path) -> None:
    there = {"XDG_STATE_HOME": str(tmp_path / "state")}
    assert lock_directory(there) == tmp_path / "state" / "backtest-kit" / "accounts"
    assert lock_directory({}, lambda: tmp_path) == tmp_path / ".local" / "state" / "backtest-kit" / "accounts"

    def homeless() -> Path:
        raise RuntimeError("no home")

    assert lock_directory({}, homeless).parts[-2:] == (f"backtest-kit-{os.getuid()}", "accounts")


async def test_without_an_account_or_a_place_for_it_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore()
    async with account_locked("", "BTCUSDT", store=store, store_id="0a1b2c", strategy_name="trend"):
        pass
    (tmp_path / "file").touch()
    monkeypatch.setattr(account_lock, "lock_directory", lambda: tmp_path / "file" / "below")
    async with account_locked("key", "BTCUSDT", store=store, store_id="0a1b2c", strategy_name="trend"):
        pass
    assert "another store on this machine could also trade BTCUSDT" in caplog.text


class Account(bk.Broker):
    """Says which account it trades, and keeps the ids it was sent."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sent: list[str] = []

    def account(self) -> str:
        return self.name

    async def find(self, order: bk.Order) -> bk.OrderReport:
        return bk.OrderReport(status="absent")

    async def open_position(self, order: bk.Order) -> None:
        self.sent.append(order.client_order_id)


async def test_a_second_store_is_refused_at_its_start_and_paper_is_not(memory_rig: Rig, tmp_path: Path) -> None:
    other = Rig(tmp_path / "other", MemoryStore())
    memory_rig.venue = first = Account(f"of {tmp_path}")  # type: ignore[assignment]
    other.venue = second = Account(first.name)  # type: ignore[assignment]
    clock = UntilClock(memory_rig.now_ms, memory_rig.now_ms + 2 * MINUTE_MS)
    handle = memory_rig.kit(clock).live.background("BTCUSDT", **WHERE)
    await clock.over.wait()
    own = await claim_store_id(memory_rig.store)
    assert {parse(each).store_id for each in first.sent} == {own}  # type: ignore[union-attr]
    with pytest.raises(Conflict, match=f"strategy trend, store {own} at MemoryStore"):
        await other.trade(2)
    assert not second.sent
    await other.trade(2, paper=True)
    handle.cancel()
    await asyncio.wait({handle.task})
    await other.trade(2)
    theirs = await read_store_id(other.store)
    assert theirs is not None
    assert {parse(each).store_id for each in second.sent} == {theirs.id}  # type: ignore[union-attr]


def test_brokers_name_their_account_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC_CCXT_API_KEY", raising=False)
    assert PaperBroker().account() == bk.CcxtBroker("binance").account() == ""
    spot = bk.CcxtBroker("binance", api_key="a-key").account()
    assert spot.startswith("spot:")
    assert "a-key" not in spot
    assert spot == bk.CcxtBroker("binance", api_key="a-key", leverage=3).account()
    futures = [bk.CcxtBroker(each, market="futures", api_key="a-key").account() for each in ("binance", "binanceusdm")]
    assert len({spot, *futures, bk.CcxtBroker("binance", api_key="b-key").account()}) == 3
    monkeypatch.setenv("CC_CCXT_API_KEY", "a-key")
    assert bk.CcxtBroker("binance").account() == spot
