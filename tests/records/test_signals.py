"""Storage, recent and notifications: what the events of runs leave behind, on every store."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import given, settings, strategies as st
from tests.records.conftest import MINUTE_MS, NOON_MS, kit_on
from tests.records.happenings import IDENTITY, closed, observe, opened
from tests.samples import size

import backtest_kit as bk
from backtest_kit.model.identity import Mode
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Record, Write
from backtest_kit.records.notification import notification_of

RECENT: dict[str, Any] = {"symbol": "BTCUSDT", "strategy_name": "trend", "exchange_name": "binance"}


async def trend(ctx: bk.Context) -> bk.Signal | None:
    close = (await ctx.candles("15m", 50)).close
    if close[-1] < close.mean():
        return None
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1)


async def test_a_limit_of_0_is_nothing_and_one_below_is_refused(kit: bk.Kit) -> None:
    await observe(kit, [opened("s-1"), opened("s-2", 1)])
    kit.records.of_run(IDENTITY, None).log(NOON_MS).info("quiet")
    lists: list[Callable[..., Any]] = [kit.records.storage.list, kit.records.notification.list, kit.records.log.list]
    for listed in lists:
        assert len(await listed(limit=1)) == 1
        assert await listed(limit=0) == []
        with pytest.raises(bk.UserError, match="limit is -1"):
            await listed(limit=-1)


async def test_the_last_ones_are_listed_without_a_look_at_all_the_others(tmp_path: Path) -> None:
    class Watched(MemoryStore):
        limits: ClassVar[list[int | None]] = []

        async def scan(self, *given: Any, limit: int | None = None, **options: Any) -> AsyncIterator[Record]:
            self.limits.append(limit)
            async for record in super().scan(*given, limit=limit, **options):
                yield record

    kit = bk.Kit(tmp_path)
    kit.persistence.bind("*", Watched())
    await observe(kit, [opened(f"s-{number:02d}", number) for number in range(60)])
    storage = kit.records.storage
    Watched.limits.clear()
    assert [each.signal_id for each in await storage.list(limit=2)] == ["s-59", "s-58"]
    assert Watched.limits == [8]
    assert [each.signal_id for each in await storage.list(limit=2, when=NOON_MS + 3 * MINUTE_MS)] == ["s-03", "s-02"]
    assert [each.signal_id for each in await storage.list(limit=70)][::59] == ["s-59", "s-00"]
    assert Watched.limits == [8, 8, None, 280]
    assert len(await storage.list()) == 60
    await kit.close()


async def test_a_signal_is_found_in_its_latest_state(kit: bk.Kit) -> None:
    storage, recent = kit.records.storage, kit.records.recent
    assert await storage.get("s-1") is None
    assert await recent.get(**RECENT) is None
    await observe(kit, [opened("s-1")])
    found = await storage.get("s-1")
    assert found is not None
    assert (found.status, found.price_open, found.entry.minutes, found.pnl_pct) == ("opened", 100.0, 60.0, None)
    await observe(kit, [closed("s-1", 5)])
    found = await storage.get("s-1")
    assert found is not None
    assert (found.status, found.close_reason, found.pnl_pct, found.trade and found.trade.closed_at_ms) == (
        "closed",
        "take_profit",
        9.5,
        NOON_MS + 5 * MINUTE_MS,
    )
    assert await recent.get(**RECENT) == found
    await observe(kit, [opened("s-2", 6)])
    assert [each.signal_id for each in await storage.list()] == ["s-2", "s-1"]
    assert [each.signal_id for each in await storage.list(status="closed")] == ["s-1"]
    assert await storage.list(symbol="ETHUSDT") == []
    last = await recent.get(**RECENT)
    assert last is not None
    assert last.signal_id == "s-2"


async def test_events_that_come_again_change_nothing(kit: bk.Kit) -> None:
    events = [opened("s-1"), closed("s-1", 5)]
    await observe(kit, events)
    before = await kit.records.storage.list(), await kit.records.notification.list()
    await observe(kit, events)
    await observe(kit, events[1:])
    assert (await kit.records.storage.list(), await kit.records.notification.list()) == before
    assert [each.kind for each in before[1]] == ["closed", "opened"]
    assert "closed long at 110, take profit: +9.50 %" in before[1][0].text


async def test_changes_of_one_minute_are_told_apart(kit: bk.Kit) -> None:
    event = opened("s-1")
    first, second = (
        bk.PositionChanged(
            identity=IDENTITY,
            when_ms=event.when_ms,
            price=100.0,
            position=msgspec.structs.replace(event.position, moved_stop_loss=stop),
            change="stop_moved",
        )
        for stop in (95.0, 96.0)
    )
    await observe(kit, [first, second, first])
    assert len(await kit.records.notification.list(kind="changed")) == 2


class Counting(MemoryStore):
    """Counts writes by contract."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: Counter[str] = Counter()

    async def put(self, write: Write) -> Record:
        self.writes[write.contract.name] += 1
        return await super().put(write)

    async def batch(self, writes: Any) -> None:
        self.writes.update(write.contract.name for write in writes)
        await super().batch(writes)


async def test_an_event_is_one_write_however_much_is_kept(tmp_path: Path) -> None:
    kit, store = bk.Kit(tmp_path), Counting()
    kit.persistence.bind("*", store)
    kit.persistence.bind("log", store)
    log = kit.records.of_run(IDENTITY, None).log(NOON_MS)
    for number in range(100):
        store.writes.clear()
        await observe(kit, [opened(f"s-{number}", number)])
        log.info("a line")
        await kit.records.log.flush()
        assert store.writes == {"storage": 1, "recent": 1, "notification": 1, "log": 1}
    await kit.close()


async def test_a_backtest_keeps_its_own(kit: bk.Kit, backtest: Callable[..., Any]) -> None:
    results = await asyncio.gather(backtest(trend, run_id="one"), backtest(trend, run_id="two"))
    for result in results:
        where: Any = {"mode": "backtest", "run_id": result.run_id}
        found = await kit.records.storage.list(**where)
        assert [each.signal_id for each in reversed(found)] == [trade.signal_id for trade in result.trades]
        assert [each.pnl_pct for each in reversed(found)] == [trade.pnl_pct for trade in result.trades]
        told = await kit.records.notification.list(kind="closed", **where)
        assert len(told) == len(result.trades) > 0
    assert await kit.records.storage.list() == []
    result = await backtest(trend)
    assert len(await kit.records.storage.list(mode="backtest", run_id=result.run_id)) == len(result.trades)
    assert len(await kit.records.storage.list(mode="backtest", run_id="one")) == len(results[0].trades)


async def test_backtests_keep_it_in_memory_and_write_it_down_when_asked(tmp_path: Path) -> None:
    kit = bk.Kit(tmp_path)
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
    kit.add_frame_schema("day", start_date="2024-06-01", end_date="2024-06-02")
    kit.add_strategy_schema("trend", interval="15m", get_signal=trend)
    where: Any = {"strategy_name": "trend", "exchange_name": "demo", "frame_name": "day"}
    result = await kit.backtest.background("BTCUSDT", **where)
    by_door = [key async for key, _ in kit.persistence.storage.list(mode="backtest", run=result.run_id)]
    assert len(by_door) == len(result.trades)
    assert not list(tmp_path.rglob("storage"))
    # The same run goes on elsewhere, after it was looked at.
    await kit.backtest.background("ETHUSDT", **where, run_id=result.run_id)
    found = await kit.records.storage.list(mode="backtest", run_id=result.run_id)
    assert {each.symbol for each in found} == {"BTCUSDT", "ETHUSDT"}
    last = await kit.records.recent.get(symbol="BTCUSDT", mode="backtest", run_id=result.run_id, **where)
    assert last is not None
    assert last.signal_id == result.trades[-1].signal_id
    await kit.close()


async def test_a_failed_run_is_an_alarm(kit: bk.Kit, backtest: Callable[..., Any]) -> None:
    async def fail(ctx: bk.Context) -> None:
        raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        await backtest(fail, run_id="bad")
    (told,) = await kit.records.notification.list(mode="backtest", run_id="bad")
    assert (told.kind, told.severity) == ("failed", "alarm")
    assert "no luck" in told.text


@pytest.mark.sampled
@settings(max_examples=size(10, 30))
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.booleans()), min_size=1, max_size=12))
def test_no_read_shows_what_came_later(steps: list[tuple[str, int, bool]]) -> None:
    async def main() -> None:
        kit = kit_on("memory:", Path("unused"))
        for name, minute, ends in steps:
            await observe(kit, [(closed if ends else opened)(name, minute)])
            kit.records.of_run(IDENTITY, None).log(NOON_MS + minute * MINUTE_MS).info(name)
        for minute in range(-1, 21):
            when = NOON_MS + minute * MINUTE_MS
            records = kit.records
            seen = [each.updated_at_ms for each in await records.storage.list(when=when)]
            seen += [each.when_ms for each in await records.notification.list(when=when)]
            seen += [each.when_ms or 0 for each in await records.log.list(when=when)]
            one = [await records.storage.get(name, when=when) for name in "abc"]
            one.append(await records.recent.get(**RECENT, when=when))
            seen += [each.updated_at_ms for each in one if each is not None]
            assert all(moment <= when for moment in seen)
        assert len(await kit.records.log.list()) == len(steps)
        await kit.close()

    asyncio.run(main())


@pytest.mark.parametrize("mode", ["live", "paper", "backtest"])
def test_a_notification_says_what_it_was_traded_with(mode: Mode) -> None:
    told = notification_of(opened("s-1", 1, bk.Identity("BTCUSDT", "trend", "binance", "", mode)))
    assert told is not None
    assert (
        told.text == f"2024-06-01T12:01Z {mode} BTCUSDT trend: opened long 50 from 100, take profit 110, stop loss 90"
    )


def test_runs_whose_names_read_alike_have_news_of_their_own() -> None:
    runs = [bk.Identity("BTC", "a-b", "c", "", "live"), bk.Identity("BTC", "a", "b-c", "", "live")]
    errors = [bk.StrategyFailed(identity=run, when_ms=NOON_MS, what="manage", error=ValueError("no")) for run in runs]
    told = [notification_of(each) for each in errors]
    assert None not in told
    assert len({each.notification_id for each in told if each}) == 2


async def test_who_was_overtaken_does_not_undo_what_came_after_him(kit: bk.Kit) -> None:
    await observe(kit, [opened("s-1", 1)])
    await observe(kit, [closed("s-1", 5)])
    store = kit.persistence.store_for(CONTRACTS["recent"], "live")
    key = ("trend", "binance", "", "BTCUSDT", False)
    before = await store.get(CONTRACTS["recent"], key)
    assert before is not None
    await observe(kit, [opened("s-1", 1)])  # by a process that was paused, and has been taken over since
    await observe(kit, [closed("s-1", 5)])
    (signal,) = await kit.records.storage.list()
    assert signal.status == "closed"
    assert await store.get(CONTRACTS["recent"], key) == before


async def test_a_signal_that_is_over_stays_over_whatever_the_clock_was_set_to(kit: bk.Kit) -> None:
    await observe(kit, [opened("s-1", 60)])
    await observe(kit, [closed("s-1", 30)])
    for again in ([], [opened("s-1", 60)], [opened("s-1", 61)]):
        if again:
            await observe(kit, again)
        (signal,) = await kit.records.storage.list()
        assert (signal.status, signal.pnl_pct) == ("closed", 9.5)
        recent = await kit.records.recent.get(**RECENT)
        assert recent is not None
        assert recent.status == "closed"
    await observe(kit, [opened("s-2", 40)])
    later = await kit.records.storage.get("s-2")
    assert later is not None
    assert later.status == "opened"
