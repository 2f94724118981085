"""Commands: what each of them changes, and every reason to refuse it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st
from tests.values import make_entry, make_position

from backtest_kit.engine import commands
from backtest_kit.engine.commands import Refused
from backtest_kit.engine.pnl import effective_price, profit, remaining_cost
from backtest_kit.engine.position import close_trade
from backtest_kit.errors import UserError
from backtest_kit.model.position import Entry, Position
from backtest_kit.model.signal import Direction
from backtest_kit.settings import Settings, with_settings

SETTINGS = Settings()
ANYWHERE = with_settings(SETTINGS, {"CC_ENABLE_DCA_EVERYWHERE": True, "CC_ENABLE_TRAILING_EVERYWHERE": True})


def held(direction: Direction = "long", **fields: Any) -> Position:
    take, stop = (110.0, 90.0) if direction == "long" else (90.0, 110.0)
    position = make_position(make_entry("s", direction, take=take, stop=stop, minutes=math.inf))
    return msgspec.structs.replace(position, **fields)


class TestReduce:
    @pytest.mark.parametrize("price", [105.0, 95.0])
    def test_it_takes_a_part_of_what_is_held(self, price: float) -> None:
        once = commands.reduce(held(), price, 5, percent=40)
        assert remaining_cost(once.entries, once.reductions) == pytest.approx(60)
        twice = commands.reduce(once, price, 6, percent=50)
        assert remaining_cost(twice.entries, twice.reductions) == pytest.approx(30)
        assert [reduction.timestamp for reduction in twice.reductions] == [5, 6]
        assert not commands.is_closed(twice)

    def test_by_cost_it_takes_that_much(self) -> None:
        once = commands.reduce(held(), 105, 5, cost=25)
        assert remaining_cost(once.entries, once.reductions) == pytest.approx(75)
        all_of_it = commands.reduce(once, 105, 6, cost=75)
        assert commands.is_closed(all_of_it)
        with pytest.raises(Refused, match="cost is 80, and 75 is held"):
            commands.reduce(once, 105, 6, cost=80)

    @pytest.mark.parametrize("direction", ["long", "short"])
    def test_not_at_a_level(self, direction: Direction) -> None:
        take, stop = (110, 90) if direction == "long" else (90, 110)
        with pytest.raises(Refused, match="already at the take profit"):
            commands.reduce(held(direction), take, 5, percent=50)
        with pytest.raises(Refused, match="already at the stop loss"):
            commands.reduce(held(direction), stop, 5, percent=50)

    def test_not_after_everything(self) -> None:
        gone = commands.reduce(held(), 105, 5, percent=100)
        with pytest.raises(Refused, match="nothing is held"):
            commands.reduce(gone, 105, 6, percent=10)

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"percent": 5, "cost": 5},
            {"percent": 0},
            {"percent": 101},
            {"percent": "all"},
            {"percent": math.nan},
            {"cost": -1},
            {"cost": math.inf},
            {"percent": True},
        ],
    )
    def test_senseless_arguments(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(UserError):
            commands.reduce(held(), 105, 5, **arguments)


class TestAdd:
    @pytest.mark.parametrize(("direction", "better", "worse"), [("long", 95.0, 100.0), ("short", 105.0, 100.0)])
    def test_only_at_a_better_price_than_ever(self, direction: Direction, better: float, worse: float) -> None:
        more = commands.add(held(direction), better, 5, 50, SETTINGS)
        assert more.entries[-1] == Entry(better, 50.0, 5)
        assert more.cost == 150
        with pytest.raises(Refused, match="CC_ENABLE_DCA_EVERYWHERE"):
            commands.add(held(direction), worse, 5, 50, SETTINGS)
        with pytest.raises(Refused, match="not better than every entry"):
            commands.add(more, (better + worse) / 2, 6, 50, SETTINGS)
        assert commands.add(held(direction), worse, 5, 50, ANYWHERE).cost == 150

    def test_not_beyond_a_level(self) -> None:
        with pytest.raises(Refused, match="not between"):
            commands.add(held(), 90, 5, 50, SETTINGS)
        with pytest.raises(Refused, match="not between"):
            commands.add(held(), 110, 5, 50, ANYWHERE)

    @pytest.mark.parametrize("cost", [0, -5, math.nan, math.inf, "100", None, True])
    def test_the_cost_is_an_amount(self, cost: Any) -> None:
        with pytest.raises(UserError, match="cost is"):
            commands.add(held(), 95, 5, cost, SETTINGS)


class TestMoveStop:
    @pytest.mark.parametrize(("direction", "to", "loose"), [("long", 96.0, 89.0), ("short", 104.0, 111.0)])
    def test_towards_profit_only(self, direction: Direction, to: float, loose: float) -> None:
        moved = commands.move_stop(held(direction), 100, to, SETTINGS)
        assert (moved.stop_loss, moved.price_stop_loss) == (to, held(direction).price_stop_loss)
        with pytest.raises(Refused, match="no tighter than the one in force"):
            commands.move_stop(moved, 100, to, SETTINGS)
        with pytest.raises(Refused, match="no tighter"):
            commands.move_stop(held(direction), 100, loose, SETTINGS)
        assert commands.move_stop(held(direction), 100, loose, ANYWHERE).stop_loss == loose

    def test_it_may_go_past_the_entry_but_not_past_price_or_take_profit(self) -> None:
        assert commands.move_stop(held(), 106, 104, SETTINGS).stop_loss == 104
        with pytest.raises(Refused, match="already at or beyond a stop at 104"):
            commands.move_stop(held(), 104, 104, SETTINGS)
        with pytest.raises(Refused, match="beyond the take profit"):
            commands.move_stop(held(), 112, 110, SETTINGS)

    @pytest.mark.parametrize("price", [0, -1, math.nan, "95", None])
    def test_the_price_is_a_price(self, price: Any) -> None:
        with pytest.raises(UserError, match="price is"):
            commands.move_stop(held(), 100, price, SETTINGS)


class TestMoveTake:
    @pytest.mark.parametrize(("direction", "to", "far"), [("long", 106.0, 111.0), ("short", 94.0, 89.0)])
    def test_towards_the_entry_only(self, direction: Direction, to: float, far: float) -> None:
        moved = commands.move_take(held(direction), 100, to, SETTINGS)
        assert moved.take_profit == to
        with pytest.raises(Refused, match="no nearer than the one in force"):
            commands.move_take(held(direction), 100, far, SETTINGS)
        assert commands.move_take(held(direction), 100, far, ANYWHERE).take_profit == far

    def test_not_past_price_or_stop(self) -> None:
        with pytest.raises(Refused, match="already at or beyond a take profit at 104"):
            commands.move_take(held(), 104, 104, SETTINGS)
        with pytest.raises(Refused, match="beyond the stop loss"):
            commands.move_take(held(), 80, 90, SETTINGS)
        with pytest.raises(UserError, match="price is"):
            commands.move_take(held(), 100, math.inf, SETTINGS)


class TestBreakeven:
    @pytest.mark.parametrize(("direction", "edge", "short_of_it"), [("long", 100.6, 100.59), ("short", 99.4, 99.41)])
    def test_from_the_threshold_on(self, direction: Direction, edge: float, short_of_it: float) -> None:
        assert commands.breakeven(held(direction), edge + math.copysign(1e-9, edge - 100), SETTINGS).stop_loss == 100
        with pytest.raises(Refused, match="has not reached"):
            commands.breakeven(held(direction), short_of_it, SETTINGS)

    def test_the_threshold_follows_the_settings(self) -> None:
        free = with_settings(SETTINGS, {"CC_PERCENT_FEE": 0, "CC_PERCENT_SLIPPAGE": 0, "CC_BREAKEVEN_THRESHOLD": 0.1})
        assert commands.breakeven(held(), 100.11, free).stop_loss == 100

    def test_not_where_it_would_be_worse_or_useless(self) -> None:
        locked = commands.move_stop(held(), 106, 103, SETTINGS)
        with pytest.raises(Refused, match="already at breakeven"):
            commands.breakeven(locked, 106, SETTINGS)
        near = held(moved_take_profit=99.0)
        with pytest.raises(Refused, match="beyond the take profit"):
            commands.breakeven(near, 106, SETTINGS)

    @given(st.floats(1, 90), st.floats(90.1, 99))
    def test_a_second_time_is_refused_whatever_the_last_digit(self, percent: float, added: float) -> None:
        more = commands.add(held(), added, 5, 50, SETTINGS)
        safe = commands.breakeven(more, 109, SETTINGS)
        with pytest.raises(Refused, match="already at breakeven"):
            commands.breakeven(commands.reduce(safe, 109, 6, percent=percent), 109, SETTINGS)

    def test_of_a_position_that_was_added_to_it_is_the_effective_price(self) -> None:
        more = commands.add(held(), 95, 5, 100, SETTINGS)
        assert commands.breakeven(more, 99, SETTINGS).stop_loss == effective_price(more.entries)


@given(
    direction=st.sampled_from(["long", "short"]),
    script=st.lists(
        st.tuples(
            st.sampled_from(["reduce", "add", "move_stop", "move_take", "breakeven"]),
            st.floats(90.5, 109.5),
            st.floats(0.5, 100),
        ),
        max_size=25,
    ),
    last=st.floats(91, 109),
)
def test_money_is_conserved_over_any_sequence_of_commands(
    direction: Direction, script: list[tuple[str, float, float]], last: float
) -> None:
    """What comes out is what each part would have earned alone, in whatever order things happened."""
    position = held(direction)
    cost_in, quantity, basis, earned, fees = 100.0, 1.0, 100.0, 0.0, 0.0
    sign = 1 if direction == "long" else -1
    slip, fee = 0.001, 0.001
    for minute, (name, price, amount) in enumerate(script, 1):
        try:
            if name == "reduce":
                changed = commands.reduce(position, price, minute, percent=amount)
            elif name == "add":
                changed = commands.add(position, price, minute, amount, ANYWHERE)
            elif name == "breakeven":
                changed = commands.breakeven(position, price, SETTINGS)
            else:
                changed = getattr(commands, name)(position, price, 90 + amount / 5, ANYWHERE)
        except Refused:
            continue
        if name == "reduce":
            part = basis * amount / 100
            bought, sold = basis / quantity * (1 + sign * slip), price * (1 - sign * slip)
            earned += part * sign * (sold - bought) / bought
            fees += part * fee * sold / bought
            quantity *= 1 - amount / 100
            basis -= part
        elif name == "add":
            cost_in, quantity, basis = cost_in + amount, quantity + amount / price, basis + amount
        position = changed
        assert remaining_cost(position.entries, position.reductions) == pytest.approx(basis, abs=1e-9 * cost_in)
        assert sign * position.stop_loss < sign * position.take_profit
        if commands.is_closed(position):
            break
    if quantity > 1e-9:
        bought, sold = basis / quantity * (1 + sign * slip), last * (1 - sign * slip)
        earned += basis * sign * (sold - bought) / bought
        fees += basis * fee * sold / bought
    expected = earned - fees - cost_in * fee
    assert position.cost == pytest.approx(cost_in)
    assert profit(direction, position.entries, position.reductions, last, SETTINGS)[1] == pytest.approx(
        expected, rel=1e-9, abs=1e-9 * cost_in
    )
    trade = close_trade(position, "closed", last, 99, SETTINGS, "by hand")
    assert trade.pnl_cost == pytest.approx(expected, rel=1e-9, abs=1e-9 * cost_in)
    assert trade.close_note == "by hand"
