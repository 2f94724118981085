"""Two processes on one position: one trades, the other is told; who was paused and taken over is refused."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import get_args

import pytest
from tests.live.scripts import START
from tests.live.stage import ORDERS, Forks, flat_candles, forking, stage, story_candles
from tests.samples import sample, size

from backtest_kit.market.clock import SteppedClock
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.venue.exchange import ClientIds, Terms

pytestmark = pytest.mark.crash

SYMBOLS = tuple(f"C{number}USDT" for number in range(20))
KINDS = ("open", "place", "activate", "cancel", "add", "reduce", "close", "move_stop", "move_take", "breakeven")
MOMENTS = ("after_intent", "after_broker", "after_commit")
SEATS = 6


class HeldClock(SteppedClock):
    """Stands still until it is set forward: who has lost some of his positions does not wait for them any more."""

    def join(self, name: str, sleepers: int = 1) -> None:
        """The time waits for nobody."""


@pytest.mark.sampled
async def test_of_two_that_race_for_a_position_one_trades_it(tmp_path: Path) -> None:
    """Twenty positions in each race. The loser has sent nothing and names the winner."""
    races = size(2, 5)
    async with forking() as forks:
        won = await asyncio.gather(*(race(forks, tmp_path / str(number)) for number in range(races)))
    assert sum(won, start=0) == races * len(SYMBOLS)


async def race(forks: Forks, place: Path) -> int:
    candles = flat_candles(lambda minute: 100.0, 30)
    clock = HeldClock(START)
    async with stage(
        forks, place, candles=candles, clock=clock, symbols=SYMBOLS, end_ms=START + MINUTE_MS, script="always",
        lease_ttl_s=10.0,  # a busy machine holds a bot up for longer than a short lease, and then both trade in turn
    ) as here:  # fmt: skip
        bots = [await here.bot(actor=name, name=name, symbols=SYMBOLS) for name in ("one", "other")]
        async with asyncio.timeout(120):
            while len(here.opened()) < len(SYMBOLS) or len(here.heard("failed")) < len(SYMBOLS):
                await asyncio.sleep(0.01)
        clock.advance_to(START + MINUTE_MS)
        assert [await bot.ended() for bot in bots] == [0, 0], here.said()
        errors = [here.end(name).errors for name in ("one", "other")]
        for symbol in SYMBOLS:
            refused = [each[symbol] for each in errors if symbol in each]
            assert len(refused) == 1, (symbol, errors)
            assert refused[0].startswith("Conflict")
            assert f"{symbol} " in refused[0]
            assert any(str(bot.pid) in refused[0] for bot in bots) or "taken by another process" in refused[0]
        orders = [order for order in here.server.venue.exchanges["futures"].orders.values() if order.type == "market"]
        assert sorted(order.symbol for order in orders) == sorted(SYMBOLS)
        assert len(here.opened()) == len(SYMBOLS)
        assert here.heard("trouble") == []
        return len(orders)


@pytest.mark.sampled
@pytest.mark.parametrize("rule", get_args(ClientIds))
async def test_who_was_paused_and_taken_over_is_refused(tmp_path: Path, rule: ClientIds) -> None:
    """Stopped at the worst moments of every kind of order; the successor goes on with it, once, and to the end."""
    seats = asyncio.Semaphore(SEATS)
    async with forking() as forks:

        async def play(kind: str, moment: str) -> list[str]:
            async with seats:
                return await paused(
                    forks, tmp_path / f"{kind}-{moment}", f"live.{kind}.{moment}", Terms(client_ids=rule)
                )

        whole = [(kind, moment) for kind in KINDS for moment in MOMENTS]
        plays = [play(kind, moment) for kind, moment in sample(whole, 3, f"paused, client ids {rule}")]
        wrong = [each for found in await asyncio.gather(*plays) for each in found]
    assert not wrong, "\n".join(wrong)


async def paused(forks: Forks, place: Path, point: str, terms: Terms) -> list[str]:
    async with stage(
        forks, place, candles=story_candles(), end_ms=START + 47 * MINUTE_MS, lease_ttl_s=2.0, venue={"terms": terms}
    ) as here:
        owner = await here.bot(actor="owner", crash=f"{point}:1:STOP")
        await standing_still(owner.pid)
        heir = await here.bot(actor="bot")
        assert await heir.ended() == 0, here.said()
        left = here.outcome()
        received = len(here.server.requests)
        written = {path: path.read_bytes() for path in sorted((place / "store").rglob("*.json"))}
        os.kill(owner.pid, signal.SIGCONT)
        assert await owner.ended() == 0, here.said()
        wrong = [] if here.end("owner").errors.get("BTCUSDT", "").startswith("Conflict") else ["it was not refused"]
        wrong += [
            f"{request['path']} was sent by who had lost it"
            for request in list(here.server.requests)[received:]
            if request["path"].removeprefix("/broker/") in ORDERS
        ]
        now = here.outcome()
        wrong += [f"{what} has changed" for what in left if now[what] != left[what]]
        wrong += [f"{path} has changed" for path, data in written.items() if path.read_bytes() != data]
        trades = [trade["closeReason"] for trade in left["trades"]]
        wrong += [] if trades == ["closed", "closed", "stop_loss", "closed"] else [f"trades: {trades}"]
        return [f"{point}: {each}" for each in wrong]


async def standing_still(pid: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, "it does not stop"
        await asyncio.sleep(0.005)
