"""Ctrl-C in the middle of a computation: one line, no traceback of ours, nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

COMMAND = str(Path(sys.executable).with_name("backtest-kit"))
ENDLESS = """
import asyncio, pathlib
import backtest_kit as bk

bk.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
bk.add_frame_schema("week", start_date="2024-06-01", end_date="2024-06-08")

async def get_signal(ctx):
    pathlib.Path("begun-" + ctx.symbol).touch()
    while True:
        await asyncio.sleep(0.01)

bk.add_strategy_schema("endless", get_signal=get_signal)
"""
CALL = 'bk.Backtest.run_sync("BTCUSDT", strategy_name="endless", exchange_name="demo", frame_name="week")'


def interrupt(*command: str, cwd: Path, symbols: tuple[str, ...] = ("BTCUSDT",)) -> tuple[int, str, str]:
    """Run a command until its strategies are called, send SIGINT, and return code, output and errors."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CC_")}
    environment["CC_MAX_SIGNAL_GENERATION_SECONDS"] = "3600"
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not all((cwd / f"begun-{symbol}").exists() for symbol in symbols):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, "the strategy was never called"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, output, errors


@pytest.mark.parametrize("verb", ["backtest", "walk"])
def test_a_command_says_one_line_and_leaves_nothing(verb: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ENDLESS)
    both = ("BTCUSDT", "ETHUSDT")
    code, output, errors = interrupt(
        COMMAND, verb, "mine.py", "--symbol", ",".join(both), cwd=tmp_path, symbols=both
    )  # fmt: skip
    assert (code, output, errors) == (130, "", "Interrupted: nothing was saved.\n")
    assert not list(tmp_path.glob("dump/backtest/*"))


def test_a_script_ends_with_its_own_line_and_no_inner_traceback(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"{ENDLESS}\n{CALL}\n")
    code, _, errors = interrupt(sys.executable, "mine.py", cwd=tmp_path)
    assert code == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert CALL in errors
    assert "CancelledError" not in errors
    assert len(errors.splitlines()) <= 12, errors


def test_a_blocking_call_inside_a_running_loop_is_cancelled(tmp_path: Path) -> None:
    """As in a notebook: the backtest runs on a loop in another thread, which hears of no signal."""
    script = f"""
    import asyncio

    async def main():
        try:
            {CALL}
        except KeyboardInterrupt:
            print("interrupted")

    asyncio.run(main())
    """
    (tmp_path / "mine.py").write_text(ENDLESS + textwrap.dedent(script))
    assert interrupt(sys.executable, "mine.py", cwd=tmp_path) == (0, "interrupted\n", "")


def test_a_command_that_is_only_being_imported_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [COMMAND, "--help"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
