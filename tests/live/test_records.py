"""What live and paper runs remember, over restarts, and what people hear of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.live.failing_store import FailingStore
from tests.live.rig import START, Rig
from tests.live.scenario import LASTING, MINUTES, facts, prepared

import backtest_kit as bk
from backtest_kit.format import describe
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.persist.store import Store
from backtest_kit.records.notification import Notification

IDENTITY = bk.Identity("BTCUSDT", "trend", "demo", "", "live")
HERE: dict[str, Any] = {"symbol": "BTCUSDT", "strategy_name": "trend", "exchange_name": "demo"}


class RecordsRig(Rig):
    """A rig whose strategy uses every record, with the decorators of the kit that trades."""

    def __init__(self, tmp_path: Path, store: Store) -> None:
        super().__init__(tmp_path, store)
        self.minutes: list[int] = []
        self.questions: list[str] = []
        self.reports: list[int] = []
        self.told: list[Notification] = []
        self.sinks: list[Any] = []
        self.last: bk.Kit | None = None
        self.strategy = {"get_signal": self.get_signal, "interval": "1m"}

    def kit(self, clock: Any) -> bk.Kit:
        kit = self.last = super().kit(clock)

        @kit.records.measure.cached("1h", key=lambda ctx, question: question, name="ask", version="1")
        async def ask(ctx: bk.Context, question: str) -> str:
            self.questions.append(question)
            return f"{question} no"

        @kit.records.interval.once("1h", name="report")
        async def report(ctx: bk.Context) -> None:
            self.reports.append(ctx.when_ms)

        self.ask, self.report = ask, report
        for sink in self.sinks:
            kit.records.notification.sink(sink, name="test")
        return kit

    async def get_signal(self, ctx: bk.Context) -> None:
        self.minutes.append(ctx.when_ms)
        await ctx.state("asked").update(lambda count: count + 1, 0)
        await ctx.session.update(lambda minutes: [*minutes, ctx.when_ms], [])
        await ctx.memory("notes").write(f"{ctx.when:%H:%M}", f"the price was {ctx.price:.0f}")
        assert await self.ask(ctx, "up?") == "up? no"
        await self.report(ctx)
        ctx.log.info("asked", price=ctx.price)


@pytest.mark.parametrize("mode", ["live", "paper"])
async def test_records_go_on_after_a_restart(tmp_path: Path, store: Store, mode: Any) -> None:
    rig = RecordsRig(tmp_path, store)
    for _ in range(3):
        await rig.trade(4, paper=mode == "paper")
    assert len(rig.minutes) == 13
    assert rig.questions == ["up?"]
    assert rig.reports == [START]
    assert rig.last is not None
    records = rig.last.records
    assert await records.state("asked", **HERE, mode=mode).get() == 13
    assert await records.session(**HERE, mode=mode).get() == rig.minutes
    notes = await records.memory("notes", **HERE, mode=mode).list()
    assert [note.when_ms for note in reversed(notes)] == rig.minutes
    found = await records.memory("notes", **HERE, mode=mode).search("10:07")
    assert found[0].memory_id == "10:07"
    lines = await records.log.list(mode=mode)
    assert [line.when_ms for line in reversed(lines)] == rig.minutes
    await rig.last.close()


async def test_an_hour_later_the_work_of_an_interval_is_due_again(tmp_path: Path) -> None:
    rig = RecordsRig(tmp_path, bk.MemoryStore())
    await rig.trade(30, paper=True)
    await rig.trade(60, paper=True)
    assert rig.reports == [START, START + 60 * MINUTE_MS]
    assert len(rig.questions) == 2


async def test_state_and_memory_of_a_position_stay_with_it_over_a_restart(rig: Rig) -> None:
    seen: list[tuple[Any, Any]] = []

    async def get_signal(ctx: bk.Context) -> bk.Signal:
        await ctx.memory("plan").write("thesis", "it rises")
        return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=5, stop_loss_pct=5)

    async def manage(ctx: bk.Context) -> None:
        count = await ctx.state("minutes").update(lambda count: count + 1, 0)
        seen.append((count, await ctx.memory("plan").read("thesis")))

    rig.strategy = {"get_signal": get_signal, "manage": manage, "interval": "15m"}
    await rig.trade(3)
    await rig.trade(3)
    assert seen == [(count, "it rises") for count in range(1, len(seen) + 1)]
    assert len(seen) > 6


async def test_every_signal_and_every_event_is_kept_once_whenever_a_run_was_cut_off(tmp_path: Path) -> None:
    rig = prepared(RecordsRig(tmp_path, bk.MemoryStore()))
    assert isinstance(rig, RecordsRig)
    for _ in range(MINUTES // 2):
        await rig.trade(2)
    assert rig.last is not None
    records, trades = rig.last.records, rig.trades()
    stored = await records.storage.list()
    closed = [each for each in reversed(stored) if each.status == "closed"]
    assert [(each.signal_id, each.pnl_pct) for each in closed] == [(each.signal_id, each.pnl_pct) for each in trades]
    recent = await records.recent.get(**HERE)
    assert recent is not None
    assert recent.signal_id == stored[0].signal_id
    told = await records.notification.list()
    kinds = [each.kind for each in reversed(told)]
    lasting = {event.action for event in rig.of(*LASTING)}
    assert len([kind for kind in kinds if kind in lasting]) == len(facts(rig.events))
    assert kinds.count("recovered") == MINUTES // 2
    assert len({each.notification_id for each in told}) == len(told)


async def test_what_could_not_be_kept_is_told_at_once_and_kept_later(tmp_path: Path) -> None:
    store = FailingStore()
    rig = prepared(RecordsRig(tmp_path, store))
    assert isinstance(rig, RecordsRig)
    heard = asyncio.Event()

    async def listen(notification: Notification) -> None:
        rig.told.append(notification)
        if notification.kind == "store_degraded":
            heard.set()

    async def full_at_8(event: bk.PositionOpened) -> None:
        store.error = bk.OutOfSpace("the disk is full")

    async def listened(ctx: bk.Context) -> None:
        await manage(ctx)
        if ctx.when_ms == START + 6 * MINUTE_MS:
            async with asyncio.timeout(120):
                await heard.wait()
            assert store.error is not None
            assert ctx.position is not None

    manage = rig.strategy["manage"]
    rig.strategy["manage"] = listened
    rig.sinks = [listen]
    kits = rig.kit

    def kit(clock: Any) -> bk.Kit:
        made = kits(clock)
        made.on(bk.PositionOpened, full_at_8, once=True)
        return made

    rig.kit = kit  # type: ignore[method-assign]
    await rig.trade(9)
    assert heard.is_set()
    assert rig.last is not None
    first = await rig.last.records.notification.list()
    assert "store_degraded" not in {each.kind for each in first}
    assert "closed" in {each.kind for each in rig.told}, "the sinks hear of a close that is not kept yet"
    store.error = None
    rig.kit = kits  # type: ignore[method-assign]
    rig.sinks = [listen]
    await rig.last.records.close()
    await rig.trade(1)
    assert rig.last is not None
    await rig.last.close()
    kept = {each.notification_id for each in await rig.last.records.notification.list()}
    closed = {each.notification_id for each in rig.told if each.kind == "closed"}
    assert closed
    assert closed <= kept


async def test_a_sink_that_had_it_without_the_store_is_spared_it_later(tmp_path: Path) -> None:
    store = FailingStore()
    rig = RecordsRig(tmp_path, store)
    rig.sinks = [rig.told.append]

    def failing_from_2_to_4(tick: bk.CronTick) -> None:
        minute = (tick.when_ms - START) // MINUTE_MS
        store.error = bk.RetryLater("the server is away") if 2 <= minute < 4 else None

    async def get_signal(ctx: bk.Context) -> None:
        if store.error is not None:
            raise ValueError("in the dark")

    kits = rig.kit

    def kit(clock: Any) -> bk.Kit:
        made = kits(clock)
        made.cron("failing", interval="1m", handler=failing_from_2_to_4)
        return made

    rig.kit = kit  # type: ignore[method-assign]
    rig.strategy = {"get_signal": get_signal, "interval": "1m"}
    await rig.trade(8)
    assert rig.last is not None
    await rig.last.close()
    kinds = [each.kind for each in rig.told]
    assert sorted(kinds) == sorted(set(kinds)), kinds
    assert {"recovered", "strategy_failed", "store_degraded", "store_recovered", "done"} <= set(kinds)
    kept = await rig.last.records.notification.list()
    assert {each.notification_id for each in rig.told} == {each.notification_id for each in kept}


def failures() -> list[tuple[bk.Event, str]]:
    at: dict[str, Any] = {"identity": IDENTITY, "when_ms": START}
    order: dict[str, Any] = {
        "kind": "close",
        "client_order_id": "s-1",
        "attempt": 2,
        "reason": "busy",
        "next_step": "again",
    }
    return [
        (bk.Recovered(**at), "info"),
        (bk.OrderFailed(**at, **order), "warning"),
        (bk.OrderFailed(**at, **order, alarm=True), "alarm"),
        (bk.StrategyFailed(**at, what="manage", error=ValueError("no")), "alarm"),
        (bk.StoreDegraded(**at, reason="disk full", kept=False), "alarm"),
        (bk.StoreRecovered(**at), "info"),
        (bk.OrphanFound(**at, what="missing_position", quantity=0.0, reason="none", next_step="look"), "alarm"),
        (bk.MinutesMissed(**at, count=3, first_ms=START, reason="slow"), "warning"),
        (bk.ClockJumped(**at, by_ms=-9), "warning"),
        (bk.Paused(**at, paused=True), "info"),
        (bk.RunFailed(**at, error=bk.Conflict("taken")), "alarm"),
        (bk.RunDone(**at, trades=()), "info"),
    ]


@pytest.mark.parametrize(("event", "severity"), failures(), ids=lambda value: getattr(value, "action", ""))
async def test_what_happens_to_a_run_is_told_once(event: bk.Event, severity: str, tmp_path: Path) -> None:
    kit = bk.Kit(tmp_path)
    kit.persistence.bind("*", bk.MemoryStore())
    for _ in range(2):
        await kit.records.of_run(IDENTITY, None).observe((event,))
    (told,) = await kit.records.notification.list()
    assert (told.kind, told.severity, told.symbol, told.when_ms) == (event.action, severity, "BTCUSDT", START)
    assert told.text == f"2024-06-01T10:00Z live BTCUSDT trend: {describe(event)}"
    await kit.close()


async def test_two_failures_of_one_minute_are_two_notifications(tmp_path: Path) -> None:
    kit = bk.Kit(tmp_path)
    kit.persistence.bind("*", bk.MemoryStore())
    await kit.records.of_run(IDENTITY, None).observe([event for event, _ in failures()])
    told = await kit.records.notification.list()
    assert len({each.notification_id for each in told}) == 11  # an order that is an alarm now is the same failure
    await kit.close()
