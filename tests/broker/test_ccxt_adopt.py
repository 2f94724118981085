"""A position whose store is gone, adopted from what the exchange still has of it."""

from __future__ import annotations

import pytest
from tests.broker.conftest import PRICE, SIGNAL, START, Kind, MakeBench, order

import backtest_kit as bk
from backtest_kit.broker.ccxt import CcxtBroker
from backtest_kit.engine.step import Holding, Rules, Tick
from backtest_kit.model.event import PositionOpened
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.run.live.orphans import OrphanGuard
from backtest_kit.run.live.other_positions import OtherPositions
from backtest_kit.run.live.position_state import PositionState
from backtest_kit.run.run_state import RunState
from backtest_kit.settings import Settings


class Books:
    """Those of a run that holds nothing."""

    stopping = False

    def __init__(self, broker: CcxtBroker) -> None:
        self.states: list[Holding] = []
        self.protect = broker.move_stop

    async def adopt(self, state: Holding, event: PositionOpened) -> tuple[PositionOpened, ...]:
        self.states.append(state)
        return (event,)


async def adopted(broker: CcxtBroker, price: float) -> Holding:
    identity = Identity("BTCUSDT", "trend", "binance", "", "live")
    run_state = RunState(Rules(identity=identity, settings=Settings(), interval_ms=MINUTE_MS))
    run_state.tick = Tick.flat(START, price)
    books = Books(broker)
    scope = ("trend", "binance", "BTCUSDT")
    persistence = bk.Kit().persistence
    persistence.bind("*", MemoryStore())
    guard = OrphanGuard(run_state, broker, "adopt", books, OtherPositions(persistence, "live", scope))
    found = await guard.compare(START, lambda: {scope: PositionState()})
    assert found.no_entry
    assert await guard.report(found, []) is not None
    (state,) = books.states
    return state


@pytest.mark.parametrize("signal_id", [SIGNAL, "a name that no exchange takes, and far too long for one"])
@pytest.mark.parametrize("kind", ["spot", "futures"])
async def test_an_adopted_position_is_held_with_its_own_stop_and_closed_for_good(
    bench: MakeBench, kind: Kind, signal_id: str
) -> None:
    venue = await bench(kind)
    broker = await venue.broker()
    fill = await broker.open_position(order(signal_id=signal_id))
    assert fill is not None
    (stop,) = venue.stops()
    state = await adopted(broker, fill.price)
    later = await venue.broker()
    assert await later.check_position(state.position) is None
    assert venue.stops() == [stop]
    closing = order("close", signal_id=state.position.signal_id, stop_loss=state.position.stop_loss)
    closed = await later.close_position(closing)
    assert closed is not None
    assert closed.quantity == pytest.approx(fill.quantity, abs=0.00003)
    assert venue.held() == pytest.approx(0, abs=0.00003)
    assert venue.open_orders() == []


async def test_the_stop_of_an_adopted_position_is_its_own(bench: MakeBench) -> None:
    venue = await bench("futures")
    broker = await venue.broker()
    await venue.by_hand("buy", 0.02)
    state = await adopted(broker, PRICE)
    (stop,) = venue.stops()
    assert await (await venue.broker()).check_position(state.position) is None
    assert venue.stops() == [stop]
