from __future__ import annotations

import html.parser
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import DAY_MS, MINUTE_MS
from backtest_kit.model.position import Entry, Reduction, Trade
from backtest_kit.report import BacktestResult, Results, equity_curve
from backtest_kit.report.render.html import render_html

START = 1_640_995_200_000
HOSTILE = "</script><script>alert(1)</script><!--<script>{{data}}&\u2028\"'"
MakeTrade = Callable[..., Trade]
MakeResult = Callable[..., BacktestResult]
Month = Callable[[str, int, int], BacktestResult]
Browse = Callable[[Path], str]


class Page(html.parser.HTMLParser):
    """Every tag of a page with its attributes, and the text of every script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.scripts[0])
        return content


def test_three_months_fit_in_two_megabytes_and_load_nothing(month: Month) -> None:
    text = render_html(Results([month("BTCUSDT", 1, 300), month("ETHUSDT", 2, 300), month("SOLUSDT", 3, 300)]))
    assert len(text.encode()) < 2_000_000
    page = Page(text)
    loads = [(tag, name, value) for tag, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert loads == [("a", "href", "https://www.tradingview.com/")]
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "embed", "base")]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert len(page.data["trades"]) == 900
    assert "TradingView" in text


def test_hostile_names_stay_data(make_trade: MakeTrade, make_result: MakeResult) -> None:
    trade = make_trade(symbol=HOSTILE, note=HOSTILE, signal_id=HOSTILE)
    result = make_result(HOSTILE, [trade], strategy_name=HOSTILE, frame_name=HOSTILE, show_note=True)
    page = Page(render_html(Results([result])))
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not any(script.startswith("alert") for script in page.scripts)
    labels = [label for label, _ in page.data["columns"]]
    assert page.data["trades"][0][labels.index("Note")] == HOSTILE
    assert page.data["title"] == f"Backtest: {HOSTILE}"


def test_lone_surrogates_and_numbers_that_are_none_still_make_a_page(
    tmp_path: Path, make_trade: MakeTrade, make_result: MakeResult
) -> None:
    odd = make_trade(symbol="\ud800", pnl_pct=math.nan, price_close=math.inf, peak_pct=math.nan, fall_pct=math.inf)
    chart = CandleSeries(
        [START, START, START + DAY_MS], [1, 1, math.nan], [1, 1, 1e300], [1, 1, 1], [1, 1, 1], [0, 0, 0]
    )
    result = make_result("\ud800", [odd], chart=chart, strategy_name="\ud800", report_path=tmp_path)
    data = Page(result.save_html().read_text(encoding="utf-8")).data
    assert data["markets"][0]["candles"] == [[START // 1000, 1, 1, 1, 1]]
    assert data["markets"][0]["trades"] == []
    assert result.save_markdown().is_file()


def test_the_equity_chart_is_the_equity_curve_on_an_even_grid(month: Month) -> None:
    result = month("BTCUSDT", 1, 300)
    drawn = Page(render_html(Results([result]))).data["equity"]
    curve = equity_curve(
        pnl_pct=[trade.pnl_pct for trade in result.trades],
        opened_at_ms=[trade.opened_at_ms for trade in result.trades],
        closed_at_ms=[trade.closed_at_ms for trade in result.trades],
        fall_pct=[trade.fall_pct for trade in result.trades],
    )
    assert 900 <= len(drawn["equity"]) <= 1001
    assert drawn["equity"][0] == 0
    assert drawn["equity"][-1] == pytest.approx((curve.equity[-1] - 1) * 100, abs=1e-3)
    assert min(drawn["drawdown"]) == pytest.approx(-(result.stats.max_drawdown or 0), abs=1e-3)
    peak = 1.0
    for place, (value, fall) in enumerate(zip(drawn["equity"], drawn["drawdown"], strict=True)):
        moment = (drawn["start"] + place * drawn["step"]) * 1000
        closed = int(np.searchsorted(curve.closed_at_ms, moment, side="right"))
        before = int(np.searchsorted(curve.closed_at_ms, moment - drawn["step"] * 1000, side="right"))
        equity = curve.equity[closed - 1] if closed else 1.0
        peak = max([peak, *curve.equity[before:closed]])
        deepest = max([(peak - equity) / peak * 100, *curve.drawdown_pct[before:closed]])
        assert value == pytest.approx((equity - 1) * 100, abs=1e-3)
        assert fall == pytest.approx(-deepest, abs=1e-3)


def test_marks_sit_on_candles(month: Month) -> None:
    result = month("BTCUSDT", 1, 50)
    market = Page(render_html(Results([result]))).data["markets"][0]
    times = [candle[0] for candle in market["candles"]]
    assert len(times) == 1440
    for mark, trade in zip(market["trades"], result.trades, strict=True):
        assert {mark["from"], mark["to"]} <= set(times)
        assert 0 <= trade.opened_at_ms // 1000 - mark["from"] < 1800
        assert mark["outcome"] == ("gain" if trade.pnl_pct > 0 else "loss")


def many_fills(make_trade: MakeTrade) -> Trade:
    """Three entries, two reductions, and levels that were moved."""

    def at(hours: float) -> int:
        return int(START + hours * 60 * MINUTE_MS)

    return make_trade(
        opened_at_ms=at(10),
        closed_at_ms=at(60),
        entries=(Entry(100.5, 100.0, at(10)), Entry(99.0, 100.0, at(20.5)), Entry(98.0, 50.0, at(30))),
        reductions=(Reduction(25.0, 101.5, 250.0, 3, at(40)), Reduction(50.0, 102.5, 187.5, 3, at(50.9))),
        price_open=99.25,
        price_take_profit=105.0,
        price_stop_loss=99.5,
        original_price_take_profit=107.0,
        original_price_stop_loss=95.0,
    )


@pytest.mark.parametrize(
    ("closes", "decimals"),
    [((68000.0, 68006.85), 2), ((1.08, 1.08345), 5), ((2.3, 2.3456), 4), ((1.2345e-5,), 9), ((2.31e-10,), 12), ((), 2)],
)
def test_the_axis_shows_the_ticks_of_the_market(
    closes: tuple[float, ...], decimals: int, make_result: MakeResult
) -> None:
    times = [START + at * MINUTE_MS for at in range(len(closes))]
    chart = CandleSeries(times, closes, closes, closes, closes, [1.0] * len(closes))
    page = Page(render_html(Results([make_result("BTCUSDT", chart=chart)])))
    assert page.data["markets"][0]["decimals"] == decimals


def test_every_fill_and_level_of_a_position_is_drawn(make_trade: MakeTrade, make_result: MakeResult) -> None:
    trades = [make_trade(), many_fills(make_trade)]
    data = Page(render_html(Results([make_result("ETHUSDT"), make_result(trades=trades)]))).data
    plain, mark = data["markets"][1]["trades"]
    hour = START // 1000 - START // 1000 % 3600

    def bar(hours: int) -> int:
        return hour + hours * 3600

    assert (mark["from"], mark["to"], mark["added"]) == (bar(10), bar(60), [bar(20), bar(30)])
    assert mark["reduced"] == [[bar(40), 101.5], [bar(50), 102.5]]
    assert mark["levels"] == [105.0, 99.5, 107.0, 95.0, 99.25]
    assert mark["text"] == (
        "long 99.25 to 102 in 3 entries, 25.00 % out at 101.5, 50.00 % out at 102.5, +1.50 %, take_profit"
    )
    assert (plain["added"], plain["reduced"]) == ([], [])
    labels = [label for label, _ in data["columns"]]
    row = dict(zip(labels, data["trades"][mark["row"]], strict=True))
    assert row["Entries (list)"] == "100.00 @ 100.5; 100.00 @ 99; 50.00 @ 98"
    assert row["Partial Closes (list)"] == "25.00 % @ 101.5; 50.00 % @ 102.5"
    assert (row["DCA Entries"], row["Partial Closes"], row["Original TP"]) == ("3", "2", "107")
    assert data["heat"]["header"][0] == "Symbol"


@pytest.mark.browser
@pytest.mark.parametrize("case", ["three markets", "hostile", "many fills", "no trades"])
def test_a_browser_draws_the_page(
    tmp_path: Path, browse: Browse, month: Month, make_trade: MakeTrade, make_result: MakeResult, case: str
) -> None:
    hostile = make_result(HOSTILE, [make_trade(symbol=HOSTILE, note=HOSTILE)], strategy_name=HOSTILE, show_note=True)
    results, charts = {
        "three markets": (Results([month("BTCUSDT", 1, 300), month("ETHUSDT", 2, 30), month("SOLUSDT", 3, 3)]), 4),
        "hostile": (Results([hostile]), 2),
        "many fills": (Results([make_result(trades=[many_fills(make_trade)])]), 2),
        "no trades": (Results([make_result(chart=CandleSeries.empty())]), 1),
    }[case]
    page = results.save_html(tmp_path / "page.html")
    dom = browse(page)
    body = re.search(r"<body[^>]*>", dom)
    assert body is not None
    assert 'data-ready="1"' in body[0]
    assert "data-error" not in body[0]
    boxes = dom.count('class="tv-lightweight-charts"')
    assert boxes == charts
    assert dom.count("<canvas") >= 6 * charts
    rows = re.search(r'id="trades".*?<tbody>(.*?)</tbody>', dom, flags=re.DOTALL)
    assert rows is not None
    assert rows[1].count("<tr") == min(250, len(results.trades))


@pytest.mark.browser
def test_a_page_that_breaks_says_so(tmp_path: Path, browse: Browse, make_result: MakeResult) -> None:
    text = render_html(Results([make_result()])).replace('"markets":[', '"markets":[null,')
    page = tmp_path / "page.html"
    page.write_text(text, encoding="utf-8")
    dom = browse(page)
    assert "data-error=" in dom
    assert 'data-ready="1"' not in dom
    injected = text.replace("</body>", "<script>document.title = 'owned'</script></body>")
    page.write_text(injected, encoding="utf-8")
    assert "<title>owned</title>" not in browse(page)
