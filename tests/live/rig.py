"""A stepped market, a venue that does as it is told, and kits that come and go on one store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import backtest_kit as bk
from backtest_kit.broker.order_ids import PARTS, parse
from backtest_kit.errors import Outcome
from backtest_kit.market.clock import SteppedClock
from backtest_kit.model.interval import MINUTE_MS, to_ms
from backtest_kit.persist.store import Store

START = to_ms("2024-06-01T10:00")
WHERE: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "demo", "allow_weak": True}


def written(order: bk.Order) -> str:
    """The id of an order as people write it: signal id, kind and number."""
    order_id = parse(order.client_order_id)
    assert order_id is not None, order
    return f"{order.signal_id}-{order_id.kind}{order_id.number // PARTS}"


class UntilClock(SteppedClock):
    """Steps as fast as its one user works, up to `end_ms`; `over` is set once he waits for more."""

    def __init__(self, start_ms: int, end_ms: int) -> None:
        super().__init__(start_ms, sleepers=1)
        self.end_ms = end_ms
        self.over = asyncio.Event()

    async def sleep_until(self, when_ms: int, name: str = "") -> None:
        if when_ms > self.end_ms:
            self.over.set()
            await asyncio.get_running_loop().create_future()
        await super().sleep_until(when_ms, name)


class Venue(bk.Broker):
    """Fills what it is sent at the engine's price, remembers it for ever, and fails as scripted.

    `script` says by hook and number of the call what goes wrong: "lost_request" and "lost_response" raise with an
    unknown outcome before and after the order is carried out, "not_done" and "rejected" as they say.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, int]] = []
        """Hook, client order id as people write it, attempt."""
        self.done: dict[tuple[str, str], bk.Fill] = {}
        self.times_done: dict[str, int] = {}
        """Fills by client order id; an entry that only rests is none."""
        self.script: dict[tuple[str, int], str | Callable[[], Any]] = {}
        self.counts: dict[str, int] = {}
        self.find_fails = 0
        self.check: Callable[[Any], Any] | None = None
        self.held: list[bk.VenuePosition] | None = None
        self.price: Callable[[bk.Order], float] = lambda order: order.price

    async def find(self, order: bk.Order) -> bk.OrderReport:
        self.calls.append(("find", written(order), order.attempt))
        if self.find_fails:
            self.find_fails -= 1
            raise bk.OrderTransient("the venue is away", outcome=Outcome.UNKNOWN)
        placed = self.done.get(("place", written(order)))
        fill = self.done.get((order.kind, written(order)))
        if fill is None:
            return bk.OrderReport(status="resting" if placed and order.kind == "activate" else "absent")
        if order.kind == "cancel":
            return bk.OrderReport(status="cancelled")
        return bk.OrderReport(status="resting" if order.kind == "place" else "filled", fill=fill)

    async def _do(self, hook: str, order: bk.Order) -> bk.Fill:
        self.calls.append((hook, written(order), order.attempt))
        number = self.counts[hook] = self.counts.get(hook, 0) + 1
        fault = self.script.get((hook, number)) or self.script.get((hook, 0))
        if callable(fault):
            fault = await fault() if asyncio.iscoroutinefunction(fault) else fault()
        if fault == "lost_request":
            raise bk.OrderTransient("no answer", outcome=Outcome.UNKNOWN)
        if fault == "not_done":
            raise bk.OrderTransient("the venue is busy", outcome=Outcome.NOT_DONE)
        if fault == "rejected":
            raise bk.OrderRejected("insufficient funds")
        price = self.price(order)
        quantity = order.cost / price if hook in ("open", "activate", "add") else order.quantity or 0.0
        fill = bk.Fill(price=price, cost=order.cost, quantity=quantity, timestamp=order.when_ms)
        if hook != "place":
            self.times_done[written(order)] = self.times_done.get(written(order), 0) + 1
        self.done[order.kind, written(order)] = fill
        if fault == "lost_response":
            raise bk.OrderTransient("the answer was lost", outcome=Outcome.UNKNOWN)
        return fill

    async def open_position(self, order: bk.Order) -> bk.Fill | None:
        await self._do("activate" if order.kind == "activate" else "open", order)
        return None

    async def place_entry(self, order: bk.Order) -> None:
        await self._do("place", order)

    async def cancel_entry(self, order: bk.Order) -> bk.Fill | None:
        await self._do("cancel", order)
        return None

    async def close_position(self, order: bk.Order) -> bk.Fill | None:
        await self._do("close", order)
        return None

    async def add_to_position(self, order: bk.Order) -> bk.Fill | None:
        await self._do("add", order)
        return None

    async def reduce_position(self, order: bk.Order) -> bk.Fill | None:
        await self._do("reduce", order)
        return None

    async def move_stop(self, order: bk.Order) -> None:
        await self._do("move_stop", order)

    async def move_take(self, order: bk.Order) -> None:
        await self._do("move_take", order)

    async def check_position(self, position: bk.Position) -> bk.Fill | None:
        return None if self.check is None else self.check(position)

    async def check_entry(self, entry: bk.RestingEntry) -> bk.Fill | None:
        return None if self.check is None else self.check(entry)

    async def holdings(self, symbols: Sequence[str]) -> list[bk.VenuePosition] | None:
        return self.held

    def sent(self, *hooks: str) -> list[tuple[str, str, int]]:
        return [call for call in self.calls if call[0] in hooks or not hooks]


class Rig:
    """One venue and one store, and a kit at a time that trades on them."""

    made: ClassVar[list[Rig]] = []
    """Those of the test that runs, which are closed after it."""

    def __init__(self, tmp_path: Path, store: Store) -> None:
        self.made.append(self)
        self.kits: list[bk.Kit] = []
        self.tmp_path = tmp_path
        self.store = store
        self.venue = Venue()
        self.source: bk.market.sources.base.CandleSource = bk.sources.synthetic(seed=7)
        self.strategy: dict[str, Any] = {"get_signal": always_long, "interval": "15m"}
        self.settings: dict[str, Any] = {}
        self.events: list[bk.Event] = []
        self.risks: dict[str, Any] = {}
        self.begin_ms = self.now_ms = START
        self.turns = 0

    def kit(self, clock: Any) -> bk.Kit:
        kit = bk.Kit(self.tmp_path / "dump")
        self.kits.append(kit)
        kit.set_config(CC_GET_CANDLES_RETRY_COUNT=1, **self.settings)
        kit.persistence.bind("*", self.store)
        for name, validations in self.risks.items():
            kit.add_risk_schema(name, validations=validations)
        kit.add_exchange_schema("demo", source=self.source, broker=self.venue, clock=clock)
        kit.add_strategy_schema("trend", **self.strategy)
        kit.on(bk.Event, self.events.append)
        return kit

    async def trade(self, minutes: int, *, symbol: str = "BTCUSDT", **options: Any) -> LiveEnd:
        """Trade so many minutes from where it was left, then cancel the run: for the state, that is a crash."""
        clock = UntilClock(self.now_ms, self.now_ms + minutes * MINUTE_MS)
        kit = self.kit(clock)
        handle = kit.live.background(symbol, **{**WHERE, **options})
        over = asyncio.ensure_future(clock.over.wait())
        await asyncio.wait({over, handle.task}, return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        self.now_ms = clock.now_ms()
        end = LiveEnd(handle, handle.status, tuple(handle._run.hooks.trades))
        handle.cancel()
        await asyncio.wait({handle.task})
        if not handle.task.cancelled() and (error := handle.task.exception()) is not None:
            raise error
        return end

    async def close(self) -> None:
        """Let go of files and threads, which no crash in the same process takes away."""
        for kit in self.kits:
            await kit.close()
        await self.store.close()

    def trades(self) -> list[bk.Trade]:
        return [event.trade for event in self.events if isinstance(event, bk.PositionClosed)]

    def of(self, *kinds: type[bk.Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kinds)]


@asynccontextmanager
async def running(rig: Rig, minutes: int, **options: Any) -> AsyncIterator[tuple[bk.LiveHandle, UntilClock]]:
    clock = UntilClock(rig.now_ms, rig.now_ms + minutes * MINUTE_MS)
    handle = rig.kit(clock).live.background("BTCUSDT", **{**WHERE, **options})
    try:
        yield handle, clock
    finally:
        handle.cancel()
        await asyncio.wait({handle.task})


class LiveEnd:
    def __init__(self, handle: bk.LiveHandle, status: bk.LiveStatus, trades: tuple[bk.Trade, ...]) -> None:
        self.handle, self.status, self.trades = handle, status, trades


async def always_long(ctx: bk.Context) -> bk.Signal | None:
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1, minutes=600)
