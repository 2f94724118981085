"""A program that dies at any request for a position in parts: the next one finds every order and stops all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Literal

import pytest
from tests.broker.conftest import PRICE, Bench, Kind, MakeBench, again, order, position
from tests.samples import PROVING, sample

from backtest_kit.broker.base import Fill, Order
from backtest_kit.broker.ccxt import CcxtBroker
from backtest_kit.broker.order_ids import SignalIds
from backtest_kit.venue.exchange import ClientIds
from backtest_kit.venue.faults import Fault, Faults, Strike
from backtest_kit.venue.orders import Limits

pytestmark = [pytest.mark.crash, pytest.mark.slow]
Fate = Literal["arrived", "lost"]
"""What becomes of the request at which the program dies."""
LENGTH = 13
"""Changes of the exchange that each story has at least."""
LARGEST = 0.01
HELD = {"open": 0.018, "add": 0.023, "move_stop": 0.023, "reduce": 0.009, "close": 0.0}
"""By kind of the order that was carried out last. The reduction takes two market orders, and the close one."""


class Cut(Faults):
    """Ends the program at its next change of the exchange but `after`."""

    def __init__(self, after: int, fate: Fate, end: Callable[[], Any]) -> None:
        super().__init__()
        self.after, self.fate, self.end, self.done = after, fate, end, False

    def strike(self, method: str, path: str) -> Strike:
        if method != "GET" and "rder" in path and not self.done:
            self.after -= 1
            if self.after < 0:
                self.done = True
                self.end()
                return Strike((Fault(kind="lose_request"),) if self.fate == "lost" else ())
        return super().strike(method, path)


def story(signal_id: str) -> list[Order]:
    stop_loss, moved = PRICE * 0.95, PRICE * 0.97
    return [
        order("open", signal_id=signal_id, cost=900.0),
        order("add", 1, signal_id=signal_id, cost=250.0, stop_loss=stop_loss),
        order("move_stop", 2, signal_id=signal_id, stop_loss=moved),
        order("reduce", 3, signal_id=signal_id, quantity=0.014, stop_loss=moved),
        order("close", 4, signal_id=signal_id, quantity=0.009, stop_loss=moved),
    ]


async def carry_out(broker: CcxtBroker, wanted: Order) -> Fill | None:
    """What the engine does: look an order up that it may have sent before, and send what is not there."""
    if wanted.attempt:
        report = await broker.find(wanted)
        if report.status != "absent":
            return report.fill
    hooks: dict[str, Callable[[Order], Any]] = {
        "open": broker.open_position,
        "add": broker.add_to_position,
        "move_stop": broker.move_stop,
        "reduce": broker.reduce_position,
        "close": broker.close_position,
    }
    fill: Fill | None = await hooks[wanted.kind](wanted)
    return fill


async def settled(venue: Bench) -> None:
    """Until the exchange has dealt with all that was sent."""
    while any("outcome" not in request for request in venue.server.requests):
        await asyncio.sleep(0)


async def played(venue: Bench, after: int, fate: Fate) -> bool:
    """Play the story, cut off at a change of the exchange; whether it was."""
    signal_id = f"{fate}-{after}"
    ids, cut = SignalIds(signal_id), Cut(after, fate, lambda: life.cancel())
    venue.server.faults = cut
    life: asyncio.Task[Any]
    fills: dict[str, Fill] = {}
    broker = await venue.broker(max_slippage_pct=0.5, arrival_ms=1)
    for wanted in story(signal_id):
        where = f"{wanted.kind}, {fate} at change {after}"
        life = asyncio.create_task(carry_out(broker, wanted))
        await asyncio.wait([life])
        if life.cancelled():
            await settled(venue)
            if venue.kind == "futures" and wanted.kind in ("move_stop", "reduce"):
                covered = sum(quantity for _, quantity, _ in venue.stops())
                assert covered >= venue.held() - 1e-9, f"{where}: a future is never without its stops"
            broker = await venue.broker(max_slippage_pct=0.5, arrival_ms=1)
            fill = await carry_out(broker, again(wanted))
        else:
            fill = life.result()
        if fill is not None:
            fills[wanted.kind] = fill
        assert venue.held() == pytest.approx(HELD[wanted.kind], abs=1e-9), where
        stops = venue.stops()
        assert sum(quantity for _, quantity, _ in stops) == pytest.approx(HELD[wanted.kind], abs=1e-9), where
        assert all(quantity <= LARGEST and trigger == wanted.stop_loss for _, quantity, trigger in stops), where
        if wanted.kind in ("open", "add"):
            held = position(story(signal_id)[0], *(fills[kind] for kind in ("open", "add") if kind in fills))
            assert await broker.check_position(held) is None
            assert venue.stops() == stops, f"{where}: nothing was left to be healed"
    assert venue.open_orders() == []
    assert [fills[kind].quantity for kind in ("open", "add", "reduce", "close")] == [0.018, 0.005, 0.014, 0.009]
    ours = [times for name, times in venue.filled_orders().items() if ids.kind(name) is not None]
    assert set(ours) == {1}, "no client id was filled twice"
    return cut.done


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["spot", "futures"])
@pytest.mark.parametrize(("rule", "fate"), [("open", "arrived"), ("open", "lost"), ("ever", "arrived")])
async def test_cut_off_at_every_change_it_ends_the_same(
    bench: MakeBench, kind: Kind, rule: ClientIds, fate: Fate
) -> None:
    limits = Limits(max_market_quantity=Decimal(str(LARGEST)), max_stops=5)
    venue = await bench(kind, limits=limits, client_ids=rule, fees_in="quote")
    for after in sample(range(LENGTH), 3, f"cut off, {kind} {rule} {fate}"):
        assert await played(venue, after, fate), "the story is that long"
    after = LENGTH
    while PROVING and await played(venue, after, fate):
        after += 1
