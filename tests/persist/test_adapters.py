"""The front doors: keys by name, values as they are, adapters as users write them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tests.samples import size

from backtest_kit.errors import Damaged, UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.adapters import ContractAdapter, adapter_name, snake
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.binding import MODES, Persistence
from backtest_kit.persist.contracts import CONTRACTS, Delete
from backtest_kit.persist.store import Write

KEY: dict[str, Any] = {"symbol": "BTCUSDT", "strategy_name": "trend", "exchange_name": "binance"}


class MemorySignalAdapter:
    """The reference document's example, as it stands there."""

    def __init__(self) -> None:
        self._store: dict[str, Any] = {}

    async def read_value(self, entity_id: str) -> Any:
        return self._store.get(entity_id)

    async def write_value(self, entity_id: str, entity: Any) -> None:
        self._store[entity_id] = entity


class Plain:
    """The same without async."""

    def __init__(self) -> None:
        self.store: dict[str, Any] = {}

    def read_value(self, entity_id: str) -> Any:
        return self.store.get(entity_id)

    def write_value(self, entity_id: str, entity: Any) -> None:
        self.store[entity_id] = entity


class Listing(Plain):
    async def list_values(self) -> AsyncIterator[Any]:
        for entity in self.store.values():
            yield entity


@pytest.fixture
def persistence() -> Persistence:
    persistence = Persistence(files=MemoryStore)
    persistence.bind("*", MemoryStore())
    return persistence


def key_of(name: str) -> dict[str, Any]:
    samples = {"backtest": False, "timestamp": 0}
    return {snake(field): samples.get(field, field) for field in CONTRACTS[name].key_fields}


def test_there_is_a_door_for_each_contract(persistence: Persistence) -> None:
    doors = persistence.front_doors()
    assert list(doors) == [adapter_name(row) for row in CONTRACTS.values()]
    assert "PersistSignalAdapter" in doors
    assert doors["PersistSignalAdapter"] is persistence.signal
    assert doors["PersistCandleAdapter"] is persistence.candle


RECORD_NAMES = [name for name in CONTRACTS if name != "candle"]


@pytest.mark.parametrize("name", RECORD_NAMES)
@pytest.mark.parametrize("adapter", [MemorySignalAdapter, Plain, lambda: Plain(), "an object"])
async def test_users_adapter_serves_each_contract(persistence: Persistence, name: str, adapter: object) -> None:
    door = persistence.adapters[name]
    getattr(door, f"use_persist_{name}_adapter")(Plain() if adapter == "an object" else adapter)
    assert await door.read(**key_of(name)) is None
    await door.write({"price": 1.5}, **key_of(name))
    assert await door.read(**key_of(name)) == {"price": 1.5}


async def test_snippet_of_the_reference() -> None:
    persistence = Persistence(files=MemoryStore)
    persistence.signal.use_persist_signal_adapter(MemorySignalAdapter)
    await persistence.signal.write({"id": "s-1"}, **KEY)
    assert await persistence.signal.read(**KEY) == {"id": "s-1"}
    assert await persistence.signal.remove(**KEY)
    assert await persistence.signal.read(**KEY) is None


async def test_users_adapter_finds_his_value_under_a_readable_name(persistence: Persistence) -> None:
    adapter = Plain()
    persistence.signal.use_persist_signal_adapter(adapter)
    await persistence.signal.write({"price": 1.5}, when=1_000, **KEY)
    await persistence.signal.write({"price": 2.5}, mode="paper", **KEY)
    assert list(adapter.store) == ["trend/binance/BTCUSDT", "paper:trend/binance/BTCUSDT"]
    entity = adapter.store["trend/binance/BTCUSDT"]
    assert entity["value"] == {"price": 1.5}
    assert (entity["contract"], entity["rev"], entity["when"]) == ("signal", 1, 1_000)
    assert await persistence.signal.read(mode="paper", **KEY) == {"price": 2.5}


async def test_class_is_made_once_per_binding(persistence: Persistence) -> None:
    made: list[Plain] = []

    def make() -> Plain:
        made.append(Plain())
        return made[-1]

    persistence.signal.use_persist_signal_adapter(make)
    for mode in MODES:
        await persistence.signal.write(1, mode=mode, **KEY)
    assert len(made) == 1


@pytest.mark.parametrize("bad", [object(), dict, "sqlite", None])
def test_what_is_no_adapter_is_refused(persistence: Persistence, bad: object) -> None:
    with pytest.raises(UserError, match="read_value"):
        persistence.signal.use_persist_signal_adapter(bad)


async def test_adapter_that_mixes_up_its_entities_is_damaged(persistence: Persistence) -> None:
    adapter = Plain()
    persistence.signal.use_adapter(adapter)
    await persistence.signal.write(1, **KEY)
    adapter.store["other/binance/BTCUSDT"] = adapter.store["trend/binance/BTCUSDT"]
    with pytest.raises(Damaged, match="one object"):
        await persistence.signal.read(symbol="BTCUSDT", strategy_name="other", exchange_name="binance")
    adapter.store["trend/binance/BTCUSDT"] = {"price": 1.5}
    with pytest.raises(Damaged, match="not an entity"):
        await persistence.signal.read(**KEY)


async def test_one_object_for_two_contracts_is_found_out(persistence: Persistence) -> None:
    adapter = Plain()
    persistence.signal.use_adapter(adapter)
    persistence.schedule.use_adapter(adapter)
    await persistence.signal.write(1, **KEY)
    with pytest.raises(Damaged, match="one object"):
        await persistence.schedule.write(2, **KEY)
    assert await persistence.signal.read(**KEY) == 1


async def test_adapter_can_be_listed_if_it_says_how(persistence: Persistence) -> None:
    persistence.memory.use_adapter(Plain)
    with pytest.raises(UserError, match="list_values"):
        [entry async for entry in persistence.memory.list()]
    persistence.memory.use_adapter(Listing)
    for number in range(3):
        await persistence.memory.write(number, signal_id="s", bucket_name="b", memory_id=str(number))
    assert [value async for _, value in persistence.memory.list(signal_id="s")] == [2, 1, 0]


async def test_an_adapter_gets_many_writes_one_after_the_other(persistence: Persistence) -> None:
    class OneAtATime(MemorySignalAdapter):
        is_busy = False

        async def write_value(self, entity_id: str, entity: Any) -> None:
            assert not self.is_busy
            self.is_busy = True
            await asyncio.sleep(0)
            self.is_busy = False

    row = CONTRACTS["state"]
    persistence.state.use_adapter(OneAtATime)
    writes = [Write(row, ("s", str(number)), number) for number in range(3)]
    done = await persistence.store_for(row, "live").put_each(writes)
    assert [each for each in done if isinstance(each, BaseException)] == []


async def test_candles_over_an_adapter_are_months(persistence: Persistence) -> None:
    adapter = Plain()
    persistence.candle.use_persist_candle_adapter(adapter)
    series: dict[str, Any] = {"exchange_name": "binance", "symbol": "BTC/USDT", "interval": "1d"}
    days = 1_640_995_200_000 + np.arange(-10, 40) * 86_400_000
    candles = CandleSeries(days, *([np.arange(50.0)] * 5))
    assert await persistence.candle.write_candles(candles, **series) == 50
    assert await persistence.candle.read_candles("2021-12-22", "2022-02-10", **series) == candles
    months = ["", "/2021-12", "/2022-01", "/2022-02"]
    assert list(adapter.store) == [f"binance/BTC%2FUSDT/1d{month}" for month in months]
    assert len(await persistence.candle.read_candles("2022-01-01", "2022-02-01", **series)) == 31


@pytest.mark.parametrize(
    "key",
    [
        {},
        {"symbol": "BTCUSDT"},
        {**KEY, "frame_name": "x"},
        {"symbol": "BTCUSDT", "strategyName": "trend", "exchange_name": "binance"},
        {**KEY, "symbol": 7},
        {**KEY, "symbol": None},
    ],
)
async def test_wrong_key_is_told_the_fields(persistence: Persistence, key: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"strategy_name, exchange_name, symbol|symbol is"):
        await persistence.signal.read(**key)
    with pytest.raises(UserError):
        await persistence.signal.write(1, **key)


async def test_list_takes_the_first_fields(persistence: Persistence) -> None:
    for signal, bucket, name in [("s", "b", "1"), ("s", "c", "2"), ("t", "b", "3"), ("s", "b", "4")]:
        await persistence.memory.write(name, signal_id=signal, bucket_name=bucket, memory_id=name)
    assert [value async for _, value in persistence.memory.list()] == ["4", "3", "2", "1"]
    listed = [entry async for entry in persistence.memory.list(signal_id="s", bucket_name="b")]
    assert listed[0] == ({"signal_id": "s", "bucket_name": "b", "memory_id": "4"}, "4")
    assert [value for _, value in listed] == ["4", "1"]
    with pytest.raises(UserError, match="the first of signal_id, bucket_name, memory_id"):
        [entry async for entry in persistence.memory.list(bucket_name="b")]


@pytest.mark.parametrize("name", RECORD_NAMES)
async def test_removing_follows_the_table(persistence: Persistence, name: str) -> None:
    door: ContractAdapter = persistence.adapters[name]
    row, key = CONTRACTS[name], key_of(name)
    await door.write("value", when=5, **key)
    if row.delete is Delete.NEVER:
        with pytest.raises(UserError, match="never removed"):
            await door.remove(**key)
        assert await door.read(**key) == "value"
        return
    assert await door.remove(**key) is True
    assert await door.read(**key) is None
    assert await door.remove(**key) is False
    record = await persistence.store_for(row, "live").get(row, tuple(key[snake(field)] for field in row.key_fields))
    assert record is not None
    assert (record.removed, record.value) == ((True, "value") if row.delete is Delete.SOFT else (False, None))
    await door.write("again", **key)
    assert await door.read(**key) == "again"


async def test_removing_nothing_writes_nothing(persistence: Persistence) -> None:
    assert await persistence.signal.remove(**KEY) is False
    assert (
        await persistence.store_for(CONTRACTS["signal"], "live").get(
            CONTRACTS["signal"], ("trend", "binance", "BTCUSDT")
        )
        is None
    )


async def test_use_memory_and_dummy_and_file(persistence: Persistence) -> None:
    await persistence.signal.write("bound", **KEY)
    persistence.signal.use_memory()
    assert await persistence.signal.read(**KEY) is None
    await persistence.signal.write("memory", **KEY)
    assert await persistence.signal.read(**KEY) == "memory"
    persistence.signal.use_dummy()
    await persistence.signal.write("lost", **KEY)
    assert await persistence.signal.read(**KEY) is None
    persistence.signal.use_file()
    await persistence.signal.write("file", **KEY)
    assert await persistence.file_store().get(CONTRACTS["signal"], ("trend", "binance", "BTCUSDT")) is not None


def test_door_has_its_own_name_for_binding_and_no_other(persistence: Persistence) -> None:
    assert "use_persist_signal_adapter" in dir(persistence.signal)
    assert "signal" in repr(persistence.signal).lower()
    with pytest.raises(AttributeError):
        persistence.signal.use_persist_risk_adapter  # noqa: B018


@pytest.mark.parametrize("name", ["measure", "interval", "memory"])
async def test_what_is_removed_softly_is_removed_by_the_name_of_the_reference(
    persistence: Persistence, name: str
) -> None:
    door, row, key = persistence.adapters[name], CONTRACTS[name], key_of(name)
    await door.write("value", **key)
    assert f"remove_{name}_data" in dir(door)
    assert await getattr(door, f"remove_{name}_data")(**key) is True
    record = await persistence.store_for(row, "live").get(row, tuple(key[snake(field)] for field in row.key_fields))
    assert record is not None
    assert (record.removed, record.value) == (True, "value")
    assert [entry async for entry in door.list()] == []


def test_what_is_never_removed_has_no_such_name(persistence: Persistence) -> None:
    with pytest.raises(AttributeError):
        persistence.session.remove_session_data  # noqa: B018


async def test_unencodable_value_names_its_place(persistence: Persistence) -> None:
    with pytest.raises(UserError, match=r"levels\[1\]"):
        await persistence.signal.write({"levels": [1, {2}]}, **KEY)
    assert await persistence.signal.read(**KEY) is None


@pytest.mark.sampled
@settings(max_examples=size(80, 400), deadline=None)
@given(
    writes=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers()), max_size=12),
    reads=st.lists(st.integers(-1, 10), min_size=25, max_size=25),
)
def test_no_read_at_any_time_returns_what_is_later(writes: list[tuple[str, int, int]], reads: list[int]) -> None:
    async def run() -> None:
        persistence = Persistence(files=MemoryStore)
        last: dict[str, tuple[int, int]] = {}
        for name, when, value in writes:
            last.pop(name, None)
            last[name] = (when, value)
            await persistence.state.write(value, signal_id="s", bucket_name=name, when=when)
        for now in reads:
            known = {name: value for name, (when, value) in last.items() if when <= now}
            for name in "abc":
                assert await persistence.state.read(signal_id="s", bucket_name=name, when=now) == known.get(name)
            listed = [(key["bucket_name"], value) async for key, value in persistence.state.list(when=now)]
            assert listed == list(known.items())[::-1]

    asyncio.run(run())


def test_importing_the_doors_imports_no_backend() -> None:
    program = (
        "import sys; import backtest_kit.persist.binding, backtest_kit.persist.lease; "
        "print(*sorted({'pyarrow', 'pandas', 'polars', 'ccxt', 'rich', 'typer', 'aiosqlite', 'filelock', "
        "'sqlite3', 'pytest', 'backtest_kit.persist.backends.file', 'backtest_kit.persist.backends.sqlite'} "
        "& set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
