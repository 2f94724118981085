from __future__ import annotations

import re
import uuid

import pytest
from hypothesis import given, strategies as st

from backtest_kit.broker import order_ids
from backtest_kit.broker.order_ids import KINDS, PARTS, OrderId, SignalIds, digest_of, parse, store_of, taken_over
from backtest_kit.engine.position import make_signal_id
from backtest_kit.errors import UserError
from backtest_kit.model.identity import Identity

SIGNALS = st.text(min_size=1, max_size=60)
STORES = st.integers(0, 2**24 - 1).map("{:06x}".format)
NUMBERS = st.integers(0, 2**32 - 1)
COUNTS = st.integers(0, 2**32 // PARTS - 1)
ORDER_KINDS = st.sampled_from(["add", "reduce", "close", "cancel", "move_stop", "breakeven", "move_take"])
HEX = re.compile(r"[0-9a-f]{32}")
RULES = {
    "binance": r"[.A-Z:/a-z0-9_-]{1,36}",
    "bybit": r"[A-Za-z0-9_-]{1,36}",
    "okx": r"[A-Za-z0-9]{1,32}",
    "kraken": r"[0-9a-f]{32}|.{1,18}",
    "mexc": r".{1,32}",
    "kucoin": r"[A-Za-z0-9_-]{1,40}",
    "bitget": r"[A-Za-z0-9_:#-]{1,50}",
}
"""What the manuals of the exchanges say."""


@given(SIGNALS, STORES, NUMBERS, COUNTS, ORDER_KINDS, st.integers(0, PARTS - 1))
def test_every_id_that_can_be_made_is_recognised(
    signal_id: str, store_id: str, number: int, count: int, order_kind: str, part: int
) -> None:
    ids = SignalIds(signal_id, store_id)
    sent = ids.order(order_kind, count)
    made = {ids.entry: "e", ids.stop(number): "p", ids.take(number): "q", ids.exit(number): "x"}
    assert len({*made, ids.of(sent, part)}) == 5
    for venue_id, kind in made.items():
        order_id = parse(venue_id)
        assert order_id is not None
        assert (order_id.store_id, order_id.digest, order_id.kind) == (store_id, digest_of(signal_id), kind)
        assert str(order_id) == venue_id
        assert ids.kind(venue_id) == kind
    assert ids.kind(ids.of(sent, part)) == ids.kind(sent)
    assert ids.stop_number(ids.stop(number)) == number
    assert ids.stop_number(ids.entry) is None
    assert store_of(sent) == store_id


@given(SIGNALS, STORES, NUMBERS)
def test_every_known_exchange_takes_our_ids(signal_id: str, store_id: str, number: int) -> None:
    ids = SignalIds(signal_id, store_id)
    for venue_id in (ids.entry, ids.stop(number), ids.exit(number)):
        assert HEX.fullmatch(venue_id)
        assert [name for name, rule in RULES.items() if not re.fullmatch(rule, venue_id)] == []


@given(SIGNALS, NUMBERS)
def test_an_id_that_came_back_as_a_uuid_is_recognised(signal_id: str, number: int) -> None:
    ids = SignalIds(signal_id)
    for written in (str(uuid.UUID(ids.stop(number))), ids.stop(number).upper()):
        assert ids.stop_number(written) == number


@given(SIGNALS, STORES, SIGNALS, STORES)
def test_signals_and_stores_share_no_id(one: str, its: str, other: str, others: str) -> None:
    if (one, its) != (other, others):
        assert SignalIds(one, its).kind(SignalIds(other, others).entry) is None


@given(SIGNALS, STORES, STORES, NUMBERS)
def test_a_position_that_was_taken_over_keeps_its_orders(signal_id: str, store: str, mine: str, number: int) -> None:
    sent = SignalIds(signal_id, store)
    found = parse(sent.stop(number))
    assert found is not None
    again = SignalIds(taken_over(found), mine)
    assert (again.entry, again.stop_number(sent.stop(number))) == (sent.entry, number)
    assert digest_of(taken_over(found)) == digest_of(signal_id)


@pytest.mark.parametrize(
    "other",
    [
        *(None, "", "web_7f3", "x-R4BD3S82c0ffee", "bc", "BTCUSDT-202401010000-0a1b2c3d-p0"),
        *("ff" + 30 * "0", "bc" + 30 * "0", "bc" + 30 * "g", "bc" + 20 * "0" + "70" + 7 * "0", 34 * "0"),
        *(f"bc{20 * '0'}{code:02x}{8 * '0'}" for code in (0, 0x41, 0x7B, 0xFF)),
    ],
)
def test_ids_of_others_are_not_taken_for_ours(other: str | None) -> None:
    assert parse(other) is None
    assert SignalIds("BTCUSDT-202401010000-0a1b2c3d").kind(other) is None
    assert store_of(other or "") == order_ids.NO_STORE


def test_an_order_as_people_write_it() -> None:
    ids = SignalIds(make_signal_id(Identity("BTCUSDT", "trend", "binance", "", "live"), 1_704_067_200_000), "0a1b2c")
    signal_id = "BTCUSDT-202401010000-"
    assert ids.of(ids.entry) == ids.entry
    written = SignalIds("idea")
    assert written.of("idea") == written.entry
    assert written.of("idea-c") == written.of("idea-c0") == written.order("close", 0)
    assert written.of("idea-r7", 2) == written.of(written.order("reduce", 7), 2)
    for name in (f"{signal_id}c0", "another-c0", "idea-z1", "idea-by-hand", SignalIds("another").entry):
        with pytest.raises(UserError, match="is not a client order id of signal 'idea'"):
            written.of(name)


def test_numbers_that_do_not_fit_are_refused() -> None:
    ids = SignalIds("idea")
    with pytest.raises(UserError, match=r"number 4294967296 of kind 'p' .*close the position"):
        ids.stop(2**32)
    with pytest.raises(UserError, match="does not fit"):
        ids.order("close", 2**24)
    with pytest.raises(UserError, match="at most 256 parts"):
        ids.of("idea-c0", 256)


def test_kinds_are_single_letters() -> None:
    assert all(len(kind) == 1 and kind.isascii() and kind.islower() for kind in KINDS)
    assert str(OrderId("0a1b2c", 14 * "d", "e", 5)) == "bc0a1b2cdddddddddddddd6500000005"
