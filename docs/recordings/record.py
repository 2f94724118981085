"""Record what a terminal shows while a bot on paper is killed and started again.

    python -m docs.recordings.record

runs the simulated exchange and the bot of examples/paper.py for half a minute, in a real shell on a pty, and writes
paper.svg and paper.txt beside this file. Nothing in them is made up; the times are those of the exchange.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.text import Text
from tests.cli.terminal import Terminal

HERE = Path(__file__).parent
COLUMNS, ROWS = 118, 33
BOT = "backtest-kit paper examples/paper.py --symbol BTCUSDT,ETHUSDT --venue http://127.0.0.1:8899"
COLOURS = {"brown": "yellow", "brightbrown": "bright_yellow"}


def main() -> None:
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as dump:
        venue = ["backtest-kit", "venue", "--start", "2024-06-01T10:00", "--speed", "60"]
        exchange = subprocess.Popen(venue, stdout=subprocess.PIPE, text=True)
        try:
            assert exchange.stdout is not None
            assert "is served at" in exchange.stdout.readline(), "port 8899 is taken"
            shown = record(dump)
        finally:
            exchange.send_signal(signal.SIGINT)
            exchange.communicate()
    picture, text = drawn(shown), shown.text.replace(f" --dump {dump}", "")
    (HERE / "paper.txt").write_text(text + "\n")
    (HERE / "paper.svg").write_text(picture)
    sys.stdout.write(f"{text}\n")


def record(dump: str) -> Terminal:
    """A shell in which the bot was started, killed and started again, as it looks while that one trades."""
    os.environ.update(PS1="$ ", CC_STORE=f"file:{dump}")
    with Terminal(["bash", "--norc", "--noprofile", "-i"], columns=COLUMNS, rows=ROWS) as terminal:
        terminal.see("$")
        terminal.type(f"{BOT}\n")
        terminal.see(lambda text: text.count("opened") >= 2)
        wait_minutes(terminal, 1, 4)
        [pid] = set(re.findall(r"process (\d+) on", terminal.text))
        os.kill(int(pid), signal.SIGKILL)
        terminal.see("Killed")
        terminal.type("# that was kill -9, from another terminal\n")
        terminal.type(f"{BOT}\n")
        terminal.see(lambda text: text.count("starts") >= 4)
        wait_minutes(terminal, 2, 5)
        return terminal


def wait_minutes(terminal: Terminal, views: int, count: int) -> None:
    """Watch until so many views are on the screen, and the clock of the last one has gone on by so much."""

    def clock(text: str) -> int:
        hours, minutes = re.findall(r"(\d\d):(\d\d) UTC", text)[-1]
        return int(hours) * 60 + int(minutes)

    begun = clock(terminal.see(lambda text: text.count(" UTC ") == views))
    terminal.see(lambda text: clock(text) >= begun + count)


def drawn(terminal: Terminal) -> str:
    """The screen as an SVG that needs no font but the reader's own."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115, PTH123
    screen = terminal.screen
    rows = terminal.text.count("\n") + 1
    for y in range(rows):
        line = Text()
        cells = [screen.buffer[y][x] for x in range(COLUMNS)]
        for (fg, bold), run in groupby(cells, lambda cell: (cell.fg, cell.bold)):
            colour = None if fg == "default" else COLOURS.get(fg, fg)
            line.append("".join(cell.data for cell in run), Style(color=colour, bold=bold))
        line.rstrip()
        console.print(line, soft_wrap=True)
    svg = console.export_svg(title="backtest-kit paper: killed and started again")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return re.sub(r"Fira Code", "ui-monospace, Menlo, Consolas", svg)


if __name__ == "__main__":
    main()
