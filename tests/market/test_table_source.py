from __future__ import annotations

import asyncio
import bz2
import gzip
import lzma
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from backtest_kit.errors import UserError
from backtest_kit.market import sources
from backtest_kit.market.fetch import CandleFeed
from backtest_kit.market.sources import CandleSource
from backtest_kit.market.sources.csv_file import _read_csv
from backtest_kit.market.sources.table import Table, TableSource
from backtest_kit.model.candle import COLUMNS, NO_TIME, CandleSeries
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.settings import Settings

START = 1_640_995_200_000
HEADER = "timestamp,open,high,low,close,volume"
Make = Callable[..., CandleSeries]


def text_of(candles: CandleSeries, header: str = HEADER, time: Callable[[int], object] = int) -> str:
    rows = zip(*(candles.columns()[name].tolist() for name in COLUMNS), strict=True)
    return "\n".join([header, *(",".join([str(time(row[0])), *map(repr, row[1:])]) for row in rows)]) + "\n"


async def everything(source: CandleSource, symbol: str = "BTCUSDT") -> CandleSeries:
    bounds = await source.range(symbol)
    assert bounds is not None
    return await source.fetch(symbol, "1m", *bounds)


async def refusal(source: CandleSource, symbol: str = "BTCUSDT") -> str:
    with pytest.raises(UserError) as caught:
        await source.verify(symbol)
    return str(caught.value)


def zstandard(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


@pytest.mark.parametrize(
    ("suffix", "compressed"),
    [
        (".csv", bytes),
        (".csv.gz", gzip.compress),
        (".csv.bz2", bz2.compress),
        (".csv.xz", lzma.compress),
        (".csv.zst", zstandard),
    ],
)
async def test_a_csv_file_is_read_compressed_or_not(
    make_candles: Make, tmp_path: Path, suffix: str, compressed: Callable[[bytes], bytes]
) -> None:
    held = make_candles(50)
    path = tmp_path / f"candles{suffix}"
    path.write_bytes(compressed(text_of(held).encode()))
    source = sources.csv(path)
    assert await everything(source) == held
    assert await source.range("X") == (START, START + 50 * MINUTE_MS)
    part = await source.fetch("X", "1m", START + 5 * MINUTE_MS, START + 9 * MINUTE_MS)
    assert part == held[5:9]
    assert len(await source.fetch("X", "1m", 0, START)) == 0


async def test_a_parquet_file_is_read(make_candles: Make, tmp_path: Path) -> None:
    held = make_candles(50)
    columns: dict[str, Any] = dict(held.columns())
    columns["timestamp"] = pa.array(held.timestamp * 1000, pa.timestamp("us", "Europe/Berlin"))
    pa.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert await everything(sources.parquet(str(tmp_path / "x.parquet"))) == held


async def test_texts_and_decimals_of_a_parquet_file_are_numbers_too(make_candles: Make, tmp_path: Path) -> None:
    held = make_candles(50)
    columns: dict[str, Any] = dict(held.columns())
    columns["timestamp"] = pa.array([str(at) for at in held.timestamp.tolist()])
    columns["open"] = pa.array([repr(price) for price in held.open.tolist()])
    columns["volume"] = pa.array(np.round(held.volume, 3)).cast(pa.decimal128(12, 3))
    pa.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    read = await everything(sources.parquet(tmp_path / "x.parquet"))
    assert np.array_equal(read.timestamp, held.timestamp)
    assert np.array_equal(read.open, held.open)
    assert read.volume == pytest.approx(np.round(held.volume, 3), rel=1e-15)
    columns["open"] = pa.array(held.timestamp, pa.timestamp("ms"))
    pa.parquet.write_table(pa.table(columns), tmp_path / "y.parquet")
    assert "y.parquet, row 1: 'open' is datetime" in await refusal(sources.parquet(tmp_path / "y.parquet"))


@pytest.mark.parametrize(
    "header",
    [
        "Date,Open,High,Low,Close,Volume",
        " open_time ,o,h,l,c,v",
        "\ufeffTime,OPEN,HIGH,LOW,CLOSE,VOL",
        "Open Time,open,high,low,close,base volume",
    ],
)
async def test_columns_go_by_many_names(make_candles: Make, tmp_path: Path, header: str) -> None:
    held = make_candles(5)
    (tmp_path / "x.csv").write_text(text_of(held, header), encoding="utf-8")
    assert await everything(sources.csv(tmp_path / "x.csv")) == held


@pytest.mark.parametrize(
    "time",
    [
        lambda ms: ms // 1000,
        lambda ms: ms / 1000,
        lambda ms: ms * 1000,
        lambda ms: ms * 1_000_000,
        lambda ms: datetime.fromtimestamp(ms / 1000, UTC).isoformat(),
        lambda ms: datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S"),
        lambda ms: datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%MZ"),
        lambda ms: datetime.fromtimestamp(ms / 1000 + 7200, UTC).strftime("%Y-%m-%dT%H:%M:%S.000+02:00"),
    ],
    ids=["s", "float s", "us", "ns", "iso", "iso naive", "iso minutes", "iso other zone"],
)
async def test_times_are_understood(make_candles: Make, tmp_path: Path, time: Callable[[int], object]) -> None:
    held = make_candles(5)
    (tmp_path / "x.csv").write_text(text_of(held, time=time))
    assert await everything(sources.csv(tmp_path / "x.csv")) == held


async def test_a_day_column_that_hides_the_minutes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"{HEADER}\n2022-01-01,1,1,1,1,1\n2022-01-01,1,1,1,1,1\n")
    assert "2022-01-01T00:00Z appears twice" in await refusal(sources.csv(tmp_path / "x.csv"))


async def test_a_binance_download_needs_no_header(make_candles: Make, tmp_path: Path) -> None:
    held = make_candles(5)
    lines = text_of(held).splitlines()[1:]
    (tmp_path / "x.csv").write_text("\n".join(f"{line},1641000000000,1,2,3,4,0" for line in lines))
    assert await everything(sources.csv(tmp_path / "x.csv")) == held
    (tmp_path / "y.csv").write_text("\n".join(lines))
    assert "y.csv cannot be read as candles: it has no header line" in await refusal(sources.csv(tmp_path / "y.csv"))


async def test_a_symbol_column_picks_the_rows(make_candles: Make, tmp_path: Path) -> None:
    one, two = make_candles(5), make_candles(7, seed=2)
    body = [HEADER + ",Symbol"]
    for name, held in (("BTCUSDT", one), ("ETHUSDT", two)):
        body += [f"{line},{name}" for line in text_of(held).splitlines()[1:]]
    (tmp_path / "x.csv").write_text("\n".join(body))
    source = sources.csv(tmp_path / "x.csv")
    assert await everything(source, "BTCUSDT") == one
    assert await everything(source, "ETHUSDT") == two
    assert "has no candle of XRPUSDT: its symbol column holds BTCUSDT, ETHUSDT" in await refusal(source, "XRPUSDT")


async def test_a_pattern_serves_a_file_per_symbol(make_candles: Make, tmp_path: Path) -> None:
    for seed, name in enumerate(("BTCUSDT", "ETHUSDT")):
        (tmp_path / f"{name}.csv").write_text(text_of(make_candles(5, seed=seed)))
    source = sources.csv(f"{tmp_path}/{{symbol}}.csv")
    assert await everything(source, "BTCUSDT") == make_candles(5, seed=0)
    assert await everything(source, "ETHUSDT") == make_candles(5, seed=1)
    assert "XRPUSDT.csv does not exist" in await refusal(source, "XRPUSDT")


async def test_a_file_is_parsed_once(make_candles: Make, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text_of(make_candles(50)))
    reads: list[Path] = []

    def counted(path: Path) -> Table:
        reads.append(path)
        return _read_csv(path)

    source = TableSource(tmp_path / "x.csv", counted)
    await asyncio.gather(*(source.fetch("X", "1m", START, START + MINUTE_MS) for _ in range(8)))
    assert len(reads) == 1


async def test_a_file_that_was_corrected_is_read_again(make_candles: Make, tmp_path: Path) -> None:
    source = sources.csv(tmp_path / "x.csv")
    assert "does not exist" in await refusal(source)
    (tmp_path / "x.csv").write_text(text_of(make_candles(5)))
    assert await everything(source) == make_candles(5)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "x.csv is empty"),
        (HEADER.encode() + b"\n", "has a header but no candle"),
        (b"date,price\n2022-01-01,5\n", "lacks open, high, low, close, volume"),
        (b"date,price\n2022-01-01,5\n", "this one has 'date', 'price'"),
        (f"{HEADER}\n{START},1,1,1,1,1\n{START + MINUTE_MS},1,high,1,1,1\n".encode(), "line 3: 'high' is 'high'"),
        (f"{HEADER}\n{START},1,1,1,1,1\n{START + MINUTE_MS},1,1,1,,1\n".encode(), "line 3: 'close' is empty"),
        (f"{HEADER}\n{START},1,1,1,1,1\nyesterday,1,1,1,1,1\n".encode(), "line 3: 'timestamp' is 'yesterday'"),
        (f"{HEADER}\n{START},1,1,1,1,1\n,1,1,1,1,1\n".encode(), "line 3: 'timestamp' is empty: write it as ISO 8601"),
        (f"{HEADER}\n{START},1,1,1,1,1\n12,1,1,1,1,1\n".encode(), "line 3: 'timestamp' is '12': write it as ISO 8601"),
        (f"{HEADER}\n12,1,1,1,1,1\n".encode(), "line 2: 'timestamp' is '12': write it as ISO 8601"),
        (f"{HEADER}\n{START}001,1,1,1,1,1\n".encode(), "do not open on a whole 60 s step"),
        (f"{HEADER}\n{START},1,1,1,1,inf\n".encode(), "line 2: 'volume' is 'inf': give a finite number"),
        (f"{HEADER}\n{START + 1},1,1,1,1,1\n".encode(), "do not open on a whole 60 s step"),
        (f"{HEADER}\n{START},1,1,1\n".encode(), f"line 2: 4 cells where the header has 6 ('{START},1,1,1'): correct"),
        (f"{HEADER}\n{START},1,1,1,1,1,000\n".encode(), "line 2: 7 cells where the header has 6"),
        (f"{HEADER}\n{START},1,1,1,1,1\n\n  \n{START + MINUTE_MS},1,1\n".encode(), "line 5: 3 cells where"),
        (f'{HEADER}\n{START},1,1,1,1,1\n"{START + MINUTE_MS},1,1,1,1,1\n'.encode(), "line 3: 1 cell where"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xfe" * 20, "cannot be read as candles"),
    ],
)
async def test_a_file_that_is_no_candle_file_says_why(tmp_path: Path, body: bytes, said: str) -> None:
    (tmp_path / "x.csv").write_bytes(body)
    message = await refusal(sources.csv(tmp_path / "x.csv"))
    assert said in message
    assert str(tmp_path / "x.csv") in message


async def test_candles_out_of_order_are_named_and_served_as_they_are(make_candles: Make, tmp_path: Path) -> None:
    held = make_candles(5)
    (tmp_path / "x.csv").write_text(text_of(held.take(np.array([0, 2, 1]))))
    message = await refusal(sources.csv(tmp_path / "x.csv"))
    assert "x.csv: candles must be oldest first" in message
    assert "2022-01-01T00:01Z comes after the candle of 2022-01-01T00:02Z" in message
    read = await sources.csv(tmp_path / "x.csv").fetch("X", "1m", START + MINUTE_MS, START + 5 * MINUTE_MS)
    assert read == held.take(np.array([2, 1]))


async def test_each_time_tells_its_own_unit(make_candles: Make, tmp_path: Path) -> None:
    """Two months of Binance joined: it counts microseconds since 2025. And a tool that wrote both ways."""
    held = make_candles(4)
    ways: list[Callable[[int], object]] = [
        int,
        lambda ms: ms * 1000,
        lambda ms: ms // 1000,
        lambda ms: datetime.fromtimestamp(ms / 1000, UTC).isoformat(),
    ]
    lines = [text_of(held[at : at + 1], time=way).splitlines()[1] for at, way in enumerate(ways)]
    (tmp_path / "x.csv").write_text("\n".join([HEADER, *lines[:3]]))
    assert await everything(sources.csv(tmp_path / "x.csv")) == held[:3]
    (tmp_path / "y.csv").write_text("\n".join([HEADER, *lines]))
    assert await everything(sources.csv(tmp_path / "y.csv")) == held
    await sources.csv(tmp_path / "y.csv").verify("BTCUSDT")


async def test_what_cannot_be_read_stays_in_its_place(make_candles: Make, tmp_path: Path) -> None:
    """The caller decides what becomes of it: it is never left out in silence."""
    held = make_candles(5)
    lines = text_of(held).splitlines()
    lines[2] = f"{START + MINUTE_MS},1,none,1,,1"
    lines[4] = "yesterday,1,1,1,1,1"
    (tmp_path / "x.csv").write_text("\n".join(lines))
    source = sources.csv(tmp_path / "x.csv")
    assert await source.range("X") == (START, START + 5 * MINUTE_MS)
    read = await source.fetch("X", "1m", START + MINUTE_MS, START + 4 * MINUTE_MS)
    assert read.timestamp.tolist() == [START + MINUTE_MS, START + 2 * MINUTE_MS, NO_TIME]
    assert np.isnan(read.high[0])
    assert np.isnan(read.close[0])
    assert read[1:2] == held[2:3]
    columns = {**dict(held.columns()), "timestamp": pa.array([START * 10**6, None], pa.timestamp("ns"))}
    table = pa.table({name: column[:2] for name, column in columns.items()})
    pa.parquet.write_table(table, tmp_path / "y.parquet")
    assert (await everything(sources.parquet(tmp_path / "y.parquet"))).timestamp.tolist() == [START, NO_TIME]


async def test_damaged_missing_and_impossible_paths(make_candles: Make, tmp_path: Path) -> None:
    whole = gzip.compress(text_of(make_candles(500)).encode())
    (tmp_path / "x.csv.gz").write_bytes(whole[: len(whole) // 2])
    assert "x.csv.gz cannot be read as candles" in await refusal(sources.csv(tmp_path / "x.csv.gz"))
    (tmp_path / "y.csv.gz").write_bytes(b"not gzip at all")
    assert "y.csv.gz cannot be read as candles" in await refusal(sources.csv(tmp_path / "y.csv.gz"))
    (tmp_path / "z.parquet").write_text(text_of(make_candles(5)))
    assert "z.parquet cannot be read as candles" in await refusal(sources.parquet(tmp_path / "z.parquet"))
    assert "is a directory" in await refusal(sources.csv(tmp_path))
    assert "does not exist" in await refusal(sources.csv(tmp_path / "no" / "such.csv"))


async def test_a_file_has_minutes_only(make_candles: Make, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text_of(make_candles(5)))
    with pytest.raises(UserError, match="interval of a candle file is '1h': use one of 1m"):
        await sources.csv(tmp_path / "x.csv").fetch("X", "1h", START, START + 60 * MINUTE_MS)


async def test_a_row_with_too_few_cells_is_a_missing_minute_where_rows_are_repaired(
    make_candles: Make, tmp_path: Path
) -> None:
    held = make_candles(50_000)
    lines = text_of(held).splitlines()
    lines[40_001] = lines[40_001].rpartition(",")[0]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    stop_ms = START + 50_000 * MINUTE_MS

    def feed() -> CandleFeed:
        return CandleFeed("X", sources.csv(tmp_path / "x.csv"), None, Settings(), lambda: stop_ms)

    with pytest.raises(UserError, match=r"x\.csv, line 40002: 5 cells where the header has 6 .*dirty=.repair"):
        await feed().load("BTCUSDT", START, stop_ms)
    loaded = await feed().load("BTCUSDT", START, stop_ms, gaps="fill", dirty="repair")
    assert (loaded.filled, dict(loaded.repairs)) == (1, {"no_time": 1})
    assert loaded.real is not None
    assert np.flatnonzero(~loaded.real).tolist() == [40_000]
    assert loaded.candles.take(loaded.real) == held.take(loaded.real)


async def test_columns_that_are_not_wanted_may_hold_anything(make_candles: Make, tmp_path: Path) -> None:
    held = make_candles(5)
    lines = text_of(held).splitlines()
    body = [f"{line},{note}" for line, note in zip(lines, ("note", "", "7", '"a, b"', "x" * 99, "\u00e9"), strict=True)]
    (tmp_path / "x.csv").write_text("\n".join(body), encoding="utf-8")
    assert await everything(sources.csv(tmp_path / "x.csv")) == held


async def test_long_symbols_and_those_of_other_scripts_are_kept_whole(make_candles: Make, tmp_path: Path) -> None:
    held = make_candles(4)
    names = ["L" * 50, "L" * 49, "\u6bd4\u7279\u5e01", "BTC"]
    lines = text_of(held).splitlines()
    body = [f"{lines[0]},symbol", *(f"{line},{name}" for line, name in zip(lines[1:], names, strict=True))]
    (tmp_path / "x.csv").write_text("\n".join(body), encoding="utf-8")
    for at, name in enumerate(names):
        assert await everything(sources.csv(tmp_path / "x.csv"), name) == held[at : at + 1]


@pytest.mark.parametrize(
    "times", ["2022-13-01T00:00:00", "2022-02-30T00:00:00", "2022-01-01T24:61:00", "202a-01-01T00:00:00"]
)
async def test_a_time_that_is_in_no_calendar_is_named(tmp_path: Path, times: str) -> None:
    (tmp_path / "x.csv").write_text(f"{HEADER}\n2022-01-01T00:00:00,1,1,1,1,1\n{times},1,1,1,1,1\n")
    assert f"line 3: 'timestamp' is '{times}'" in await refusal(sources.csv(tmp_path / "x.csv"))


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".feather", ".arrow", ".arrows"])
async def test_saved_candles_are_read_back(make_candles: Make, tmp_path: Path, suffix: str) -> None:
    held = make_candles(300)
    path = sources.save(held, tmp_path / f"new/x{suffix}")
    read = {".csv": sources.csv, ".parquet": sources.parquet}.get(suffix, sources.arrow)
    assert await everything(read(path)) == held


def test_candles_are_saved_in_known_formats_only(make_candles: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.xlsx has the suffix '.xlsx': use one of .csv, .parquet"):
        sources.save(make_candles(3), tmp_path / "x.xlsx")


async def test_nulls_and_categories_of_an_arrow_file(tmp_path: Path) -> None:
    ones = pa.array([1, None, 3], pa.int64())
    table = pa.table(
        {
            "time": pa.array([START, START + MINUTE_MS, None], pa.int64()),
            **dict.fromkeys(("o", "h", "l"), ones),
            "c": pa.array([1.0, 2.0, 3.0]),
            "v": pa.array(["1", "2", "x"]).dictionary_encode(),
        }
    )
    with pa.ipc.new_file(str(tmp_path / "x.feather"), table.schema) as writer:
        writer.write_table(table)
    source = sources.arrow(tmp_path / "x.feather")
    assert "x.feather, row 3: 'time' is nan: write it as" in await refusal(source)
    read = await everything(source)
    assert read.timestamp.tolist() == [START, START + MINUTE_MS, NO_TIME]
    assert np.isnan(read.open).tolist() == [False, True, False]
    assert np.isnan(read.volume).tolist() == [False, False, True]


@pytest.mark.parametrize("suffix", [".feather", ".arrow", ".arrows", ".parquet"])
async def test_what_is_no_arrow_file_says_so(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_text(HEADER)
    assert f"x{suffix} cannot be read as candles" in await refusal(sources.arrow(tmp_path / f"x{suffix}"))


@pytest.mark.parametrize(
    "use",
    [
        "asyncio.run(sources.parquet('x.parquet').range('X'))",
        "asyncio.run(sources.arrow('x.feather').range('X'))",
        "asyncio.run(sources.csv('x.csv.zst').range('X'))",
        "sources.save(CandleSeries.empty(), 'y.parquet')",
    ],
)
def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, use: str) -> None:
    for name in ("x.parquet", "x.feather", "x.csv.zst"):
        (tmp_path / name).write_bytes(b"anything")
    program = (
        "import asyncio, sys\nsys.modules['pyarrow'] = None\nfrom backtest_kit.market import sources\n"
        "from backtest_kit.model.candle import CandleSeries\n"
        f"from backtest_kit.errors import UserError\ntry:\n    {use}\nexcept UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "needs pyarrow: pip install 'backtest-kit[arrow]'" in done.stdout
