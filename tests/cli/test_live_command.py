"""`backtest-kit live` and `paper` as a person runs them: real processes, against an exchange on a socket."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.terminal import Terminal
from tests.commands import run_command

from backtest_kit.market import sources
from backtest_kit.market.clock import SteppedClock
from backtest_kit.model.interval import MINUTE_MS, to_ms
from backtest_kit.venue.server import VenueServer
from backtest_kit.venue.venue import Venue

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).with_name("backtest-kit"))
START = to_ms("2024-06-01T10:00")
STRATEGY = """
import backtest_kit as bk

async def get_signal(ctx):
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=5, stop_loss_pct=5, minutes=20)

bk.add_strategy_schema("long", interval="15m", get_signal=get_signal)
"""
LIVE = """
from backtest_kit.venue.client import connect

venue = connect("{url}")
bk.add_exchange_schema("sim", source=venue.source(), clock=venue.clock("long"), broker=venue.broker("me"))
"""
WEAK = """
bk.default_kit.persistence.bind("*", bk.MemoryStore())
"""


@pytest.fixture
def tmp_path(disk: Path) -> Path:
    """On the disk: a store in memory is not fit for live."""
    return disk


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("CC_")}


class Stage:
    """A venue whose time goes on only as far as the test lets it, and the bots on it."""

    def __init__(self, folder: Path, server: VenueServer, clock: SteppedClock) -> None:
        self.folder = folder
        self.server = server
        self.clock = clock
        self.bots: list[Bot] = []
        self.write(STRATEGY)

    def write(self, text: str) -> None:
        (self.folder / "mine.py").write_text(textwrap.dedent(text))

    async def go_to(self, minute: int) -> None:
        """Let the time come to so many minutes after the start; whoever trades has acted by then."""
        await asyncio.wait_for(self.clock.sleep_until(START + minute * MINUTE_MS, "test"), 120)
        while any(len(each) < 1 for name, each in self.clock.waiting().items() if name != "test"):
            await asyncio.sleep(0.005)

    def arguments(self, verb: str, *more: str, symbols: str = "BTCUSDT") -> list[str]:
        return [verb, "mine.py", "--symbol", symbols, *(("--venue", self.server.url) if verb == "paper" else ()), *more]

    async def start(self, verb: str, *more: str, symbols: str = "BTCUSDT", output: int = subprocess.PIPE) -> Bot:
        process = await asyncio.create_subprocess_exec(
            COMMAND,
            *self.arguments(verb, *more, symbols=symbols),
            cwd=self.folder,
            env=environment(),
            stdout=output,
            stderr=subprocess.PIPE,
        )
        self.bots.append(Bot(process))
        return self.bots[-1]

    def orders(self) -> list[dict[str, Any]]:
        return [
            {"id": each.client_order_id, "symbol": each.symbol, "quantity": each.quantity}
            for each in self.server.venue.exchanges["futures"].fills
        ]


class Bot:
    """A bot in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def hear(self, text: str, *, times: int = 1) -> str:
        """Read its lines until one of those that come has a text; that one."""
        assert self.process.stdout is not None
        while True:
            line = (await asyncio.wait_for(self.process.stdout.readline(), 120)).decode()
            assert line, f"ended before it said {text!r}: {self.lines}\n{await self._errors()}"
            self.lines.append(line.rstrip("\n"))
            if text in line:
                return self.lines[-1]

    async def end(self) -> tuple[int, str]:
        """Exit code and what it said on standard error."""
        assert self.process.stdout is not None
        rest = await asyncio.wait_for(self.process.stdout.read(), 120)
        self.lines += rest.decode().splitlines()
        errors = await self._errors()
        return await asyncio.wait_for(self.process.wait(), 120), errors

    async def _errors(self) -> str:
        assert self.process.stderr is not None
        return (await asyncio.wait_for(self.process.stderr.read(), 120)).decode()


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    clock = SteppedClock(START)
    clock.join("test")
    server = VenueServer(Venue(sources.synthetic(7), ("BTCUSDT", "ETHUSDT"), clock))
    await server.start()
    made = Stage(tmp_path, server, clock)
    yield made
    for bot in made.bots:
        if bot.process.returncode is None:
            bot.process.kill()
        await bot.process.communicate()
    await server.stop()


async def test_the_example_trades_as_it_says(stage: Stage) -> None:
    example = ROOT / "examples" / "paper.py"
    found = re.search(r"^ *backtest-kit paper examples/paper.py (.+) --venue \S+$", example.read_text(), re.MULTILINE)
    assert found
    stage.write(example.read_text())
    bot = await stage.start("paper", symbols=found[1].removeprefix("--symbol "))
    for _ in range(2):
        await bot.hear("opened")


async def test_one_signal_carries_what_is_open_to_its_end(stage: Stage) -> None:
    bot = await stage.start("paper", symbols="BTCUSDT,ETHUSDT")
    for _ in range(2):
        await bot.hear("opened long 100 from")
    await stage.go_to(5)
    bot.process.send_signal(signal.SIGTERM)
    await bot.hear("a second Ctrl-C or SIGTERM exits immediately")
    said = [line for line in bot.lines if line.startswith("stopping: ")]
    assert [line.split()[1] for line in said] == ["BTCUSDT", "ETHUSDT"]
    assert all("until its long position closes" in line and "2024-06-01T10:20Z" in line for line in said)
    await stage.go_to(60)
    code, errors = await bot.end()
    assert (code, errors) == (0, "")
    text = "\n".join(bot.lines)
    assert bot.lines[0] == f"paper  long on venue: BTCUSDT, ETHUSDT, at {stage.server.url}"
    for symbol in ("BTCUSDT", "ETHUSDT"):
        assert f"2024-06-01 10:00  {symbol}  starts with no position" in text
        assert text.count(f"{symbol}  opened long 100 from") == 1
        assert f"2024-06-01 10:20  {symbol}  closed long at" in text
        assert f"2024-06-01 10:20  {symbol}  ended, 1 position closed in this run" in text
    assert not stage.orders(), "an order on paper has reached the venue"


async def test_a_second_signal_ends_at_once_and_the_next_start_goes_on(stage: Stage) -> None:
    bot = await stage.start("paper")
    await bot.hear("opened long")
    bot.process.send_signal(signal.SIGINT)
    await bot.hear("a second Ctrl-C")
    bot.process.send_signal(signal.SIGINT)
    code, errors = await bot.end()
    assert (code, errors) == (130, "")
    assert "ended immediately, open positions left as they are, 0 positions closed in this run" in bot.lines[-1]
    again = await stage.start("paper")
    line = await again.hear("starts")
    assert "with long 100 from" in line
    assert "opened 2024-06-01T10:00Z" in line


async def test_a_bot_that_was_killed_says_what_it_found_and_trades_nothing_twice(stage: Stage) -> None:
    stage.write(STRATEGY + LIVE.format(url=stage.server.url))
    bot = await stage.start("live")
    await bot.hear("opened long")
    await stage.go_to(7)
    bot.process.kill()
    await bot.process.wait()
    assert len(stage.orders()) == 1
    again = await stage.start("live")
    line = await again.hear("starts")
    assert "with long" in line
    assert "opened 2024-06-01T10:00Z" in line
    await stage.go_to(20)
    await again.hear("closed long")
    assert [each["symbol"] for each in stage.orders()] == ["BTCUSDT", "BTCUSDT"]


async def test_a_second_process_is_told_who_trades_and_does_no_harm(stage: Stage) -> None:
    bot = await stage.start("paper")
    await bot.hear("opened long")
    second = await stage.start("paper", symbols="ETHUSDT,BTCUSDT")
    code, errors = await second.end()
    assert code == 3
    assert f"BTCUSDT on venue by long is traded by process {bot.process.pid} on " in errors
    assert "since 20" in errors
    assert errors.count("\n") == 1
    assert "Traceback" not in "\n".join(second.lines)
    await stage.go_to(21)
    await bot.hear("closed long")


async def test_lines_of_json_tell_every_event_and_every_minute(stage: Stage) -> None:
    bot = await stage.start("paper", "--json")
    await bot.hear('"opened"')
    await stage.go_to(3)
    await bot.hear('"status"')
    bot.process.send_signal(signal.SIGINT)
    await bot.hear("a second Ctrl-C")
    bot.process.send_signal(signal.SIGTERM)
    assert (await bot.end())[0] == 130
    documents = [json.loads(line) for line in bot.lines]
    kinds = {each["action"] for each in documents}
    assert {"note", "recovered", "opened", "active", "status", "done"} <= kinds
    opened = next(each for each in documents if each["action"] == "opened")
    assert opened["symbol"] == opened["position"]["entry"]["identity"]["symbol"] == "BTCUSDT"
    assert opened["when"] == "2024-06-01T10:00Z"


async def test_a_pipe_that_nobody_reads_does_not_stop_the_trading(stage: Stage) -> None:
    unread, full = os.pipe()
    fcntl.fcntl(full, fcntl.F_SETPIPE_SZ, 16 * 1024)
    bot = await stage.start("paper", "--json", output=full)
    while len(stage.clock.waiting()) < 2:
        assert bot.process.returncode is None
        await asyncio.sleep(0.01)
    await stage.go_to(120)
    os.set_blocking(full, False)
    with pytest.raises(BlockingIOError):
        os.write(full, b"x" * 4096)
    [name] = stage.clock.waiting().keys() - {"test"}
    assert stage.clock.waiting()[name] == [START + 121 * MINUTE_MS]
    assert bot.process.returncode is None
    os.close(unread)
    os.close(full)


async def test_an_error_of_the_strategy_is_shown_with_its_line_and_trading_goes_on(stage: Stage) -> None:
    stage.write("import backtest_kit as bk\n\n\ndef get_signal(ctx):\n    return {}['size']\n\n\n"
                "bk.add_strategy_schema('broken', interval='1m', get_signal=get_signal)\n")  # fmt: skip
    bot = await stage.start("paper")
    line = await bot.hear("get_signal raised KeyError: 'size'")
    assert line.startswith("ALARM  2024-06-01 10:00  BTCUSDT")
    assert "mine.py, line 5, in get_signal" in line
    await bot.hear("return {}['size']")
    await stage.go_to(2)
    assert "10:01" in await bot.hear("get_signal raised KeyError: 'size'")


async def test_a_terminal_shows_how_it_stands(stage: Stage) -> None:
    command = [COMMAND, *stage.arguments("paper", symbols="BTCUSDT,ETHUSDT")]

    def watch(terminal: Terminal, told: Callable[[int], None]) -> str:
        first = terminal.see("10:00 UTC")
        told(5)
        second = terminal.see("10:05 UTC")
        terminal.type("\x03")
        terminal.see("a second Ctrl-C")
        terminal.type("\x03")
        assert terminal.end() == 130
        assert "Traceback" not in terminal.raw.decode()
        assert first.count("Symbol") == second.count("Symbol") == 1, second
        return second

    loop = asyncio.get_running_loop()
    with Terminal(command, cwd=str(stage.folder)) as terminal:
        advance = lambda minute: asyncio.run_coroutine_threadsafe(stage.go_to(minute), loop).result(30)  # noqa: E731
        shown = await asyncio.to_thread(watch, terminal, advance)
        last = terminal.text
    head, table = shown.split("\n Symbol")
    assert "BTCUSDT  opened long 100 from" in head
    assert "process" in head
    rows = [line.split() for line in table.splitlines() if line.startswith((" BTCUSDT", " ETHUSDT"))]
    assert [row[0] for row in rows] == ["BTCUSDT", "ETHUSDT"]
    for row in rows:
        assert row[2] == "long"
        float(row[1]), float(row[4])
        assert row[-2:] == ["held", "ok"]
    assert "ended immediately, open positions left as they are" in last
    assert last.count("Symbol") == 1
    assert " ended" in last.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["paper", "nothing.py", "-s", "A"], 2, "strategy file nothing.py does not exist"),
        (["paper", "mine.py", "-s", "A"], 2, "registers no exchange"),
        (["paper", "mine.py", "-s", "A", "--venue", "localhost"], 2, "give the address that the venue prints"),
        (["paper", "mine.py", "-s", "A", "--venue", "http://127.0.0.1:9"], 1, "no venue answers at http://127.0.0.1:9"),
        (["paper", "mine.py", "-s", "A,", "--venue", "{url}"], 2, "symbol is ''"),
        (["paper", "mine.py", "-s", "DOGE", "--venue", "{url}"], 2, "DOGE"),
        (["paper", "mine.py", "-s", "A", "--venue", "{url}", "--strategy", "x"], 2, "strategy 'x' is not registered"),
        (["paper", "mine.py", "-s", "A", "--venue", "{url}", "--fill", "x"], 2, "fill is 'x': use one of vwap, ohlc"),
        (["live", "demo.py", "-s", "A"], 2, "exchange 'demo' has no broker"),
        (["live", "demo.py", "-s", "A", "--orphans", "x"], 2, "orphans is 'x': use one of alarm, adopt, protect"),
        (["live", "weak.py", "-s", "BTCUSDT"], 2, "not fit for live trading: promises: MemoryStore does not promise"),
    ],
)  # fmt: skip
async def test_bad_input_ends_with_a_sentence(stage: Stage, arguments: list[str], code: int, said: str) -> None:
    demo = STRATEGY + '\nbk.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))\n'
    (stage.folder / "demo.py").write_text(demo)
    (stage.folder / "weak.py").write_text(STRATEGY + LIVE.format(url=stage.server.url) + WEAK)
    words = [each.format(url=stage.server.url) for each in arguments]
    done = await asyncio.to_thread(run_command, *words, cwd=stage.folder)
    assert said in done.stderr
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")


async def test_a_weak_store_is_trusted_where_that_is_said(stage: Stage) -> None:
    stage.write(
        STRATEGY + LIVE.format(url=stage.server.url) + '\nbk.default_kit.persistence.bind("*", bk.MemoryStore())\n'
    )
    bot = await stage.start("live", "--allow-weak")
    await bot.hear("promises is weak: MemoryStore does not promise")
    await bot.hear("opened long")
