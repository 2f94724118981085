"""What a start costs above the libraries it stands on: the package with its engine, and `--help`.

    python benchmarks/startup.py

Every figure is the median of fresh processes, measured in turns so that drift hits both sides alike.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 15
OPTIONAL = ("pyarrow", "pandas", "polars", "ccxt", "rich", "typer", "aiosqlite")
BARE_TYPER = """
import typer
app = typer.Typer()
@app.callback()
def root() -> None: ...
@app.command()
def hello(name: str = typer.Option("you")) -> None: ...
app()
"""


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def compare(name: str, base: list[str], ours: list[str], limit_ms: float) -> None:
    seconds(base), seconds(ours)  # both from a warm disk
    pairs = [(seconds(base), seconds(ours)) for _ in range(RUNS)]
    base_ms, ours_ms = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
    above_ms = statistics.median(ours - base for base, ours in pairs) * 1000
    verdict = "ok" if above_ms <= limit_ms else "ABOVE THE LIMIT"
    figures = f"base {base_ms:.0f} ms, ours {ours_ms:.0f} ms: {above_ms:.0f} ms above (limit {limit_ms:.0f})"
    print(f"{name:20} {figures} {verdict}")


def main() -> None:
    python = sys.executable
    compare(
        "import backtest_kit",
        [python, "-c", "import numpy, msgspec, asyncio"],
        [python, "-c", "import backtest_kit as bk; bk.Backtest"],
        60,
    )
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(BARE_TYPER)
        command = str(Path(python).with_name("backtest-kit"))
        compare("backtest-kit --help", [python, str(bare), "--help"], [command, "--help"], 150)
    loaded = subprocess.run(
        [
            python,
            "-c",
            f"import sys, backtest_kit as bk; bk.Backtest; print([m for m in {OPTIONAL} if m in sys.modules])",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    print(f"loaded by the import beyond the core: {loaded}")


if __name__ == "__main__":
    main()
