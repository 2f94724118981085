from __future__ import annotations

from decimal import Decimal
from typing import Any, get_args

import pytest
from hypothesis import given, strategies as st

from backtest_kit.venue.account import FuturesAccount, SpotAccount
from backtest_kit.venue.exchange import ClientIds, ClosedMinute, Exchange, Terms
from backtest_kit.venue.orders import Kind, Limits, Market, NewOrder, Refused

MARKET = Market.of("BTCUSDT", 50_000)
MINUTE_MS = 60_000
BEGIN = Decimal(100_000)

prices = st.integers(45_000, 55_000).map(lambda whole: Decimal(whole).quantize(MARKET.tick_size))
quantities = st.integers(100, 60_000).map(lambda lots: lots * MARKET.lot_size)
rarely = st.sampled_from([False, False, False, False, True])
new_orders = st.builds(
    NewOrder,
    symbol=st.just("BTCUSDT"),
    side=st.sampled_from(["buy", "sell"]),
    type=st.sampled_from(["market", "market", "limit", "limit", "stop", "take", "stop_limit", "take_limit"]),
    client_order_id=st.integers(1, 60).map("id-{}".format),
    quantity=quantities,
    price=prices,
    trigger=prices,
    reduce_only=rarely,
    post_only=rarely,
    immediate=rarely,
    group=st.sampled_from(["", "g1", "g2"]),
    protects=rarely,
)
minutes = st.lists(prices, min_size=4, max_size=4).map(
    lambda four: (four[0], max(four), min(four), four[3])  # open, high, low, close
)
orders_and_parts = st.tuples(new_orders, st.none() | st.sampled_from([Decimal("0.3"), Decimal("0.9")]))
steps = st.lists(orders_and_parts | orders_and_parts | minutes | st.integers(1, 12), min_size=8, max_size=30)


def exchange_at(price: str = "50000", kind: Kind = "futures", **terms: Any) -> Exchange:
    market = Market.of("BTCUSDT", 50_000, terms.get("limits"))
    exchange = Exchange(kind, [market], Terms(**terms))
    exchange.prices["BTCUSDT"] = Decimal(price)
    return exchange


def pass_minute(exchange: Exchange, open_: Any, high: Any, low: Any, close: Any) -> None:
    open_ms, exchange.now_ms = exchange.now_ms, exchange.now_ms + MINUTE_MS
    exchange.close_minute("BTCUSDT", ClosedMinute(open_ms, *map(Decimal, (open_, high, low, close))))


def run(exchange: Exchange, given_steps: list[Any]) -> None:
    for step in given_steps:
        try:
            if isinstance(step, int):
                if step in exchange.orders:
                    exchange.cancel("bot", "BTCUSDT", order_id=step)
            elif len(step) == 2:
                new, part = step
                limited = new.type in ("limit", "stop_limit", "take_limit")
                fields = {name: getattr(new, name) for name in new.__struct_fields__}
                if not limited:
                    fields["price"] = None
                exchange.place("bot", NewOrder(**fields), part=part)
            else:
                pass_minute(exchange, *step)
        except Refused:
            continue


@given(steps, st.sampled_from(get_args(Kind)), st.sampled_from([Decimal(1), Decimal("0.4")]))
def test_nothing_is_made_or_lost(given_steps: list[Any], kind: Kind, fraction: Decimal) -> None:
    exchange = exchange_at(kind=kind, fill_fraction=fraction)
    run(exchange, given_steps)
    account = exchange.account("bot")
    fills = exchange.fills
    bought = sum((fill.quantity for fill in fills if fill.side == "buy"), Decimal(0))
    sold = sum((fill.quantity for fill in fills if fill.side == "sell"), Decimal(0))
    quote_fees = sum((fill.fee for fill in fills if fill.fee_asset == "USDT"), Decimal(0))
    base_fees = sum((fill.fee for fill in fills if fill.fee_asset == "BTC"), Decimal(0))
    reserved = sum((order.reserved for order in exchange.open_orders("bot")), Decimal(0))
    if isinstance(account, SpotAccount):
        spent = sum((f.price * f.quantity * (1 if f.side == "buy" else -1) for f in fills), Decimal(0))
        assert account.free["USDT"] + account.locked.get("USDT", 0) == BEGIN - spent - quote_fees
        assert account.held(MARKET) == bought - sold - base_fees
        assert sum(account.locked.values(), Decimal(0)) == reserved
        assert min([*account.free.values(), *account.locked.values()]) >= 0
    else:
        assert isinstance(account, FuturesAccount)
        realized = sum((fill.realized for fill in fills), Decimal(0))
        # The average price of an entry has no end of digits.
        assert account.wallet == pytest.approx(BEGIN + realized - quote_fees, abs=Decimal("1e-15"))
        assert account.held(MARKET) == bought - sold
        assert account.reserved == reserved
        # Profit is what the trades brought, whatever was averaged on the way.
        held = account.held(MARKET)
        cash = sum((f.price * f.quantity * (-1 if f.side == "buy" else 1) for f in fills), Decimal(0))
        assert cash + held * account.position("BTCUSDT").price_open == pytest.approx(realized, abs=Decimal("1e-9"))


@given(steps, st.sampled_from(get_args(Kind)))
def test_orders_are_filled_within_their_bounds(given_steps: list[Any], kind: Kind) -> None:
    exchange = exchange_at(kind=kind, fill_fraction=Decimal("0.4"))
    run(exchange, given_steps)
    orders = list(exchange.orders.values())
    for order in orders:
        fills = [fill for fill in exchange.fills if fill.order_id == order.id]
        assert order.filled == sum((fill.quantity for fill in fills), Decimal(0))
        assert order.filled <= (order.quantity or 0)
        assert (order.status == "filled") == (order.filled == order.quantity and order.filled > 0)
        assert order.is_open or not order.reserved
        if order.price is not None:
            worst = max if order.side == "buy" else min
            assert all(worst(fill.price, order.price) == order.price for fill in fills)
        assert all(fill.price % MARKET.tick_size == 0 for fill in fills)
    assert [order for order in orders if order.is_open] == exchange.open_orders("bot")


@given(steps, st.sampled_from(get_args(ClientIds)))
def test_client_ids_name_one_order_ever_or_one_that_is_open(given_steps: list[Any], rule: ClientIds) -> None:
    exchange = exchange_at(client_ids=rule)
    run(exchange, given_steps)
    named = exchange.orders.values() if rule == "ever" else exchange.open_orders("bot")
    assert len({order.client_order_id for order in named}) == len(named)


@given(steps, st.sampled_from(get_args(Kind)))
def test_the_same_calls_have_the_same_results(given_steps: list[Any], kind: Kind) -> None:
    first, second = exchange_at(kind=kind), exchange_at(kind=kind)
    run(first, given_steps)
    run(second, given_steps)
    assert (first.fills, list(first.orders.values())) == (second.fills, list(second.orders.values()))


@given(steps)
def test_what_reduces_never_opens(given_steps: list[Any]) -> None:
    exchange = exchange_at()
    run(exchange, given_steps)
    held = Decimal(0)
    for fill in exchange.fills:
        after = held + (fill.quantity if fill.side == "buy" else -fill.quantity)
        if exchange.orders[fill.order_id].reduce_only:
            assert abs(after) < abs(held)
            assert after * held >= 0
        held = after


def new(type_: str, side: str = "buy", quantity: str = "0.01", **fields: Any) -> NewOrder:
    for name in {"price", "trigger"} & fields.keys():
        fields[name] = Decimal(fields[name])
    return NewOrder(
        symbol="BTCUSDT",
        side=side,  # type: ignore[arg-type]  # words of the tests
        type=type_,  # type: ignore[arg-type]
        client_order_id=fields.pop("id", f"{type_}-{side}"),
        quantity=Decimal(quantity),
        **fields,
    )


@pytest.mark.parametrize(
    ("order", "minute", "price"),
    [
        (new("limit", price="49900"), ("50000", "50010", "49900", "49950"), "49900"),
        (new("limit", price="49900"), ("50000", "50010", "49900.01", "49950"), None),
        (new("limit", price="49900"), ("49800", "49850", "49700", "49800"), "49900"),
        (new("limit", "sell", price="50100"), ("50000", "50100", "49990", "50050"), "50100"),
        (new("stop", "sell", trigger="49900"), ("50000", "50010", "49890", "49950"), "49895.01"),
        (new("stop", "sell", trigger="49900"), ("49800", "49850", "49700", "49800"), "49795.02"),
        (new("stop", "buy", trigger="50100"), ("50200", "50300", "50150", "50250"), "50205.02"),
        (new("take", "sell", trigger="50100"), ("50200", "50300", "50150", "50250"), "50194.98"),
        (new("take", "buy", trigger="49900"), ("50000", "50010", "49890", "49950"), "49904.99"),
        (new("stop_limit", "sell", trigger="49900", price="49850"), ("50000", "50010", "49890", "49950"), "49895.01"),
        (new("stop_limit", "sell", trigger="49900", price="49899"), ("50000", "50010", "49890", "49950"), "49899"),
        (new("stop_limit", "sell", trigger="49900", price="49850"), ("49800", "49820", "49790", "49810"), None),
    ],
)
def test_what_a_minute_does_to_an_order(order: NewOrder, minute: tuple[str, ...], price: str | None) -> None:
    exchange = exchange_at()
    exchange.place("bot", order)
    pass_minute(exchange, *minute)
    assert [str(fill.price) for fill in exchange.fills] == ([] if price is None else [price])


def test_an_order_placed_inside_a_minute_meets_all_of_it_but_not_its_open() -> None:
    exchange = exchange_at("49950")
    exchange.now_ms = 30_000
    exchange.place("bot", new("stop", "sell", trigger="49900"))
    exchange.now_ms = MINUTE_MS
    exchange.close_minute("BTCUSDT", ClosedMinute(0, *map(Decimal, ("49800", "49960", "49700", "49800"))))
    assert exchange.fills[0].price == Decimal("49895.01")  # its trigger less slippage, not the open before it


def test_the_stop_comes_before_the_take_in_one_minute() -> None:
    exchange = exchange_at()
    exchange.place("bot", new("market", group="p"))
    for type_, trigger in (("take", "50100"), ("stop", "49900")):
        protective = new(type_, "sell", trigger=trigger, reduce_only=True, protects=True, group="p")
        exchange.place("bot", protective)
    pass_minute(exchange, "50000", "50200", "49800", "50000")
    assert [fill.client_order_id for fill in exchange.fills] == ["market-buy", "stop-sell"]
    assert exchange.find("bot", client_order_id="take-sell").status == "expired"


def test_protection_sleeps_until_the_entry_is_filled() -> None:
    exchange = exchange_at()
    exchange.place("bot", new("limit", price="49900", group="p"))
    exchange.place("bot", new("stop", "sell", trigger="49800", reduce_only=True, protects=True, group="p"))
    exchange.place("bot", new("market", id="other", group="q"))
    exchange.place("bot", new("market", "sell", id="other-out", group="q", reduce_only=True))
    assert exchange.find("bot", client_order_id="stop-sell").is_open
    pass_minute(exchange, "50000", "50000", "49700", "49750")
    assert exchange.held("bot", "BTCUSDT", "p") == Decimal("0.01")
    pass_minute(exchange, "49750", "49760", "49740", "49750")
    assert exchange.held("bot", "BTCUSDT") == 0


def test_a_part_is_filled_and_the_rest_goes_on_or_expires() -> None:
    exchange = exchange_at()
    going_on = exchange.place("bot", new("market", id="a"), part=Decimal("0.3"))
    given_up = exchange.place("bot", new("market", id="b"), part=Decimal("0.3"), rest_expires=True)
    assert (going_on.status, str(going_on.filled)) == ("partly_filled", "0.00300")
    assert (given_up.status, str(given_up.filled)) == ("expired", "0.00300")
    for _ in range(3):
        pass_minute(exchange, "50000", "50000", "50000", "50000")
    assert (going_on.status, going_on.filled) == ("filled", Decimal("0.01"))
    assert [str(fill.quantity) for fill in exchange.fills if fill.order_id == going_on.id] == [
        "0.00300",
        "0.00300",
        "0.00300",
        "0.00100",
    ]


def test_a_client_id_is_free_again_once_its_order_is_done() -> None:
    exchange = exchange_at()
    exchange.place("bot", new("market", id="x"))
    exchange.place("bot", new("limit", price="49000", id="x"))
    with pytest.raises(Refused, match="x is taken by order 2"):
        exchange.place("bot", new("market", id="x"))


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (new("limit", price="49900.001"), "price_step"),
        (new("limit", price="49900", quantity="0.000001"), "quantity_step"),
        (new("limit", price="49900", quantity="0.00001"), "min_notional"),
        (new("limit", price="49900", quantity="100"), "no_funds"),
        (new("limit", price="50001", post_only=True), "would_match"),
        (new("stop", "sell", trigger="50001"), "would_trigger"),
        (new("market", "sell", reduce_only=True), "nothing_to_reduce"),
        (new("limit"), "invalid"),
        (new("stop"), "invalid"),
    ],
)
def test_refusals_change_nothing(order: NewOrder, reason: str) -> None:
    exchange = exchange_at()
    with pytest.raises(Refused) as refused:
        exchange.place("bot", order)
    assert refused.value.reason == reason
    account = exchange.account("bot")
    assert isinstance(account, FuturesAccount)
    assert not exchange.orders
    assert not exchange.fills
    assert (account.wallet, account.reserved) == (BEGIN, Decimal(0))
    exchange.place("bot", new("market", id=order.client_order_id))  # the id is not used up


LIMITS = Limits(
    max_quantity=Decimal("0.2"),
    max_market_quantity=Decimal("0.1"),
    max_notional=Decimal(5_000),
    min_price=Decimal(30_000),
    max_price=Decimal(90_000),
    price_band=(Decimal("0.9"), Decimal("1.1")),
    max_stops=1,
    max_orders=2,
)


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (new("limit", price="49000", quantity="0.1"), None),
        (new("limit", price="49000", quantity="0.10204"), None),
        (new("limit", price="49000", quantity="0.10205"), "max_notional"),
        (new("limit", price="49000", quantity="0.20001"), "max_quantity"),
        (new("market", quantity="0.1"), None),
        (new("market", quantity="0.10001"), "max_market_quantity"),
        (new("stop", trigger="60000", quantity="0.1"), None),
        (new("stop", trigger="60000", quantity="0.10001"), "max_market_quantity"),
        (new("take", trigger="40000", quantity="0.10001"), "max_market_quantity"),
        (new("stop_limit", trigger="51000", price="51000", quantity="0.09"), None),
        (new("stop_limit", trigger="51000", price="55000.01"), "price_above_band"),
        (new("limit", price="45000"), None),
        (new("limit", price="44999.99"), "price_below_band"),
        (new("limit", "sell", price="55000.01"), "price_above_band"),
        (new("stop", trigger="90000"), None),
        (new("stop", trigger="90000.01"), "price_range"),
        (new("stop", "sell", trigger="29999.99"), "price_range"),
    ],
)
def test_limits_are_taken_and_what_is_beyond_them_is_not(order: NewOrder, reason: str | None) -> None:
    exchange = exchange_at(limits=LIMITS)
    if reason is None:
        assert exchange.place("bot", order).client_order_id == order.client_order_id
        return
    with pytest.raises(Refused) as refused:
        exchange.place("bot", order)
    assert refused.value.reason == reason
    assert not exchange.orders


def test_open_orders_and_stops_are_counted_for_each_account() -> None:
    exchange = exchange_at(limits=LIMITS)
    exchange.place("bot", new("stop", trigger="60000"))
    with pytest.raises(Refused) as stops:
        exchange.place("bot", new("take", trigger="40000"))
    exchange.place("bot", new("limit", price="49000"))
    with pytest.raises(Refused) as orders:
        exchange.place("bot", new("limit", price="49000", id="third"))
    assert (stops.value.reason, orders.value.reason) == ("max_stops", "max_orders")
    assert exchange.place("bot", new("market")).status == "filled", "what does not rest is not counted"
    assert exchange.place("other", new("take", trigger="40000")).is_open
    exchange.cancel("bot", "BTCUSDT", client_order_id="stop-buy")
    assert exchange.place("bot", new("take", trigger="40000")).is_open


def test_two_positions_of_a_symbol_are_kept_apart() -> None:
    exchange = exchange_at()
    exchange.place("bot", new("market", id="a", group="a"))
    exchange.place("bot", new("market", id="b", quantity="0.02", group="b"))
    exchange.place("bot", new("market", "sell", id="a-close", quantity="0.5", reduce_only=True, group="a"))
    assert (exchange.held("bot", "BTCUSDT", "a"), exchange.held("bot", "BTCUSDT", "b")) == (Decimal(0), Decimal("0.02"))
    exchange.place("bot", new("market", "sell", id="by-hand", quantity="0.02"))
    assert exchange.held("bot", "BTCUSDT", "b") == 0
