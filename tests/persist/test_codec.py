"""Open payloads, and the envelope around them."""

from __future__ import annotations

import json
import math
import zlib
from datetime import UTC, datetime, timedelta, timezone
from enum import Enum
from typing import Any
from uuid import UUID

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.codec import (
    MAX_DEPTH,
    NewerSchema,
    decode,
    dump_record,
    encode,
    open_envelope,
    parse,
    reseal,
    seal,
    seal_line,
    unseal,
    unseal_head,
    unseal_line,
)
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Record

SIGNAL = CONTRACTS["signal"]
KEY = ("trend", "binance", "BTC/USDT")

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["@", "@float", "@object", "@x"]
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | names
    | st.binary(max_size=12)
    | st.datetimes(timezones=st.timezones() | st.just(UTC))
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4))


def same(one: Any, other: Any) -> bool:
    """Equal in type too, so that 1, 1.0 and True are three values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return math.copysign(1, one) == math.copysign(1, other) and (one == other or (one != one and other != other))
    if isinstance(one, datetime):
        return bool(one.isoformat() == other.isoformat())  # == is False for a local time that a clock change repeats
    return bool(one == other)


def record(value: Any = None, **changes: Any) -> Record:
    fields = {"key": KEY, "value": value, "rev": 3, "when": 1_640_995_200_000, "written_at": 1_700_000_000_000}
    return Record(**{**fields, **changes})


@settings(max_examples=300, deadline=None)
@given(values)
def test_every_value_comes_back_through_plain_json(value: Any) -> None:
    plain = encode(value)
    text = json.dumps(plain, allow_nan=False)
    assert same(decode(json.loads(text)), value)


@settings(max_examples=100, deadline=None)
@given(values)
def test_every_record_comes_back(value: Any) -> None:
    stored = record(encode(value))
    assert unseal(SIGNAL, KEY, seal(SIGNAL, stored)) == stored
    assert same(decode(unseal(SIGNAL, KEY, seal(SIGNAL, stored)).value), value)
    dumped = dump_record(SIGNAL, stored)
    assert unseal_line(seal_line(dumped)) == dumped
    assert seal_line(dumped).count(b"\n") == 1
    assert open_envelope(SIGNAL, KEY, parse(dumped)) == stored


def test_nan_comes_back() -> None:
    assert math.isnan(decode(encode({"x": math.nan}))["x"])


def test_a_naive_datetime_is_utc() -> None:
    assert decode(encode(datetime(2022, 1, 31, 10))) == datetime(2022, 1, 31, 10, tzinfo=UTC)  # noqa: DTZ001


def test_extreme_datetimes_survive() -> None:
    first = datetime.min.replace(tzinfo=timezone(timedelta(hours=14)))
    assert decode(encode(first)).isoformat() == first.isoformat()


def test_a_tuple_comes_back_as_a_list() -> None:
    assert decode(encode((1, (2,)))) == [1, [2]]


def test_an_integer_of_any_size_survives() -> None:
    for number in (2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**5000):
        assert decode(encode(number)) == number


class Side(Enum):
    LONG = "long"


class Inner(msgspec.Struct, rename="camel"):
    take_profit: float
    side: Side = Side.LONG


class Outer(msgspec.Struct, rename="camel", tag="outer"):
    open_orders: list[Inner]
    note: str | msgspec.UnsetType = msgspec.UNSET


def test_structs_are_written_under_their_own_names_and_user_keys_are_not_touched() -> None:
    value = {"my_key": Outer([Inner(math.inf)])}
    assert encode(value) == {
        "my_key": {"type": "outer", "openOrders": [{"takeProfit": {"@float": "inf"}, "side": "long"}]}
    }
    assert msgspec.convert(decode(encode(value))["my_key"]["openOrders"][0], Inner) == Inner(math.inf)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"levels": [{}, {"x": {1}}]}, r"state\.levels\[1\]\.x is a set"),
        ({"a": object()}, r"state\.a is a object"),
        ({"a": {1: 2}}, r"state\.a has the key 1"),
        ({"a": "\ud800"}, r"state\.a .*not valid Unicode"),
        ({"a": {"\ud800": 1}}, r"a key of state\.a"),
        ({"a": 1 + 2j}, r"state\.a is a complex"),
    ],
)
def test_what_cannot_be_stored_is_named(value: object, named: str) -> None:
    with pytest.raises(UserError, match=named):
        encode(value, "state")


def test_deep_nesting_is_refused_before_python_gives_up() -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    assert decode(encode(value)) == value
    with pytest.raises(UserError, match="nested"):
        encode([[value]])
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UserError, match="contains itself"):
        encode(loop)


@pytest.mark.parametrize(
    "plain",
    [
        {"@new": "x"},
        {"@float": "1.5"},
        {"@float": 1},
        {"@bytes": "*"},
        {"@datetime": "soon"},
        {"@int": "zz"},
        {"@object": 1},
    ],
)
def test_an_unknown_tag_is_damage(plain: Any) -> None:
    with pytest.raises(Damaged, match="@"):
        decode({"a": [plain]})


def test_a_sealed_record_is_for_people() -> None:
    text = seal(SIGNAL, record({"note": "ok"})).decode()
    assert text.startswith('{\n  "contract": "signal",\n  "key": {\n    "strategyName": "trend",')
    assert json.loads(text)["value"] == {"note": "ok"}
    assert text.endswith('"\n}\n')


def test_every_single_bit_counts() -> None:
    data = seal(SIGNAL, record({"price": 1.5, "@x": None}))
    for place in range(len(data) * 8):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(Damaged):
            unseal(SIGNAL, KEY, bytes(changed))


def test_every_single_bit_of_a_line_counts() -> None:
    line = seal_line(dump_record(SIGNAL, record({"price": 1.5})))
    for place in range(len(line) * 8 - 8):
        changed = bytearray(line)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(Damaged):
            unseal_line(bytes(changed))


@pytest.mark.parametrize("cut", [0, 1, 10, 50, 200])
def test_a_cut_or_extended_record_is_damaged(cut: int) -> None:
    data = seal(SIGNAL, record({"a": 1}))
    for changed in (data[:cut], data[: -cut - 1], data + b"\n", data + data, b"\0" * len(data)):
        with pytest.raises(Damaged):
            unseal(SIGNAL, KEY, changed)


def test_a_sound_record_under_a_wrong_name_is_damaged() -> None:
    data = seal(SIGNAL, record())
    with pytest.raises(Damaged, match="belongs"):
        unseal(SIGNAL, ("trend", "binance", "ETHUSDT"), data)
    with pytest.raises(Damaged, match="a record of signal"):
        unseal(CONTRACTS["schedule"], KEY, data)


def test_a_newer_version_is_told_apart() -> None:
    data = seal(SIGNAL, record(schema_version=2))
    with pytest.raises(NewerSchema, match="newer version"):
        unseal(SIGNAL, KEY, data)


def forge(body: bytes) -> bytes:
    """`body` with a checksum that fits, as only a program can write it."""
    head = body.rstrip()[:-1].rstrip() + b",\n"
    return head + b'  "checksum": "%08x"\n}\n' % zlib.crc32(head)


@pytest.mark.parametrize(
    "value",
    [
        b'{"a": 1, "a": 2}', b"NaN", b"-Infinity", b"[" * 100_000 + b"]" * 100_000, b'"\xff"', b'"\\ud800', b"9" * 5000,
        b"", b'{"a": }',
    ],
    ids=["twice", "nan", "infinity", "deep", "not-utf8", "cut", "digits", "nothing", "gap"],
)  # fmt: skip
def test_what_is_no_strict_json_is_damaged_even_with_a_checksum_that_fits(value: bytes) -> None:
    body = seal(SIGNAL, record()).replace(b'"value": null', b'"value": ' + value)
    with pytest.raises(Damaged):
        unseal(SIGNAL, KEY, forge(body[: body.rfind(b'  "checksum')].rstrip()[:-1] + b"\n}"))


def test_a_large_text_survives() -> None:
    stored = record("x" * (64 << 20))
    assert unseal(SIGNAL, KEY, seal(SIGNAL, stored)) == stored


@pytest.mark.parametrize(
    "value", [math.nan, -math.inf, {1}, b"x", datetime(2022, 1, 1, tzinfo=UTC), UUID(int=1), "\ud800"]
)
def test_only_plain_trees_are_sealed(value: Any) -> None:
    for inside in (value, [1, value], {"a": {"b": value}}):
        with pytest.raises(UserError, match="plain JSON"):
            seal(SIGNAL, record(inside))


def test_an_operator_can_accept_a_hand_edit() -> None:
    edited = seal(SIGNAL, record({"price": 1})).replace(b'"price": 1', b'"price": 2')
    with pytest.raises(Damaged, match="by hand"):
        unseal(SIGNAL, KEY, edited)
    assert reseal(SIGNAL, edited).value == {"price": 2}
    with pytest.raises(Damaged):
        reseal(CONTRACTS["schedule"], edited)


@pytest.mark.parametrize("value", [{"a": 1}, None, '\n  "value": 1', {"value": {"value": [1]}}, []])
def test_head_of_a_record_is_that_of_the_whole(value: Any) -> None:
    sealed = seal(SIGNAL, record(value))
    whole, head = unseal(SIGNAL, KEY, sealed), unseal_head(SIGNAL, KEY, sealed)
    assert head == msgspec.structs.replace(whole, value=None)
    with pytest.raises(Damaged, match="checksum"):
        unseal_head(SIGNAL, KEY, sealed.replace(b'"rev"', b'"rew"'))
    with pytest.raises(Damaged, match="found where"):
        unseal_head(SIGNAL, ("a", "b", "c"), sealed)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.bool_(True), True),
        (np.int64(-3), -3),
        (np.uint64(2**63 - 1), 2**63 - 1),
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.float16(-0.25), -0.25),
    ],
)
def test_numpy_scalars_are_stored_as_their_python_values(value: object, plain: object) -> None:
    found = encode({"v": [value]})
    assert found == {"v": [plain]}
    assert isinstance(found, dict)
    assert isinstance(found["v"], list)
    assert type(found["v"][0]) is type(plain)
    assert decode(encode(np.float32("inf"))) == float("inf")


@pytest.mark.parametrize("value", [np.longdouble(1), np.datetime64("2022-01-01"), np.zeros(2)])
def test_what_numpy_has_and_json_has_not_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="cannot be stored"):
        encode(value)
