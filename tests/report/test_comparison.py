"""A comparison: its order, its tables and frames, its Markdown and its page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from backtest_kit.errors import UserError
from backtest_kit.model.interval import DAY_MS
from backtest_kit.model.position import Trade
from backtest_kit.report import BacktestResult, Results, equity_curve
from backtest_kit.report.comparison import Comparison
from backtest_kit.report.ranking import METRICS, Contender, Failure, metric_line
from backtest_kit.report.render.comparison import render_comparison_page
from backtest_kit.report.statistics import Statistics

START = 1_640_995_200_000
HOSTILE = "</script><script>alert(1)</script>|<b>{{data}}"
MakeTrade = Callable[..., Trade]
MakeResult = Callable[..., BacktestResult]
Contend = Callable[..., Contender]
Draw = Callable[[Path], str]


@pytest.fixture
def contend(make_trade: MakeTrade, make_result: MakeResult) -> Contend:
    def make(name: str, pnl: Sequence[float], **changes: Any) -> Contender:
        trades = [
            make_trade(
                strategy_name=name, pnl_pct=each, closed_at_ms=START + (day + 1) * DAY_MS, fall_pct=min(each, 0.0)
            )
            for day, each in enumerate(pnl)
        ]
        return Contender(
            strategy_name=name, results=Results([make_result(trades=trades, strategy_name=name)]), **changes
        )

    return make


def compare(*contenders: Contender, metric: str = "total_pnl", **changes: Any) -> Comparison:
    where: dict[str, Any] = {"symbols": ["BTCUSDT"], "exchange_name": "binance", "frame_name": "jan-2022"}
    return Comparison(contenders, metric=metric, **where | changes)


def names(comparison: Comparison) -> list[str]:
    return [each.strategy_name for each in comparison]


FAILED = Contender(strategy_name="bad", results=Results(), failure=Failure("ETHUSDT", ValueError("no\nluck")))


def test_best_first_ties_stable_unknown_then_failed_last(contend: Contend) -> None:
    comparison = compare(
        FAILED, contend("none", []), contend("b", [1, 1]), contend("a", [2]), contend("low", [-5]), contend("top", [9])
    )
    assert names(comparison) == ["top", "b", "a", "low", "none", "bad"]
    assert [each.value for each in comparison] == [9, 2, 2, -5, None, None]
    assert comparison.best is comparison[0]
    assert comparison[1:3] == (comparison[1], comparison[2])
    assert compare().best is compare(FAILED).best is compare(contend("none", [])).best is None


@pytest.mark.parametrize("metric", ["max_drawdown", "loss_count", "std_dev", "max_loss_streak"])
def test_less_is_better_of_what_hurts(contend: Contend, metric: str) -> None:
    calm, wild = contend("calm", [1, -1, 1] * 4), contend("wild", [5, -9, -9] * 4)
    assert names(compare(wild, calm, contend("idle", []), metric=metric)) == ["calm", "wild", "idle"]


def test_every_numeric_statistic_is_a_metric(contend: Contend) -> None:
    assert set(METRICS) == set(Statistics.__struct_fields__) - {"trend"}
    for metric in METRICS:
        assert metric_line(metric).field == metric
        compare(contend("a", [1.0, -1.0] * 10), metric=metric).to_markdown()
    with pytest.raises(UserError, match="metric is 'sharpe': use one of total_count, "):
        compare(metric="sharpe")


def test_the_table_shows_the_metric_once_and_why_one_failed(contend: Contend) -> None:
    comparison = compare(contend("a", [1, 2, -1]), FAILED)
    table = comparison.ranked_table()
    assert table.header[:3] == ("Rank", "Strategy", "Total PnL %")
    assert len(set(table.header)) == len(table.header)
    assert table.rows[0][:4] == ("1", "a", "+2.00", "3")
    assert table.rows[1][:4] == ("", "bad", "failed", "")
    assert {len(row) for row in table.rows} == {len(table.header)}
    text = str(comparison)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 120
    assert "bad failed on ETHUSDT: ValueError: no luck" in text
    assert repr(comparison) == "Comparison(2 strategies by total_pnl: best 'a')"
    assert repr(compare(FAILED)) == "Comparison(1 strategies by total_pnl: none ranked)"


def test_the_best_of_several_is_not_sold_as_found(contend: Contend) -> None:
    assert compare(contend("a", [1]), FAILED).remarks() == []
    (remark,) = compare(contend("a", [1]), contend("b", [1]), FAILED).remarks()
    assert remark.startswith("The best of 2 was chosen on the same candles")


def test_frames_have_a_row_per_contender(contend: Contend) -> None:
    comparison = compare(
        contend("a", [1.0], parameters={"fast": 5, "kind": "ema"}), contend("b", [3.0], parameters={"fast": 9}), FAILED
    )
    columns = ["rank", "strategy_name", "error", "param_fast", "param_kind", *Statistics.__struct_fields__]
    pandas = pytest.importorskip("pandas")
    frame = comparison.to_pandas()
    assert list(frame.columns) == columns
    assert frame["strategy_name"].tolist() == ["b", "a", "bad"]
    assert frame["rank"].tolist()[:2] == [1, 2]
    assert frame["param_fast"].tolist()[:2] == [9, 5]
    assert frame["total_pnl"].tolist()[:2] == [3, 1]
    assert pandas.isna(frame["rank"][2])
    assert pandas.isna(frame["total_pnl"][2])
    assert pandas.isna(frame["error"][0])
    pytest.importorskip("polars")
    rows = comparison.to_polars()
    assert rows.columns == columns
    assert rows["rank"].to_list() == [1, 2, None]
    assert rows["param_kind"].to_list() == [None, "ema", None]
    assert rows["error"].to_list() == [None, None, "ETHUSDT: ValueError: no luck"]


def test_markdown(contend: Contend) -> None:
    lines = compare(contend("a|b", [1, 2]), contend("c", [1]), FAILED).to_markdown().splitlines()
    assert lines[:6] == [
        "# Strategies by Total PnL",
        "",
        "BTCUSDT, binance, jan-2022",
        "",
        "| Rank | Strategy | Total PnL % | Trades | Win rate % | Avg PnL % | Sharpe | Sortino | Max DD % |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    assert lines[6] == "| 1 | a\\|b | +3.00 | 2 | 100.00 | +1.50 | N/A | N/A | 0.00 |"
    assert lines[8] == "|  | bad | failed |  |  |  |  |  |  |"
    assert "- bad failed on ETHUSDT: ValueError: no luck" in lines
    assert "## Statistics" in lines
    assert compare(FAILED).to_markdown().endswith("- bad failed on ETHUSDT: ValueError: no luck\n")


def test_saving_takes_a_path_or_its_own_place(tmp_path: Path, contend: Contend) -> None:
    comparison = compare(contend("a", [1]), frame_name="../x", report_path=tmp_path / "walker")
    assert comparison.save_markdown() == tmp_path / "walker" / "%2E.%2Fx total_pnl.md"
    assert comparison.save_html().name == "%2E.%2Fx total_pnl.html"
    assert comparison.save_html(tmp_path / "c.html").read_text(encoding="utf-8") == render_comparison_page(comparison)
    with pytest.raises(UserError, match="is a directory"):
        comparison.save_html(tmp_path)


def content(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_page_draws_each_equity_curve_on_one_grid(contend: Contend) -> None:
    a, b = contend("a", [1, -2, 3]), contend("b", [2] * 20)
    data = content(render_comparison_page(compare(a, b, contend("idle", []), FAILED)))
    curves = data["curves"]
    assert data["names"] == ["b", "a", "idle", "bad"]
    assert [len(line) > 0 for line in curves["lines"]] == [True, True, False, False]
    assert len(curves["lines"][0]) == len(curves["lines"][1])
    for line, contender in zip(curves["lines"], (b, a), strict=False):
        columns = [(t.pnl_pct, t.opened_at_ms, t.closed_at_ms, t.fall_pct) for t in contender.results.trades]
        pnl, opened, closed, fall = zip(*columns, strict=True)
        equity = equity_curve(pnl_pct=pnl, opened_at_ms=opened, closed_at_ms=closed, fall_pct=fall).equity
        assert line[0] == 0
        assert line[-1] == pytest.approx((equity[-1] - 1) * 100, abs=1e-3)
    assert data["bars"] == [[40.0, "+40.00 %"], [2.0, "+2.00 %"]]
    assert len(data["heat"]["rows"]) == 3


def test_many_strategies_make_no_huge_page(contend: Contend) -> None:
    page = render_comparison_page(compare(*(contend(f"s{i}", [1.5] * 30) for i in range(100))))
    assert len(page.encode()) < 1_000_000


def test_hostile_names_stay_data(contend: Contend) -> None:
    page = render_comparison_page(compare(contend(HOSTILE, [1]), frame_name=HOSTILE, exchange_name=HOSTILE))
    assert page.count("<script") == 3
    assert content(page)["names"] == [HOSTILE]


@pytest.mark.browser
@pytest.mark.parametrize("case", ["some", "many"])
def test_a_browser_draws_the_comparison(tmp_path: Path, browse: Draw, contend: Contend, case: str) -> None:
    comparison, rows = {
        "some": (compare(contend(HOSTILE, [1, -2, 3]), contend("b", [2] * 20), contend("idle", []), FAILED), 4),
        "many": (compare(*(contend(f"s{i}", [i - 20.0, 1]) for i in range(40))), 40),
    }[case]
    dom = browse(comparison.save_html(tmp_path / "page.html"))
    body = re.search(r"<body[^>]*>", dom)
    assert body is not None
    assert 'data-ready="1"' in body[0]
    assert "data-error" not in body[0]
    assert dom.count('class="tv-lightweight-charts"') == 1
    ranking = re.search(r'id="ranked".*?<tbody>(.*?)</tbody>', dom, flags=re.DOTALL)
    assert ranking is not None
    assert ranking[1].count("<tr") == rows
