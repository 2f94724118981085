from __future__ import annotations

from collections.abc import Callable

import pytest

from backtest_kit.format import price, signed_percent
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.interval import DAY_MS, MINUTE_MS
from backtest_kit.model.position import Entry, Reduction, Trade
from backtest_kit.report import BacktestResult, Results

START = 1_640_995_200_000
MakeTrade = Callable[..., Trade]
MakeResult = Callable[..., BacktestResult]

GOLDEN_TABLES = """\
# Backtest: trend

binance, jan-2022 (2022-01-01T00:00Z to 2022-01-31T00:00Z)

| Symbol | Trades | Win rate % | Total PnL % | PnL (USD) | Sharpe | Max DD % | Profit factor | Avg min | Frame end |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| BTCUSDT | 2 | 50.00 | +0.85 | +0.20 | N/A | -1.05 | 2.308 | 67.5 | 1 |
| **Total** | **2** | **50.00** | **+0.85** | **+0.20** | **N/A** | **-1.05** | **2.308** | **67.5** | **1** |

1 position was still open at the end of the frame (close reason frame_end): -0.65 %.

1 missing minute of BTCUSDT was filled with flat candles of no volume (0.5 % of all).

"""
GOLDEN_REST = """\
## By close reason

| Close reason | Count | Win rate % | Avg PnL % | Total PnL % | PnL (USD) |
| --- | ---: | ---: | ---: | ---: | ---: |
| take_profit | 1 | 100.00 | +1.50 | +1.50 | +1.50 |
| frame_end | 1 | 0.00 | -0.65 | -0.65 | -1.30 |

## Trades

| Signal ID | Symbol | Position | Open Price | Close Price | Take Profit | Stop Loss | Original TP | Original SL | Original Entry | DCA Entries | Partial Closes | PNL (net) | PNL (USD) | Partial Executed % | Entries (list) | Partial Closes (list) | Close Reason | Duration (min) | Open Time | Close Time | Peak PNL | Max DD PNL |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- | --- | ---: | --- | --- | ---: | ---: |
| s-1 | BTCUSDT | long | 100 | 102 | 102 | 99 | 102 | 99 | 100 | 1 | 0 | +1.50 % | +1.50 | 0.00 |  |  | take_profit | 90.0 | 2022-01-01T01:00Z | 2022-01-01T02:30Z | +1.80 % | -0.40 % |
| s-2 | BTCUSDT | short | 0.5 | 0.05 | 0.005 | 99 | 102 | 99 | 100 | 2 | 1 | -0.65 % | -1.30 | 25.00 | 100.00 @ 0.5; 100.00 @ 0.5 | 50.00 % @ 0.1 | frame_end | 45.0 | 2022-01-01T03:15Z | 2022-01-01T04:00Z | +0.10 % | -1.05 % |
"""  # noqa: E501


def golden_result(make_trade: MakeTrade, make_result: MakeResult) -> BacktestResult:
    second = make_trade(
        signal_id="s-2",
        position="short",
        opened_at_ms=START + 195 * MINUTE_MS,
        closed_at_ms=START + 240 * MINUTE_MS,
        price_open=0.5,
        price_close=0.05,
        price_take_profit=0.005,
        close_reason="frame_end",
        pnl_pct=-0.65,
        pnl_cost=-1.3,
        peak_pct=0.1,
        fall_pct=-1.05,
        entries=(Entry(0.5, 100.0, START), Entry(0.5, 100.0, START)),
        reductions=(Reduction(50.0, 0.1, 100.0, 1, START),),
    )
    return make_result("BTCUSDT", [make_trade(), second], gaps_filled={"BTCUSDT": 1}, candles_used=200)


def test_the_whole_report(make_trade: MakeTrade, make_result: MakeResult) -> None:
    text = golden_result(make_trade, make_result).to_markdown()
    assert text.startswith(GOLDEN_TABLES)
    assert text.endswith(GOLDEN_REST)
    statistics = text[len(GOLDEN_TABLES) : -len(GOLDEN_REST)].splitlines()
    assert statistics[0] == "## Statistics"
    for line in (
        "- **Trades:** 2",
        "- **Win rate:** 50.00 %",
        "- **Average PnL:** +0.42 %",
        "- **Total PnL:** +0.85 %",
        "- **Sharpe ratio:** N/A",
        "- **Profit factor:** 2.308",
        "- **Equity at the end:** 1.008",
        "- **Max drawdown:** -1.05 %",
        "- **Average loss:** -0.65 %",
        "- **Longest win streak:** 1",
        "- **Deepest fall PnL:** -1.05 %",
        "- **Average duration (min):** 67.5",
        "- **Trend:** N/A",
    ):
        assert line in statistics


def test_no_trades_read_as_such(make_result: MakeResult) -> None:
    text = make_result().to_markdown()
    assert "- **Total PnL:** N/A" in text
    assert "still open" not in text
    assert "filled" not in text
    assert Results().to_markdown().startswith("# Backtest\n\nNo results\n")


def test_open_positions_and_gaps_are_counted_apart(make_trade: MakeTrade, make_result: MakeResult) -> None:
    trades = [make_trade(close_reason="frame_end", pnl_pct=pnl) for pnl in (0.5, -0.19)]
    gappy = make_result("BTCUSDT", trades, gaps_filled={"BTCUSDT": 7}, candles_used=70)
    text = Results([gappy, make_result("ETHUSDT")]).to_markdown()
    assert "2 positions were still open at the end of the frame (close reason frame_end): +0.31 %." in text
    assert "7 missing minutes of BTCUSDT were filled with flat candles of no volume (10 % of all)." in text
    assert "of ETHUSDT" not in text
    assert "The drawdown of the total assumes that each trade uses the whole account" in text


def test_repaired_rows_are_told_by_kind(make_result: MakeResult) -> None:
    repairs = {"BTCUSDT": {"moved": 1200, "range": 1}, "ETHUSDT": {"repeated": 2}}
    text = make_result("BTCUSDT", repairs=repairs).to_markdown()
    assert (
        "Rows of BTCUSDT that were repaired: 1,200 moved up to the next whole minute; 1 dropped: high is below low"
    ) in text
    assert "Rows of ETHUSDT, read by BTCUSDT, that were repaired: 2 repeated and counted once" in text


def test_what_else_a_reader_must_know(make_result: MakeResult) -> None:
    chart = CandleSeries([0], [1], [1], [1], [1], [1])
    one = make_result("BTCUSDT", chart=chart, gaps_filled={"ETHUSDT": 1200}, candles_used=2400, stopped=True)
    other = make_result("ETHUSDT", chart=chart)
    text = Results([one, other]).to_markdown()
    assert "1,200 missing minutes of ETHUSDT, read by BTCUSDT, were filled with flat candles" in text
    assert "BTCUSDT was stopped at 2022-01-31T00:00Z" in text
    assert "BTCUSDT and ETHUSDT traded the same candles" in text


def test_no_common_price_of_two_markets(make_trade: MakeTrade, make_result: MakeResult) -> None:
    text = Results([make_result("BTCUSDT", [make_trade()]), make_result("ETHUSDT")]).to_markdown()
    assert "**Trend" not in text  # two markets have no common price


def test_notes_show_only_where_wanted_and_break_no_table(make_trade: MakeTrade, make_result: MakeResult) -> None:
    trade = make_trade(note="a|b\nc\\|d\r\n<script>alert(1)</script>\u2028e")
    assert "Note" not in make_result("BTCUSDT", [trade]).to_markdown()
    text = make_result("BTCUSDT", [trade], show_note=True).to_markdown()
    header, _, row = text.splitlines()[-3:]
    assert header.startswith("| Signal ID | Symbol | Position | Note | Open Price |")
    assert "| a\\|b c\\\\\\|d &lt;script>alert(1)&lt;/script> e |" in row


def test_names_break_no_heading(make_result: MakeResult) -> None:
    text = make_result(strategy_name="x\n# y", symbol="A|B").to_markdown()
    assert text.splitlines()[0] == "# Backtest: x # y"
    assert "| A\\|B |" in text


def test_newest_trades_are_last_and_the_oldest_are_left_out(make_trade: MakeTrade, make_result: MakeResult) -> None:
    trades = [make_trade(signal_id=f"s-{i:03d}", closed_at_ms=START + i * DAY_MS) for i in range(1, 252)]
    lines = make_result("BTCUSDT", trades).to_markdown().splitlines()
    assert "1 earlier trade is not printed; the statistics count all 251." in lines
    assert lines[-1].startswith("| s-251 |")
    assert lines[-250].startswith("| s-002 |")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (68006.85, "68006.85"),
        (12345.6789123, "12345.679"),
        (1.08345, "1.08345"),
        (0.99999, "0.99999"),
        (0.1, "0.1"),
        (2.31268e-10, "0.000000000231268"),
        (1234567890.5, "1234567890"),
        (100.0, "100"),
        (0.0, "0"),
        (-2.5, "-2.5"),
        (float("nan"), "N/A"),
        (float("inf"), "N/A"),
    ],
)
def test_a_price_keeps_its_significant_digits(value: float, text: str) -> None:
    assert price(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1.234, "+1.23 %"), (-1.236, "-1.24 %"), (0.0, "0.00 %"), (-0.001, "0.00 %"), (None, "N/A")]
)
def test_a_gain_has_a_plus_and_nothing_has_no_sign(value: float | None, text: str) -> None:
    assert signed_percent(value) == text
