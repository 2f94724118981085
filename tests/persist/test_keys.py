"""Keys as file names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tests.samples import size

from backtest_kit.errors import UserError
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.keys import MAX_NAME, check_key, escape, path_of, unescape

SIGNAL = CONTRACTS["signal"]
RECENT = CONTRACTS["recent"]
FIELDS = ("symbol", "strategyName")

HOSTILE = (
    "", ".", "..", "...", "a.", "a ", " a", "/", "\\", "../../x", ":", "a:b", "a\0b", "CON", "con", "con.txt", "NUL",
    "com1", "LPT9.json", "x" * 300, "x" * 299 + "y", "É" * 90, "\u00e9", "e\u0301", "🚀", "🚀" * 100, "~", "a~1", "%",
    "%2F", "a%2fb", "btcusdt", "BTCUSDT", "Btcusdt", "bTCUSDT", "|", "*", "?", "\n", "-", "_", "a_b", "A" * 179,
    "A" * 180,
)  # fmt: skip

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
case_twins = st.text("aAbB1%.~ ", max_size=8)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("part", ["v1.2", "a_b", "jan-2022", "4f2c1a9e-0001"])
def test_ordinary_names_stay(part: str, field: str) -> None:
    expected = part if field == "strategyName" else escape(part, field).partition("~")[0]
    assert escape(part, field).startswith(expected)


def test_typical_context_reads_as_written() -> None:
    assert path_of(SIGNAL, ("my_strategy", "binance", "BTCUSDT")) == ("my_strategy", "binance", "BTCUSDT")
    assert escape("BTC/USDT", "symbol") == "BTC%2FUSDT"


def test_mode_is_a_word() -> None:
    assert path_of(RECENT, ("s", "e", "", "BTC", True))[-1] == "backtest"
    assert path_of(RECENT, ("s", "e", "", "BTC", False))[-1] == "live"


@pytest.mark.parametrize("field", FIELDS)
def test_hostile_names_are_apart_even_where_case_does_not_count(field: str) -> None:
    names = [escape(part, field) for part in HOSTILE]
    assert len({name.casefold() for name in names}) == len(HOSTILE)
    for part, name in zip(HOSTILE, names, strict=True):
        assert unescape(name, field) == part or len(name) == MAX_NAME


@pytest.mark.parametrize("part", HOSTILE)
def test_hostile_names_are_names_of_the_file_system(part: str, tmp_path: Path) -> None:
    name = escape(part, "memoryId")
    (tmp_path / f"{name}.json").write_bytes(b"x")
    assert [entry.name for entry in tmp_path.iterdir()] == [f"{name}.json"]


@pytest.mark.sampled
@settings(max_examples=size(250, 5000), deadline=None)
@given(text | case_twins, st.sampled_from(FIELDS))
def test_names_are_read_back_and_safe(part: str, field: str) -> None:
    name = escape(part, field)
    assert len(name) <= MAX_NAME
    assert name.isascii()
    assert not set(name) & set('/\\:*?"<>|\0 ')
    assert name[0] not in ". "
    assert name[-1] not in ". "
    assert unescape(name, field) in ((part,) if len(name) < MAX_NAME else (part, None))


@pytest.mark.sampled
@settings(max_examples=size(250, 5000), deadline=None)
@given(text | case_twins, text | case_twins, st.sampled_from(FIELDS))
def test_two_components_never_share_a_name(one: str, other: str, field: str) -> None:
    same = escape(one, field).casefold() == escape(other, field).casefold()
    assert same == (one == other)


@pytest.mark.parametrize("name", ["", "a b", "%2f", "%2F%", "a~1", "A", ".x", "%ZZ", "con", "%FF", "x~~0"])
def test_what_escape_does_not_write_is_no_component(name: str) -> None:
    assert unescape(name, "strategyName") is None


@pytest.mark.parametrize(
    ("contract", "key", "named"),
    [
        (SIGNAL, ("a", "b"), "strategyName, exchangeName, symbol"),
        (SIGNAL, ("a", "b", "c", "d"), "got 4"),
        (SIGNAL, ("a", "b", 3), "symbol is 3"),
        (RECENT, ("a", "b", "c", "d", 1), "backtest is 1"),
        (SIGNAL, ("a", "b", "\ud800"), "symbol"),
    ],
)
def test_a_wrong_key_is_named(contract: Contract, key: tuple[object, ...], named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_key(contract, key)


def test_a_prefix_may_be_short() -> None:
    assert check_key(SIGNAL, ("a",), prefix=True) == ("a",)
    assert check_key(SIGNAL, (), prefix=True) == ()
