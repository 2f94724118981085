"""The heat map of symbols, its colours, and the frame of its numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from backtest_kit.model.interval import DAY_MS
from backtest_kit.model.position import Trade
from backtest_kit.report import BacktestResult, Results
from backtest_kit.report.heatmap import HEAT_FIELDS, symbol_heat_map
from backtest_kit.report.statistics import Statistics
from backtest_kit.report.wording import STATISTICS

START = 1_640_995_200_000
MakeTrade = Callable[..., Trade]
MakeResult = Callable[..., BacktestResult]
WithPnl = Callable[[str, list[float]], BacktestResult]


@pytest.fixture
def with_pnl(make_trade: MakeTrade, make_result: MakeResult) -> WithPnl:
    def make(symbol: str, gains: list[float]) -> BacktestResult:
        trades = [
            make_trade(symbol=symbol, pnl_pct=gain, closed_at_ms=START + (i + 1) * DAY_MS, fall_pct=min(gain, 0.0))
            for i, gain in enumerate(gains)
        ]
        return make_result(symbol, trades)

    return make


def test_rows_are_ranked_and_the_pool_is_one_series(with_pnl: WithPnl) -> None:
    results = Results([with_pnl("FEW", [9.0]), with_pnl("BAD", [-1, 0.5] * 6), with_pnl("GOOD", [1, -0.5] * 6)])
    table, tones = symbol_heat_map(results)
    assert [row[0] for row in table.rows] == ["GOOD", "BAD", "FEW"]
    assert table.total is not None
    pooled = dict(zip(table.header, table.total, strict=True))
    assert pooled["Symbol"] == "Pooled"
    assert pooled["Trades"] == "25"
    assert pooled["Sharpe"] == STATISTICS["sharpe_ratio"].cell(results.stats) != "N/A"
    assert {len(row) for row in table.rows} == {len(table.header)} == {len(HEAT_FIELDS) + 1}
    assert {len(row) for row in tones} == {len(HEAT_FIELDS)}


def test_a_cell_is_tinted_by_its_distance_from_neutral(with_pnl: WithPnl) -> None:
    results = Results([with_pnl("A", [4, -2] * 6), with_pnl("B", [-1] * 11 + [0.5]), with_pnl("C", [3])])
    table, tones = symbol_heat_map(results)
    at = {row[0]: dict(zip(HEAT_FIELDS, tone, strict=True)) for row, tone in zip(table.rows, tones, strict=True)}
    assert at["A"]["total_pnl"] == 1
    assert at["B"]["total_pnl"] == pytest.approx(-10.5 / 12, abs=1e-3)
    assert at["A"]["profit_factor"] == 1
    assert at["B"]["profit_factor"] == pytest.approx((0.5 / 11 - 1) / 1, abs=1e-3)
    assert at["C"]["profit_factor"] is None  # it never lost
    assert at["A"]["win_rate"] == 0  # half of the trades
    assert at["C"]["win_rate"] == 1
    assert at["B"]["max_drawdown"] == -1
    assert at["A"]["total_count"] is None  # more trades are neither good nor bad


def test_reports_have_it_where_there_are_several_symbols(with_pnl: WithPnl) -> None:
    one = with_pnl("A", [1, -1])
    assert "## Heat map" not in one.to_markdown()
    text = Results([one, with_pnl("B", [1, -2])]).to_markdown()
    heat = text[text.index("## Heat map") : text.index("## Statistics")].splitlines()
    assert heat[2].startswith("| Symbol | Total PnL % | Sharpe |")
    assert [line.split(" |")[0] for line in heat[4:7]] == ["| A", "| B", "| **Pooled**"]


def test_the_frame_has_every_statistic(with_pnl: WithPnl) -> None:
    results = Results([with_pnl("FEW", [9.0]), with_pnl("GOOD", [1, -0.5] * 6)])
    columns = ["symbol", "strategy_name", *Statistics.__struct_fields__]
    pandas = pytest.importorskip("pandas")
    frame = results.statistics_frame().to_pandas()
    assert list(frame.columns) == columns
    assert frame["symbol"].tolist() == ["GOOD", "FEW"]
    assert frame["total_pnl"].tolist() == pytest.approx([3, 9])
    assert pandas.isna(frame["sharpe_ratio"][1])
    pytest.importorskip("polars")
    rows = results.statistics_frame().to_polars()
    assert rows.columns == columns
    assert rows["sharpe_ratio"].to_list()[1] is None
    assert rows["trend"].to_list() == [results[1].stats.trend, None]
    assert len(Results().statistics_frame().to_polars()) == len(Results().statistics_frame().to_pandas()) == 0
