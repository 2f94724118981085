"""What counts on a spot market: what orders of this program bought and did not sell again, and nothing else."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from hypothesis import given, strategies as st

from backtest_kit.broker.ccxt_holdings import bought
from backtest_kit.broker.ccxt_market import ExchangeOrder, Market
from backtest_kit.broker.order_ids import SignalIds

LOT = Decimal("0.001")
MARKET = Market(
    symbol="BTC/USDT",
    base="BTC",
    quote="USDT",
    contract=False,
    contract_size=Decimal(1),
    lot=LOT,
    tick=Decimal("0.01"),
    min_quantity=LOT,
    min_cost=Decimal(5),
    market_stop=True,
)
PRICE = Decimal(50_000)
FEE = Decimal("0.001")


class Account:
    """Orders of an account, one a second."""

    def __init__(self) -> None:
        self.orders: list[ExchangeOrder] = []
        self.coins: dict[SignalIds, Decimal] = {}

    def order(self, side: str, filled: Decimal, client_id: str | None) -> None:
        number = len(self.orders)
        self.orders.append(
            ExchangeOrder(
                id=str(number), client_id=client_id, side=side, open=False, rejected=False, quantity=filled,
                filled=filled, average=PRICE if filled else None, trigger=None, timestamp=1000 * number,
                conditional=False,
            )
        )  # fmt: skip

    def buy(self, ids: SignalIds, client_id: str, quantity: Decimal) -> None:
        self.order("buy", quantity, client_id)
        self.coins[ids] = self.coins.get(ids, Decimal(0)) + quantity * (1 - FEE)

    def sell(self, ids: SignalIds, client_id: str, part: Decimal = Decimal(1)) -> None:
        """A part of the coins, in whole lots."""
        quantity = MARKET.lots(self.coins[ids] * part)
        self.order("sell", quantity, client_id)
        self.coins[ids] -= quantity

    def counts(self, orders: list[ExchangeOrder] | None = None) -> dict[tuple[str, str], float]:
        found = bought(MARKET, self.orders if orders is None else orders)
        return {key: float(each.left) for key, each in found.items()}


def key(ids: SignalIds) -> tuple[str, str]:
    return ids.store_id, ids.digest


QUANTITIES = st.integers(20, 5000).map(lambda lots: LOT * lots)
LIVES = st.lists(
    st.fixed_dictionaries(
        {
            "store": st.sampled_from(["aaaaaa", "bbbbbb"]),
            "entry": QUANTITIES,
            "add": st.none() | QUANTITIES,
            "reduce": st.none() | st.decimals("0.1", "0.9", places=2),
            "exit": st.sampled_from(["close", "stop", "leave", None]),
            "savings": st.none() | QUANTITIES,
        }
    ),
    max_size=6,
)


def play(lives: list[dict[str, Any]]) -> tuple[Account, dict[SignalIds, Decimal]]:
    """The account after positions one after the other, with purchases of the owner among them, and what is open."""
    account = Account()
    for number, life in enumerate(lives):
        ids = SignalIds(f"signal-{number}", life["store"])
        account.buy(ids, ids.entry, life["entry"])
        if life["savings"]:
            account.order("buy", life["savings"], None)
        if life["add"]:
            account.buy(ids, ids.order("add", 1), life["add"])
        if life["reduce"]:
            account.sell(ids, ids.order("reduce", 2), life["reduce"])
        if life["exit"]:
            exits = {"close": ids.order("close", 0), "stop": ids.stop(3), "leave": ids.exit(0)}
            account.sell(ids, exits[life["exit"]])
    return account, dict(account.coins)


@given(LIVES, st.randoms(use_true_random=False))
def test_what_was_not_sold_again_counts_and_dust_and_savings_do_not(lives: list[dict[str, Any]], random: Any) -> None:
    account, coins = play(lives)
    held = {ids: left for (ids, left), life in zip(coins.items(), lives, strict=True) if life["exit"] is None}
    total = {ids: sum(o.filled for o in account.orders if o.side == "buy" and ids.kind(o.client_id)) for ids in held}
    counted = account.counts()
    for ids, left in held.items():
        if left > total[ids] * Decimal("0.02") + LOT:  # a reduction may have left less, which is dust as well
            assert abs(counted[key(ids)] - float(left)) <= float(total[ids] * FEE) + 1e-9
    assert counted.keys() <= {key(ids) for ids in held}
    shuffled = [*account.orders]
    random.shuffle(shuffled)
    assert account.counts(shuffled) == counted


@given(QUANTITIES, QUANTITIES, st.booleans())
def test_coins_that_were_sold_by_hand_after_they_were_bought_do_not_count(
    quantity: Decimal, savings: Decimal, sold_before: bool
) -> None:
    account = Account()
    ids = SignalIds("lost", "aaaaaa")
    if sold_before:
        account.order("sell", quantity + savings, None)
    account.buy(ids, ids.entry, quantity)
    assert set(account.counts()) == {key(ids)}
    account.order("sell", MARKET.lots(account.coins[ids]), None)
    assert not account.counts()


def test_a_sale_by_hand_closes_the_oldest_position_first() -> None:
    account, first, second = Account(), SignalIds("first", "aaaaaa"), SignalIds("second", "aaaaaa")
    for ids in (first, second):
        account.buy(ids, ids.entry, Decimal(1))
    account.order("sell", Decimal("0.999"), None)
    assert set(account.counts()) == {key(second)}


def test_what_is_worth_too_little_to_be_sold_does_not_count() -> None:
    account, ids = Account(), SignalIds("small", "aaaaaa")
    account.buy(ids, ids.entry, LOT * 2)
    assert account.counts()
    cheap = MARKET.__class__(**{**{f: getattr(MARKET, f) for f in MARKET.__struct_fields__}, "min_cost": Decimal(500)})
    assert not bought(cheap, account.orders)
