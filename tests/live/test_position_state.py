"""A position state comes back from a store as it went in: every state, order, event and number, with all fields."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, cast, get_args, get_origin, get_type_hints

import hypothesis
import msgspec
import pytest
from hypothesis import strategies as st

import backtest_kit as bk
from backtest_kit.engine.step import Flat, Holding, Resting
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.urls import store_at
from backtest_kit.run.live.emergency import EmergencyFile
from backtest_kit.run.live.known_records import KnownRecords
from backtest_kit.run.live.orders import signal_id_of
from backtest_kit.run.live.position_state import PositionState, position_state_of, records_of, write_order
from backtest_kit.run.live.position_store import PositionStore, read_position_state

SCOPE = ("trend", "demo", "BTCUSDT")
PLAIN: Final[dict[Any, st.SearchStrategy[Any]]] = {
    bool: st.booleans(),
    int: st.integers(-(2**53), 2**53),
    float: st.floats(),
    str: st.text(max_size=5),
    NoneType: st.none(),
}
TENTHS: Final = dict.fromkeys(("profit_level", "loss_level"), st.integers(0, 10).map(lambda tenths: tenths * 10))


@functools.cache
def any_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type, made from what it is declared as: a field that is added is tried from then on.

    Each type once: a strategy costs more to make than a value of it.
    """
    if kind in PLAIN:
        return PLAIN[kind]
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return st.sampled_from(parts)
    if origin in (Union, UnionType):
        return st.one_of([st.deferred(lambda part=part: any_of(part)) for part in parts])  # type: ignore[misc]
    if origin is tuple and parts[-1] is ...:
        return st.lists(any_of(parts[0]), max_size=2).map(tuple)
    hints = get_type_hints(kind)
    made = {name: any_of(hints[name]) for name in kind.__struct_fields__}
    if kind is bk.RestingEntry:
        made["signal"] = COMPLETE
    return st.builds(kind, **{name: TENTHS.get(name, values) for name, values in made.items()})


COMPLETE: Final = st.builds(
    bk.Signal,
    **{name: any_of(kind) for name, kind in get_type_hints(bk.Signal).items()}
    | {"price_open": st.floats(), "minutes": st.floats(), "cost": st.floats(), "id": st.text(max_size=5)},
)
"""Signals as entries have them, which leave nothing open."""
STATES: Final = any_of(PositionState)
UNHURRIED: Final = hypothesis.settings(suppress_health_check=list(hypothesis.HealthCheck), database=None)


def same(found: PositionState, position_state: PositionState) -> bool:
    """By their text, in which nan is nan, and 1 is not 1.0."""
    return repr(found) == repr(position_state)


@hypothesis.settings(UNHURRIED, max_examples=100)
@hypothesis.given(STATES)
def test_the_records_of_a_position_state_are_that_state(position_state: PositionState) -> None:
    assert same(position_state_of(records_of(position_state)), position_state)


@pytest.mark.parametrize("store", ["memory:", "file:{place}/dump", "sqlite:{place}/bot.db"])
def test_a_position_state_comes_back_from_a_store(store: str, tmp_path: Path) -> None:
    @hypothesis.settings(UNHURRIED, max_examples=5)
    @hypothesis.given(st.lists(STATES, min_size=1, max_size=4))
    def law(states: list[PositionState]) -> None:
        number.append(len(number))
        place = tmp_path / str(len(number))
        asyncio.run(written_and_read(store.format(place=place), EmergencyFile(place / "reserve"), states))

    number: list[int] = []
    law()


async def written_and_read(address: str, emergency: EmergencyFile, states: list[PositionState]) -> None:
    """One after the other, each read by who has written none of them."""
    kit = bk.Kit()
    try:
        kit.persistence.bind("*", store_at(address))
        identity, no_alarms = bk.Identity("BTCUSDT", "trend", "demo", "", "live"), cast(Any, None)
        position_store = PositionStore(kit.persistence, identity, SCOPE, (), 0, emergency, no_alarms)
        await position_store.load("me")
        assert position_store.position_state == PositionState(owner="me")
        for state in states:
            await position_store.keep(state, "store")
            written = msgspec.structs.replace(state, seq=position_store.position_state.seq)
            assert same(await read_position_state(KnownRecords(kit.persistence, "live"), SCOPE), written)
    finally:
        emergency.close()
        await kit.close()


@hypothesis.settings(UNHURRIED, max_examples=100)
@hypothesis.given(STATES)
def test_no_field_of_a_position_state_is_left_out_of_the_records(position_state: PositionState) -> None:
    records: Any = records_of(position_state)
    assert set(records) == {"signal", "schedule", "strategy"} <= set(CONTRACTS)
    whole = {**records["strategy"], "state": {**records["strategy"]["state"]}}
    for part, name in (("position", "signal"), ("entry", "schedule")):
        assert (part in whole["state"]) == (records[name] is not None)
        if records[name] is not None:
            assert whole["state"][part] == signal_id_of(position_state.state)
            whole["state"][part] = records[name]
    assert list(left_out(position_state, whole)) == []


def left_out(value: Any, record: Any, path: str = "position_state") -> Any:
    """Fields of structs, however deep, that have no place in what is stored of them."""
    if isinstance(value, msgspec.Struct):
        for name, stored in zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True):
            if stored not in record:
                yield f"{path}.{name}"
            else:
                yield from left_out(getattr(value, name), record[stored], f"{path}.{name}")
    elif isinstance(value, tuple):
        assert len(value) == len(record)
        for index, each in enumerate(value):
            yield from left_out(each, record[index], f"{path}[{index}]")


@hypothesis.settings(UNHURRIED, max_examples=200)
@hypothesis.given(STATES, STATES, st.integers(0, 3))
def test_a_torn_batch_leaves_what_is_held(before: PositionState, after: PositionState, written: int) -> None:
    """It is the state before, the state after, or what is held already with the intent that it came of."""
    after = followed(before, after)
    old, new = records_of(before), records_of(after)
    names = write_order(old["strategy"], new)
    torn = {name: (new if number < written else old)[name] for number, name in enumerate(names)}
    position_state: Any = position_state_of(torn)
    if names.index("strategy") < written:
        assert same(position_state, after)
        return
    position, entry = torn["signal"], torn["schedule"]
    found: Any = records_of(position_state)
    if position is not None:
        assert found["signal"] == position
    elif entry is not None:
        assert (found["signal"], found["schedule"]) == (None, entry)
    else:
        assert type(position_state.state).__name__ == "Flat"
    rest = {name: getattr(before, name) for name in PositionState.__struct_fields__ if name != "state"}
    assert same(msgspec.structs.replace(position_state, **rest), position_state)


def followed(before: PositionState, after: PositionState) -> PositionState:
    """`after` as it may follow: a position does not become an entry, and what is over is the signal acted on last."""
    if isinstance(before.state, Flat):
        hypothesis.assume(isinstance(after.state, Flat) or signal_id_of(after.state) != before.state.last_signal_id)
        return after
    hypothesis.assume(not (isinstance(before.state, Holding) and isinstance(after.state, Resting)))
    if not isinstance(after.state, Flat):
        return after
    state = msgspec.structs.replace(after.state, last_signal_id=signal_id_of(before.state))
    return msgspec.structs.replace(after, state=state)


def test_what_a_torn_batch_has_left_is_cleared_before_anything_else() -> None:
    """A position is over, and its record is still there when the next entry is placed."""
    strategy: Any = records_of(PositionState())["strategy"]
    assert write_order(strategy, {"signal": None, "schedule": "next", "strategy": "new"}) == [
        "signal",
        "schedule",
        "strategy",
    ]
