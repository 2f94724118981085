from __future__ import annotations

import re

from hypothesis import given, strategies as st

from backtest_kit.broker.order_ids import SignalIds, is_stop
from backtest_kit.engine.position import make_signal_id
from backtest_kit.model.event import Identity

SIGNALS = st.text(min_size=1, max_size=60)
SUFFIXES = st.builds("-{}{}".format, st.sampled_from("crast"), st.one_of(st.just(""), st.integers(0, 9999)))
TAKEN = re.compile(r"[A-Za-z0-9_-]{1,36}")


@given(SIGNALS, SUFFIXES, st.integers(0, 9999))
def test_every_id_is_taken_by_a_venue_and_known_again(signal_id: str, suffix: str, number: int) -> None:
    ids = SignalIds(signal_id)
    made = [ids.entry, ids.of(signal_id + suffix), ids.of(signal_id + suffix, 3), ids.stop(number), ids.exit(number)]
    assert all(TAKEN.fullmatch(each) for each in made)
    assert len(set(made)) == len(made)
    suffixes = ["", suffix, f"{suffix}_3", f"-p{number}", f"-x{number}"]
    assert [SignalIds(signal_id).suffix(each) for each in made] == suffixes
    assert ids.stop_number(ids.stop(number)) == number
    assert ids.stop_number(ids.entry) is None
    assert is_stop(ids.stop(number))


@given(SIGNALS, SUFFIXES)
def test_the_signal_of_an_order_is_found(signal_id: str, suffix: str) -> None:
    of_order = SignalIds.of_order(signal_id + suffix, opens=False)
    assert of_order.entry == SignalIds(signal_id).entry
    assert of_order.of(signal_id + suffix) == SignalIds(signal_id).of(signal_id + suffix)
    assert SignalIds.of_order(signal_id, opens=True).entry == SignalIds(signal_id).entry


@given(st.sampled_from(["BTCUSDT", "1000PEPEUSDT", "BTC/USDT:USDT", "ÅÄÖ"]), st.text(), SUFFIXES)
def test_ids_of_the_engine_are_taken_as_they_are(symbol: str, strategy: str, suffix: str) -> None:
    signal_id = make_signal_id(Identity(symbol, strategy, "binance", "", "live"), 1_704_067_200_000)
    ids = SignalIds(signal_id)
    assert ids.entry == signal_id
    assert SignalIds.of_order(signal_id, opens=False).entry == signal_id, "it has no suffix that could be taken off"
    if len(signal_id + suffix) <= 36:
        assert ids.of(signal_id + suffix) == signal_id + suffix


def test_orders_of_others_are_not_taken_for_ours() -> None:
    ids = SignalIds("BTCUSDT-202401010000-0a1b2c3d")
    for other in (None, "", "web_7f3", "BTCUSDT-202401010000-0a1b2c3e-p0", "BTCUSDT-202401010000-0a1b2c3dX"):
        assert ids.suffix(other) is None
    assert ids.suffix("BTCUSDT-202401010000-0a1b2c3d-by-hand") is None


@given(SIGNALS, SIGNALS)
def test_two_signals_share_no_id(one: str, other: str) -> None:
    if one != other:
        assert SignalIds(one).entry != SignalIds(other).entry
