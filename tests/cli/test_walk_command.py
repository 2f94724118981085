"""`backtest-kit walk` and `backtest-kit report` as a person runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.commands import run_command as run

STRATEGIES = """
import backtest_kit as bk

bk.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
bk.add_frame_schema("day", start_date="2024-06-01", end_date="2024-06-02")

def make(side):
    return lambda ctx: bk.Signal.bracket(side, price=ctx.price, take_profit_pct=1, stop_loss_pct=1, minutes=60)

for side in ("long", "short"):
    bk.add_strategy_schema(f"always {side}, one hour", interval="15m", get_signal=make(side))
"""
BROKEN = """
def broken(ctx):
    return {}["nothing"]

bk.add_strategy_schema("broken", get_signal=broken)
"""


def write(folder: Path, text: str) -> None:
    (folder / "mine.py").write_text(text)


def test_it_ranks_all_strategies_of_a_file_and_writes_both_reports(tmp_path: Path) -> None:
    write(tmp_path, STRATEGIES + BROKEN)
    done = run("walk", "mine.py", "-s", "A,B", "--metric", "total_pnl", "--dump", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].rstrip() == "Strategies by Total PnL"
    ranks = [line.split()[0] for line in lines if "always" in line]
    assert ranks == ["1", "2"]
    assert "broken failed on A: KeyError: 'nothing'" in done.stdout
    assert "The best of 2 was chosen on the same candles" in done.stdout
    assert "Report: out/walker/day total_pnl.md" in done.stdout
    assert "Charts: out/walker/day total_pnl.html" in done.stdout
    assert (tmp_path / "out/walker/day total_pnl.md").read_text().startswith("# Strategies by Total PnL")
    assert len((tmp_path / "out/walker/day total_pnl.html").read_text()) < 1_000_000


def test_some_strategies_another_frame_and_a_candle_file(tmp_path: Path) -> None:
    rows = [f"{1_717_200_000_000 + minute * 60_000},1,1.001,0.999,1,1" for minute in range(600)]
    (tmp_path / "candles.csv").write_text("\n".join(["timestamp,open,high,low,close,volume", *rows]))
    write(tmp_path, STRATEGIES.replace('bk.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))', ""))
    arguments = ["walk", "mine.py", "-s", "A", "--candles", "candles.csv", "--strategies", "always long, one hour"]
    done = run(*arguments, "--frame", "2024-06-01T01:00..2024-06-01T09:00", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "always long" in done.stdout
    assert "always short" not in done.stdout
    assert "A, candles.csv, 2024-06-01T01:00..2024-06-01T09:00" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "luck"], "metric is 'luck': use one of total_count"),
        (["--candles", "nowhere.csv"], "nowhere.csv does not exist"),
    ],
)
def test_bad_input_ends_with_a_sentence(tmp_path: Path, arguments: list[str], words: str) -> None:
    write(tmp_path, STRATEGIES)
    done = run("walk", "mine.py", "-s", "A", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_where_all_fail_the_exit_code_says_so(tmp_path: Path) -> None:
    write(tmp_path, STRATEGIES + BROKEN)
    done = run("walk", "mine.py", "-s", "A", "--strategies", "broken", cwd=tmp_path)
    assert done.returncode == 2
    assert "broken failed on A: KeyError: 'nothing'" in done.stdout
    assert "error: every strategy failed" in done.stderr


def test_a_saved_backtest_is_shown_again_without_replaying(tmp_path: Path) -> None:
    write(tmp_path, STRATEGIES)
    name = "always long, one hour"
    first = run("backtest", "mine.py", "-s", "A,B", "--strategy", name, "--dump", "out", cwd=tmp_path)
    assert first.returncode == 0
    saved = tmp_path / "out" / "backtest" / "always long%2C one hour.json"
    assert f"Results: {saved.relative_to(tmp_path)}" in first.stdout
    (tmp_path / "mine.py").unlink()
    again = run("report", saved, "--html", "again.html", "--markdown", "again.md", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    tables = first.stdout[: first.stdout.index("Candles: ")]
    assert again.stdout.startswith(tables)
    assert (tmp_path / "again.md").read_text() == saved.with_suffix(".md").read_text()
    assert (tmp_path / "again.html").read_text() == saved.with_suffix(".html").read_text()
    short = run("report", saved, "--trades", "0", cwd=tmp_path)
    assert tables.endswith(short.stdout)
    assert len(short.stdout) < len(tables)
    saved.write_bytes(saved.read_bytes()[:-100])
    damaged = run("report", saved, cwd=tmp_path)
    assert damaged.returncode == 1
    assert "is truncated or changed" in damaged.stderr
    assert run("report", "nowhere.json", cwd=tmp_path).returncode == 2
