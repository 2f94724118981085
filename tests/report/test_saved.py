"""Results as a file: what goes in comes out, and nothing else is taken for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from backtest_kit.errors import BacktestKitError, Damaged, UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.position import Entry, Reduction, Trade
from backtest_kit.report import BacktestResult, Results

START = 1_640_995_200_000
MakeTrade = Callable[..., Trade]
MakeResult = Callable[..., BacktestResult]
Month = Callable[[str, int, int], BacktestResult]


def test_a_file_gives_back_the_same_report(tmp_path: Path, month: Month) -> None:
    results = Results([month("BTCUSDT", 1, 40), month("ETHUSDT", 2, 20)])
    path = results.save(tmp_path / "r.json")
    again = Results.load(path)
    assert again.trades == results.trades
    assert [each.chart == other.chart for each, other in zip(again, results, strict=True)] == [True, True]
    assert again.to_markdown() == results.to_markdown()
    assert again.stats == results.stats
    assert again.save_html().read_text() == results.save_html(tmp_path / "x.html").read_text()
    assert again.save(tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_every_field_survives(tmp_path: Path, make_trade: MakeTrade, make_result: MakeResult) -> None:
    trade = make_trade(
        signal_id="\U0001f40b ü \x00",
        note="@float",
        pnl_pct=math.inf,
        fall_pct=-math.inf,
        price_close=0.1 + 0.2,
        entries=(Entry(1.0, 2.0, START), Entry(3.0, 4.0, START)),
        reductions=(Reduction(50.0, 0.1, 100.0, 1, START),),
    )
    chart = CandleSeries([START], [math.inf], [1e300], [5e-324], [0.1], [0])
    changes = {
        "gaps_filled": {"BTC/USDT": 3},
        "repairs": {"BTC/USDT": {"moved": 2}},
        "candles_used": 4,
        "candles_fetched": 5,
        "show_note": True,
    }
    result = make_result("BTC/USDT", [trade], chart=chart, report_path=tmp_path / "a", **changes)
    path = result.save(tmp_path / "b" / "r.json")
    (again,) = Results.load(str(path))
    for name in BacktestResult.__struct_fields__:
        if name != "report_path":
            assert getattr(again, name) == getattr(result, name), name
    assert again.report_path == tmp_path / "b"  # reports of a file are written beside it


def test_the_file_says_what_it_is(tmp_path: Path, make_trade: MakeTrade, make_result: MakeResult) -> None:
    result = make_result("BTCUSDT", [make_trade()], report_path=tmp_path)
    path = result.save()
    assert path == tmp_path / "trend.json"
    content = json.loads(path.read_text())
    assert (content["format"], content["version"]) == ("backtest-kit results", 1)
    (saved,) = content["results"]
    assert saved["strategyName"] == "trend"
    assert saved["trades"][0]["closeReason"] == "take_profit"
    assert saved["chart"]["timestamp"][0] == START
    assert "reportPath" not in saved


def test_no_results_are_results_too(tmp_path: Path) -> None:
    assert list(Results.load(Results().save(tmp_path / "none.json"))) == []


@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_every_cut_and_every_change_is_noticed_and_the_file_kept(tmp_path: Path, month: Month, place: float) -> None:
    path = month("BTCUSDT", 1, 3).save(tmp_path / "r.json")
    whole = path.read_bytes()
    at = int(len(whole) * place)
    changed = whole[:at] + (b"1" if whole[at : at + 1] != b"1" else b"2") + whole[at + 1 :]
    for bad in (whole[:at], changed):
        path.write_bytes(bad)
        with pytest.raises(Damaged, match=r"r\.json"):
            Results.load(path)
        assert path.read_bytes() == bad


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", UserError, "does not hold results"),
        (b"[1, 2]", UserError, "does not hold results"),
        (b"\xff\xfe", UserError, "does not hold results"),
        (b'{"format":"x","version":1,"crc32":"0","results":[]}', UserError, "holds 'x'"),
        (
            b'{"format":"backtest-kit results","version":2,"crc32":"0","results":{}}',
            Damaged,
            "is of version 2, this program reads 1",
        ),
        (
            b'{"format":"backtest-kit results","version":1,"crc32":"39a68f3c","results":[{}]}',
            Damaged,
            "this version cannot read|does not match",
        ),
    ],
)
def test_what_is_no_result_file_is_refused_by_name(
    tmp_path: Path, content: bytes, error: type[BacktestKitError], words: str
) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(error, match=rf"other\.json.*({words})"):
        Results.load(path)


def test_a_missing_file_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(UserError, match=r"is not a file: give one that Results\.save"):
            Results.load(path)


def test_text_that_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, make_trade: MakeTrade, make_result: MakeResult
) -> None:
    with pytest.raises(UserError):
        make_result("BTCUSDT", [make_trade(note="\ud800")]).save(tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()
