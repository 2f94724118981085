"""`backtest-kit backtest` as a person runs it: a process, its output, its exit code, its files."""

from __future__ import annotations

import gzip
import textwrap
from pathlib import Path

import pytest
from tests.commands import run_command as run

DATA = Path(__file__).parents[2].parent / "shared" / "data"

HEAD = """
import backtest_kit as bk

bk.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
bk.add_frame_schema("week", start_date="2024-06-01", end_date="2024-06-08")
"""
STRATEGY = (
    HEAD
    + """
async def get_signal(ctx):
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1, minutes=600)

bk.add_strategy_schema("trend", interval="15m", get_signal=get_signal)
"""
)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(textwrap.dedent(text))
    return path


def refused(*arguments: str | Path, cwd: Path) -> str:
    """What a run with bad input says: code 2, a line or two, no traceback of ours."""
    done = run("backtest", *arguments, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "backtest_kit/" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2, done.stderr
    return done.stderr


def trades_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if " long " in line or " short " in line]


def test_it_prints_a_table_and_writes_both_reports(tmp_path: Path) -> None:
    write(tmp_path, STRATEGY)
    first = run("backtest", "mine.py", "--symbol", "BTCUSDT,ETHUSDT", "-s", "SOLUSDT", "--dump", "out", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    for part in ("BTCUSDT", "ETHUSDT", "SOLUSDT", "Total", "out/backtest/trend.md", "out/backtest/trend.html"):
        assert part in first.stdout
    assert (tmp_path / "out/backtest/trend.md").read_text().startswith("# Backtest: trend")
    page = (tmp_path / "out/backtest/trend.html").read_text()
    assert len(page) < 2_000_000
    assert "SOLUSDT" in page
    assert "Candles: all 30,255 from the source." in first.stdout
    again = run("backtest", "mine.py", "--symbol", "BTCUSDT,ETHUSDT", "-s", "SOLUSDT", "--dump", "out", cwd=tmp_path)
    assert len(trades_of(first.stdout)) == 20
    assert trades_of(again.stdout) == trades_of(first.stdout)
    assert "Candles: all 30,255 from the cache." in again.stdout


def test_help_teaches(tmp_path: Path) -> None:
    top = run("--help", cwd=tmp_path)
    assert "backtest" in top.stdout
    page = run("backtest", "--help", cwd=tmp_path).stdout
    for part in (
        "STRATEGY.py",
        "--symbol",
        "--frame",
        "--candles",
        "--gaps",
        "--dirty",
        "--fill",
        "--dump",
        "Examples",
    ):
        assert part in page
    assert run("--version", cwd=tmp_path).stdout.startswith("backtest-kit 0.")


@pytest.mark.parametrize(
    "path", sorted(DATA.glob("*.csv.gz")) or [DATA / "no-real-candles"], ids=lambda path: path.name[:30]
)
def test_it_works_on_every_file_of_real_candles(path: Path, tmp_path: Path) -> None:
    if not path.exists():
        pytest.skip("no real candles beside the project (../shared/data)")
    with gzip.open(path, "rt") as file:
        times = [int(line.split(",")[0]) for line in file.readlines()[1:]]
    start, stop = times[0] + 5 * 60_000, times[-1]
    missing = (times[-1] - times[0]) // 60_000 + 1 - len(times)
    write(
        tmp_path,
        f"""
        import backtest_kit as bk
        bk.add_frame_schema("all", start_date={start}, end_date={stop})

        def get_signal(ctx):
            return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=2, stop_loss_pct=1)

        bk.add_strategy_schema("long", interval="15m", get_signal=get_signal)
        """,
    )
    arguments = ("backtest", "mine.py", "--symbol", "REAL", "--frame", "all", "--candles", path)
    done = run(*arguments, cwd=tmp_path)
    if missing:
        assert done.returncode == 2
        assert f"{missing:,} minute" in done.stderr
        assert "--gaps fill" in done.stderr
        done = run(*arguments, "--gaps", "fill", cwd=tmp_path)
        assert f"{missing:,} missing minute" in done.stdout
        assert f" from the source, {missing:,} filled." in done.stdout
    assert done.returncode == 0, done.stderr
    assert "REAL" in done.stdout
    assert (tmp_path / "dump/backtest/long.html").exists()


def test_a_parquet_file_and_two_dates_will_do(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    minutes = range(1_717_200_000_000, 1_717_200_000_000 + 3000 * 60_000, 60_000)
    wave = [100 + (n % 700) / 100 for n in range(3000)]
    pq.write_table(
        pa.table({"timestamp": list(minutes), "open": wave, "high": wave, "low": wave, "close": wave, "volume": wave}),
        tmp_path / "XYZ.parquet",
    )
    write(
        tmp_path,
        """
        import backtest_kit as bk

        def get_signal(ctx):
            return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=2, stop_loss_pct=1)

        bk.add_strategy_schema("waves", get_signal=get_signal)
        """,
    )
    done = run(
        "backtest", "mine.py", "-s", "XYZ", "-c", "{symbol}.parquet", "-f", "2024-06-01T00:05..2024-06-02", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "take_profit" in done.stdout


class TestBadInput:
    def test_files(self, tmp_path: Path) -> None:
        write(tmp_path, STRATEGY)
        (tmp_path / "notes.txt").write_text("hello")
        (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
        (tmp_path / "torn.csv.gz").write_bytes(b"\x1f\x8b\x08 not really")
        assert "strategy file nowhere.py does not exist" in refused("nowhere.py", "-s", "B", cwd=tmp_path)
        assert "strategy file notes.txt is not a .py file" in refused("notes.txt", "-s", "B", cwd=tmp_path)
        for file in ("notes.csv", "torn.csv.gz", "missing.csv", "missing.parquet", "notes.txt"):
            assert file in refused("mine.py", "-s", "BTCUSDT", "--candles", file, cwd=tmp_path)

    def test_names(self, tmp_path: Path) -> None:
        write(tmp_path, STRATEGY)
        assert "frame 'june' is not registered: give week, or two dates" in refused(
            "mine.py", "-s", "B", "-f", "june", cwd=tmp_path
        )
        assert "start_date of frame 'a..b' is 'a'" in refused("mine.py", "-s", "B", "-f", "a..b", cwd=tmp_path)
        assert "strategy 'tredn' is not registered" in refused(
            "mine.py", "-s", "B", "--strategy", "tredn", cwd=tmp_path
        )
        assert "exchange 'nowhere' is not registered" in refused(
            "mine.py", "-s", "B", "--exchange", "nowhere", cwd=tmp_path
        )
        assert "gaps is 'ignore'" in refused("mine.py", "-s", "B", "--gaps", "ignore", cwd=tmp_path)
        assert "dirty is 'ignore'" in refused("mine.py", "-s", "B", "--dirty", "ignore", cwd=tmp_path)
        assert "fill is 'best'" in refused("mine.py", "-s", "B", "--fill", "best", cwd=tmp_path)

    def test_what_the_file_does_not_register(self, tmp_path: Path) -> None:
        write(tmp_path, "import backtest_kit")
        assert "registers no strategy: call backtest_kit.add_strategy_schema" in refused(
            "mine.py", "-s", "B", cwd=tmp_path
        )
        write(tmp_path, "import backtest_kit as bk\nbk.add_strategy_schema('a', get_signal=lambda ctx: None)")
        assert "registers no exchange" in refused("mine.py", "-s", "B", cwd=tmp_path)
        write(tmp_path, HEAD + "\nfor name in 'ab': bk.add_strategy_schema(name, get_signal=lambda ctx: None)")
        assert "choose with --strategy a or b" in refused("mine.py", "-s", "B", cwd=tmp_path)

    def test_a_frame_outside_the_data(self, tmp_path: Path) -> None:
        rows = "".join(f"{1_717_200_000_000 + n * 60_000},1,1,1,1,1\n" for n in range(500))
        (tmp_path / "short.csv").write_text("timestamp,open,high,low,close,volume\n" + rows)
        write(tmp_path, STRATEGY)
        message = refused("mine.py", "-s", "BTCUSDT", "--candles", "short.csv", "-f", "week", cwd=tmp_path)
        assert "2024-06-01T00:00Z" in message
        assert "2024-06-01T08:20Z" in message

    @pytest.mark.parametrize(
        ("rows", "problem"),
        [
            ("1717200000000,1,1,1,1,1\n1717200000000,1,1,1,1,1\n", "appears twice"),
            ("1717200060000,1,1,1,1,1\n1717200000000,1,1,1,1,1\n", "oldest first"),
            ("1717200000000,1,1,1,1,1\n1717200060000,-1,1,1,1,1\n", "above 0"),
            ("1717200000000,1,1,1,1,1\n1717200060000,inf,1,1,1,1\n", "finite"),
            ("1717200000000,1,1,1,1,1\n1717200060000,x,1,1,1,1\n", "'x'"),
        ],
    )
    def test_candles_that_cannot_be(self, tmp_path: Path, rows: str, problem: str) -> None:
        (tmp_path / "bad.csv").write_text("timestamp,open,high,low,close,volume\n" + rows)
        write(tmp_path, STRATEGY)
        assert problem in refused("mine.py", "-s", "BTCUSDT", "--candles", "bad.csv", cwd=tmp_path)

    @pytest.mark.parametrize(
        ("answer", "problem"),
        [
            ("42", "returned 42"),
            ("bk.Signal('long', 1, 10**9)", "takes profit above"),
            ("bk.Signal('long', float('nan'), -5)", "price_stop_loss is -5"),
            ("bk.Signal.bracket('up', price=1, take_profit_pct=1, stop_loss_pct=1)", "line 8, in get_signal"),
        ],
    )
    def test_answers_that_make_no_sense(self, tmp_path: Path, answer: str, problem: str) -> None:
        write(
            tmp_path,
            f"{HEAD}\ndef get_signal(ctx):\n    return {answer}\n\nbk.add_strategy_schema('a', get_signal=get_signal)",
        )
        assert problem in refused("mine.py", "-s", "BTCUSDT", cwd=tmp_path)

    def test_a_setting_out_of_range(self, tmp_path: Path) -> None:
        write(tmp_path, STRATEGY + "\nbk.set_config(CC_PERCENT_FEE=-1)")
        assert "CC_PERCENT_FEE is -1: it must be at least 0" in refused("mine.py", "-s", "BTCUSDT", cwd=tmp_path)

    def test_a_dump_that_is_a_file(self, tmp_path: Path) -> None:
        write(tmp_path, STRATEGY)
        (tmp_path / "taken").write_text("")
        done = run("backtest", "mine.py", "-s", "BTCUSDT", "--dump", "taken", cwd=tmp_path)
        assert done.returncode == 2
        assert "taken" in done.stderr
        assert "Traceback" not in done.stderr


class TestErrorsOfTheStrategy:
    def test_at_import(self, tmp_path: Path) -> None:
        write(tmp_path, "import backtest_kit\n\ndef setup():\n    return 1 / 0\n\nsetup()\n")
        done = run("backtest", "mine.py", "-s", "BTCUSDT", cwd=tmp_path)
        assert done.returncode == 2
        assert 'mine.py", line 4, in setup' in done.stderr
        assert "ZeroDivisionError: division by zero" in done.stderr
        assert "backtest_kit/" not in done.stderr

    def test_at_a_decision(self, tmp_path: Path) -> None:
        write(
            tmp_path,
            HEAD
            + "\nasync def get_signal(ctx):\n    return nonsense\n\nbk.add_strategy_schema('a', get_signal=get_signal)",
        )
        done = run("backtest", "mine.py", "-s", "BTCUSDT", cwd=tmp_path)
        assert done.returncode == 2
        assert "line 8, in get_signal" in done.stderr
        assert "NameError: name 'nonsense' is not defined" in done.stderr
        assert "backtest_kit/" not in done.stderr

    def test_a_syntax_error(self, tmp_path: Path) -> None:
        write(tmp_path, "import backtest_kit\ndef broken(:\n")
        done = run("backtest", "mine.py", "-s", "BTCUSDT", cwd=tmp_path)
        assert done.returncode == 2
        assert "mine.py" in done.stderr
        assert "SyntaxError" in done.stderr
        assert "backtest_kit/" not in done.stderr

    def test_what_it_was_raised_from_and_groups_are_shown(self, tmp_path: Path) -> None:
        write(
            tmp_path,
            HEAD
            + """
def lookup():
    try:
        return {}["price"]
    except KeyError as error:
        raise ExceptionGroup("two", [ValueError("inner")]) from error

def get_signal(ctx):
    return lookup()

bk.add_strategy_schema("a", get_signal=get_signal)
""",
        )
        done = run("backtest", "mine.py", "-s", "BTCUSDT", cwd=tmp_path)
        assert done.returncode == 2
        for part in ("KeyError: 'price'", "and then:", "in get_signal", "ValueError: inner"):
            assert part in done.stderr
        assert "backtest_kit/" not in done.stderr

    @pytest.mark.parametrize("statement", ["import sys; sys.exit(5)", "next(iter([]))"])
    def test_what_would_end_the_process(self, tmp_path: Path, statement: str) -> None:
        write(
            tmp_path,
            HEAD + f"\ndef get_signal(ctx):\n    {statement}\n\nbk.add_strategy_schema('a', get_signal=get_signal)",
        )
        done = run("backtest", "mine.py", "-s", "BTCUSDT", cwd=tmp_path)
        assert done.returncode == 2
        assert "line 8, in get_signal" in done.stderr
        assert "backtest_kit/" not in done.stderr
