"""Candles in monthly files. What every candle store does is in the conformance kit."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backtest_kit.errors import Damaged, UserError
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.persist.backends import columns
from backtest_kit.persist.backends.file_candles import FileCandleStore
from backtest_kit.persist.codec import NewerSchema
from backtest_kit.persist.store import SeriesKey

BTC = SeriesKey("binance", "BTC/USDT", "1m")
JANUARY = 1_640_995_200_000
MINUTE = 60_000
FIRST = "candle/binance/BTC%2FUSDT/1m/2022-01.candles"


def candles(count: int, start: int = JANUARY, price: float = 1.0) -> CandleSeries:
    column = np.full(count, price)
    return CandleSeries(start + np.arange(count) * MINUTE, column, column, column, column, column)


async def test_a_year_is_twelve_small_files_that_numpy_maps_into_memory(tmp_path: Path) -> None:
    year = candles(525_600)
    assert await FileCandleStore(tmp_path).write(BTC, year) == 525_600
    files = sorted((tmp_path / FIRST).parent.iterdir())
    assert [file.name for file in files] == [f"2022-{month:02d}.candles" for month in range(1, 13)]
    assert sum(file.stat().st_size for file in files) < 30_000_000
    data = files[0].read_bytes()
    length = int.from_bytes(data[12:16], "little")
    header = json.loads(data[16 : 16 + length])
    assert (header["series"], header["rows"]) == (["binance", "BTC/USDT", "1m"], 31 * 1440)
    assert [name for name, _ in header["columns"]] == list(COLUMNS)
    rows = header["rows"]
    for at, (name, kind) in enumerate(header["columns"]):
        column: Any = np.memmap(files[0], kind, "r", offset=16 + length + 8 * rows * at, shape=(rows,))
        assert np.array_equal(column, getattr(year[:rows], name))
    assert await FileCandleStore(tmp_path).read(BTC, 0, 2**53) == year


async def test_reading_copies_nothing(tmp_path: Path) -> None:
    store = FileCandleStore(tmp_path)
    await store.write(BTC, candles(1000))
    one, two = await store.read(BTC, JANUARY, JANUARY + 1), await store.read(BTC, JANUARY, JANUARY + MINUTE * 9)
    assert np.shares_memory(one.close, two.close)


async def test_what_was_read_cannot_be_changed(tmp_path: Path) -> None:
    store = FileCandleStore(tmp_path)
    await store.write(BTC, candles(10))
    read = await store.read(BTC, 0, 2**53)
    for name in COLUMNS:
        with pytest.raises(ValueError, match="read-only"):
            getattr(read, name)[0] = 7


async def test_a_replaced_month_does_not_change_what_was_read(tmp_path: Path) -> None:
    store = FileCandleStore(tmp_path)
    await store.write(BTC, candles(10))
    before = await store.read(BTC, 0, 2**53)
    await store.write(BTC, candles(500, JANUARY + 10 * MINUTE, 2.0))
    assert before == candles(10)
    assert len(await store.read(BTC, 0, 2**53)) == 510


async def test_candles_before_1970(tmp_path: Path) -> None:
    store = FileCandleStore(tmp_path)
    await store.write(BTC, candles(3, -MINUTE))
    assert await store.read(BTC, -MINUTE, 2 * MINUTE) == candles(3, -MINUTE)


async def test_disorder_is_refused(tmp_path: Path) -> None:
    series = candles(5).take([0, 1, 1, 2])
    with pytest.raises(UserError, match="not ascending at 2022-01-01T00:01Z"):
        await FileCandleStore(tmp_path).write(BTC, series)


async def test_no_path_leaves_the_root(tmp_path: Path) -> None:
    await FileCandleStore(tmp_path / "root").write(SeriesKey("..", "../../x", "."), candles(1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["root"]


def flip(place: float) -> Any:
    def change(data: bytearray) -> bytes:
        data[int(place * (len(data) - 1))] ^= 1
        return bytes(data)

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(flip(place / 20) for place in range(21)),
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\0",
        lambda data: b"\0" * len(data),
        lambda data: data[:12] + b"\xff\xff\xff\x7f" + data[16:],
    ],
)
async def test_a_damaged_month_is_kept_and_blocks_until_the_operator_decides(tmp_path: Path, change: Any) -> None:
    await FileCandleStore(tmp_path).write(BTC, candles(100))
    changed = bytes(change(bytearray((tmp_path / FIRST).read_bytes())))
    (tmp_path / FIRST).write_bytes(changed)
    for store in (FileCandleStore(tmp_path), FileCandleStore(tmp_path)):
        for _ in range(2):
            with pytest.raises(Damaged, match="quarantine"):
                await store.read(BTC, JANUARY, JANUARY + MINUTE)
        with pytest.raises(Damaged, match="quarantine"):
            await store.read(BTC, 0, 2**53)
        with pytest.raises(Damaged, match="quarantine"):
            await store.write(BTC, candles(1))
    assert (tmp_path / "quarantine" / FIRST).read_bytes() == changed
    assert not (tmp_path / FIRST).exists()
    assert await store.write(BTC, candles(1, JANUARY + 40 * 86_400_000)) == 1


async def test_the_files_of_another_series_are_refused(tmp_path: Path) -> None:
    store = FileCandleStore(tmp_path)
    await store.write(BTC, candles(10))
    other = SeriesKey("binance", "ETHUSDT", "1m")
    await store.write(other, candles(10, price=2.0))
    (tmp_path / "candle/binance/ETHUSDT/1m/2022-01.candles").replace(tmp_path / FIRST)
    with pytest.raises(Damaged, match="ETHUSDT"):
        await store.read(BTC, 0, 2**53)


async def test_a_newer_schema_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "SCHEMA_VERSION", 2)
    await FileCandleStore(tmp_path).write(BTC, candles(10))
    monkeypatch.undo()
    for operation in (FileCandleStore(tmp_path).read(BTC, 0, 2**53), FileCandleStore(tmp_path).write(BTC, candles(20))):
        with pytest.raises(NewerSchema, match="upgrade"):
            await operation
    assert (tmp_path / FIRST).exists()


def _race(root: str, price: float, results: Any) -> None:
    added = asyncio.run(FileCandleStore(root).write(BTC, candles(50, price=price)))
    results.put((price, added))


async def test_the_first_of_sixteen_processes_wins_for_ever(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path), float(n), results)) for n in range(1, 17)]
    for racer in racers:
        racer.start()
    outcome = dict(results.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join()
    winner = next(price for price, added in outcome.items() if added)
    assert sorted(outcome.values()) == [0] * 15 + [50]
    assert await FileCandleStore(tmp_path).read(BTC, 0, 2**53) == candles(50, price=winner)


async def test_a_cancelled_caller_leaves_nothing_behind(tmp_path: Path) -> None:
    store = FileCandleStore(tmp_path)
    for steps in range(4):
        writing = asyncio.ensure_future(store.write(BTC, candles(50)))
        for _ in range(steps):
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
    assert await store.write(BTC, candles(60)) in (10, 60)
    assert [file.name for file in (tmp_path / FIRST).parent.iterdir()] == ["2022-01.candles"]
