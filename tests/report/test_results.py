from __future__ import annotations

import ast
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import backtest_kit.report
from backtest_kit.errors import RetryLater, UserError
from backtest_kit.model.interval import DAY_MS, MINUTE_MS
from backtest_kit.model.position import Trade
from backtest_kit.report import BacktestResult, Results

START = 1_640_995_200_000
COLUMNS = [
    "signal_id",
    "symbol",
    "position",
    "opened_at",
    "closed_at",
    "price_open",
    "price_close",
    "close_reason",
    "cost",
    "pnl_pct",
    "pnl_cost",
    "peak_pct",
    "fall_pct",
]
MakeTrade = Callable[..., Trade]
MakeResult = Callable[..., BacktestResult]
Month = Callable[[str, int, int], BacktestResult]


def test_stats_are_of_all_trades_and_kept(month: Month) -> None:
    result = month("BTCUSDT", 1, 20)
    assert result.stats.total_count == 20
    assert result.stats is result.stats
    assert result.stats.median_step_size is not None


def test_a_pool_is_one_series_in_order_of_close(month: Month) -> None:
    results = Results([month("BTCUSDT", 1, 20), month("ETHUSDT", 2, 15)])
    closes = [trade.closed_at_ms for trade in results.trades]
    assert closes == sorted(closes)
    assert results.stats.total_count == 35
    assert results.stats.total_pnl == pytest.approx(sum((result.stats.total_pnl or 0) for result in results))
    assert results.stats.median_step_size is None  # prices of two markets make no series


def test_results_are_a_sequence(month: Month) -> None:
    one, two = month("BTCUSDT", 1, 3), month("ETHUSDT", 2, 3)
    results = Results([one, two])
    assert (len(results), results[1], list(results)) == (2, two, [one, two])
    assert isinstance(results[:1], Results)
    assert list(results[1:]) == [two]


def test_a_result_crosses_processes(month: Month) -> None:
    result = month("BTCUSDT", 1, 3)
    again = pickle.loads(pickle.dumps(result))  # noqa: S301
    assert again.trades == result.trades
    assert again.chart == result.chart
    assert again.stats == result.stats


def test_pandas_frame(make_trade: MakeTrade, make_result: MakeResult) -> None:
    pandas = pytest.importorskip("pandas")
    late = make_trade(signal_id="late", closed_at_ms=START + 2 * DAY_MS + 1)
    result = make_result("BTCUSDT", [make_trade(), late])
    frame = result.to_pandas()
    assert list(frame.columns) == COLUMNS
    assert str(frame["closed_at"].dtype) == "datetime64[ms, UTC]"
    assert frame["closed_at"][1].to_pydatetime() == datetime(2022, 1, 3, 0, 0, 0, 1000, UTC)
    assert frame["signal_id"].tolist() == ["s-1", "late"]
    assert frame["fall_pct"].tolist() == [-0.4, -0.4]
    empty = make_result().to_pandas()
    assert len(empty) == 0
    assert empty.dtypes.to_dict() == frame.dtypes.to_dict()
    pooled = Results([result, make_result("ETHUSDT", [make_trade(symbol="ETHUSDT", closed_at_ms=START + DAY_MS)])])
    assert pooled.to_pandas()["symbol"].tolist() == ["BTCUSDT", "ETHUSDT", "BTCUSDT"]
    assert pandas.concat([empty, frame]).shape == (2, 13)


def test_trades_are_saved_in_formats_that_others_read(
    tmp_path: Path, make_trade: MakeTrade, make_result: MakeResult
) -> None:
    pandas = pytest.importorskip("pandas")
    result = make_result("BTCUSDT", [make_trade(), make_trade(signal_id="a, b")])
    expected = result.to_pandas()
    read = pandas.read_parquet(result.save_trades(tmp_path / "trades.parquet"))
    pandas.testing.assert_frame_equal(read, expected, check_dtype=False)
    read = pandas.read_feather(Results([result]).save_trades(tmp_path / "trades.feather"))
    pandas.testing.assert_frame_equal(read, expected, check_dtype=False)
    read = pandas.read_csv(result.save_trades(tmp_path / "trades.csv"), parse_dates=["opened_at", "closed_at"])
    pandas.testing.assert_frame_equal(read, expected, check_dtype=False)
    with pytest.raises(UserError, match=r"trades.txt has the suffix '.txt': use one of .csv, .parquet"):
        result.save_trades(tmp_path / "trades.txt")


def test_the_modules_of_reports_do_not_import_in_circles() -> None:
    root = Path(backtest_kit.report.__file__).parent
    names = {
        ".".join(["backtest_kit.report", *path.relative_to(root).with_suffix("").parts]) for path in root.rglob("*.py")
    }
    imports = {}
    for name in names:
        tree = ast.parse(Path(root.parent.parent, *name.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        asked = {f"{node.module}.{alias.name}" for node in found for alias in node.names} | {
            str(each.module) for each in found
        }
        imports[name] = asked & names
    TopologicalSorter(imports).prepare()  # raises where there is a circle


def test_polars_frame(make_trade: MakeTrade, make_result: MakeResult) -> None:
    polars = pytest.importorskip("polars")
    result = make_result("BTCUSDT", [make_trade()])
    frame = result.to_polars()
    assert frame.columns == COLUMNS
    assert frame.schema["opened_at"] == polars.Datetime("ms", "UTC")
    assert frame["opened_at"][0] == datetime(2022, 1, 1, 1, tzinfo=UTC)
    assert frame["pnl_pct"].to_list() == [1.5]
    empty = make_result().to_polars()
    assert (empty.schema, len(empty)) == (frame.schema, 0)
    assert Results([result]).to_polars().equals(frame)


@pytest.mark.parametrize(("package", "method"), [("pandas", "to_pandas"), ("polars", "to_polars")])
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, make_result: MakeResult, package: str, method: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install 'backtest-kit\[{package}\]'"):
        getattr(make_result(), method)()


def test_table_ranks_by_sharpe_with_the_unknown_last(
    month: Month, make_result: MakeResult, make_trade: MakeTrade
) -> None:
    def with_pnl(symbol: str, gain: float) -> BacktestResult:
        trades = [
            make_trade(
                symbol=symbol,
                pnl_pct=gain + i % 2,
                closed_at_ms=START + (i + 1) * DAY_MS,
                close_reason="frame_end" if i == 11 else "closed",
            )
            for i in range(12)
        ]
        return make_result(symbol, trades)

    few = make_result("FEW", [make_trade(symbol="FEW")])
    text = str(Results([few, with_pnl("WORSE", -3), with_pnl("BETTER", 1)]))
    places = [text.rindex(name) for name in ("BETTER", "WORSE", "FEW", "Total ")]
    assert places == sorted(places)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 120
    better = next(line for line in text.splitlines() if "BETTER" in line)
    cells = better.replace("|", " ").split()
    assert cells[:4] == ["BETTER", "12", "100.00", "+18.00"]
    assert cells[-1] == "1"
    assert "N/A" in next(line for line in text.splitlines() if "FEW" in line)


def test_table_takes_markup_for_text(make_result: MakeResult, make_trade: MakeTrade) -> None:
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(Results([make_result("[red]X[/red]", [make_trade()])]).table())
        assert "[red]X[/red]" in console.export_text()


def test_two_results_of_one_symbol_are_told_apart(make_result: MakeResult) -> None:
    text = Results([make_result(), make_result(strategy_name="other")]).to_markdown()
    assert "BTCUSDT (trend, binance, jan-2022)" in text
    assert "BTCUSDT (other, binance, jan-2022)" in text


def test_repr_and_str_are_short(month: Month, make_result: MakeResult) -> None:
    assert repr(make_result()) == "BacktestResult('trend' on 'BTCUSDT': 0 trades, N/A)"
    assert "Results(1 results: 3 trades" in repr(Results([month("BTCUSDT", 1, 3)]))
    assert str(make_result()) == str(Results([make_result()]))
    assert "Backtest" in str(Results())


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("trend", "trend"),
        ("../../etc/passwd", "%2E.%2F..%2Fetc%2Fpasswd"),
        ("..", "%2E."),
        ("a/b\\c:d", "a%2Fb%5Cc%3Ad"),
        ("two words", "two words"),
        ("", "%"),
    ],
)
def test_no_strategy_name_leaves_the_directory(tmp_path: Path, make_result: MakeResult, name: str, file: str) -> None:
    result = make_result(strategy_name=name, report_path=tmp_path / "backtest")
    path = result.save_markdown()
    assert path == tmp_path / "backtest" / f"{file}.md"
    assert [entry.name for entry in (tmp_path / "backtest").iterdir()] == [f"{file}.md"]


def test_long_names_stay_apart_and_fit(tmp_path: Path, make_result: MakeResult) -> None:
    paths = {
        make_result(strategy_name="стратегия" * 30 + end, report_path=tmp_path).save_markdown() for end in ("a", "b")
    }
    assert len(paths) == 2
    assert all(len(path.name) < 200 for path in paths)


def test_a_path_of_ones_own_is_used_as_it_is(tmp_path: Path, make_result: MakeResult) -> None:
    assert make_result().save_markdown(str(tmp_path / "new" / "r.md")) == tmp_path / "new" / "r.md"
    assert (tmp_path / "new" / "r.md").read_text(encoding="utf-8") == make_result().to_markdown()
    with pytest.raises(UserError, match="is a directory"):
        make_result().save_markdown(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RetryLater, match="cannot write"):
        make_result().save_markdown(tmp_path / "file" / "r.md")


@pytest.mark.parametrize("save", ["save_markdown", "save_html"])
def test_several_strategies_need_a_path(tmp_path: Path, make_result: MakeResult, save: str) -> None:
    mixed = Results([make_result(report_path=tmp_path), make_result(strategy_name="other", report_path=tmp_path)])
    with pytest.raises(UserError, match=r"2 strategies \(other, trend\).*path="):
        getattr(mixed, save)()
    assert getattr(mixed, save)(tmp_path / "both").is_file()
    with pytest.raises(UserError, match=r"0 strategies \(no results\)"):
        getattr(Results(), save)()


def test_importing_the_package_is_cheap() -> None:
    heavy = ("pandas", "polars", "rich", "pyarrow", "ccxt", "typer", "aiosqlite", "html")
    code = f"import sys, backtest_kit.report; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout.strip() == "[]"


def _environment() -> dict[str, Any]:
    import backtest_kit

    return {**os.environ, "PYTHONPATH": str(Path(backtest_kit.__file__).parents[1])}


def test_statistics_have_no_cap_and_are_quick_to_ask_twice(make_result: MakeResult, make_trade: MakeTrade) -> None:
    trades = [make_trade(signal_id=str(i), closed_at_ms=START + (i + 200) * MINUTE_MS) for i in range(1000)]
    result = make_result("BTCUSDT", trades)
    assert result.stats.total_count == 1000
    assert result.stats.total_pnl == pytest.approx(1500)
    assert "750 earlier trades are not printed; the statistics count all 1000." in result.to_markdown()
    assert result.to_markdown().count("| BTCUSDT | long |") == 250
