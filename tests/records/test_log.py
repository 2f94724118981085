"""The log: structured, in order, never in the way, bounded, and written once."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.records.conftest import NOON_MS, kit_on, run_of

import backtest_kit as bk
from backtest_kit.errors import RetryLater, UserError
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.store import Record, Write
from backtest_kit.records import log as log_module


async def test_a_line_has_its_context_and_its_fields(kit: bk.Kit) -> None:
    log = run_of(kit).log(NOON_MS)
    log.info("volume is thin", volume=12.5, far=float("inf"), levels=[1, 2])
    log.error("broken")
    last, first = await kit.records.log.list()
    assert (first.level, first.message, first.symbol, first.strategy_name, first.mode) == (
        "info",
        "volume is thin",
        "BTCUSDT",
        "trend",
        "live",
    )
    assert first.fields == {"volume": 12.5, "far": float("inf"), "levels": [1, 2]}
    assert first.when_ms == NOON_MS
    assert last.level == "error"
    assert [line.message for line in await kit.records.log.list(level="warning")] == ["broken"]
    assert await kit.records.log.list(symbol="ETHUSDT") == []
    assert await kit.records.log.list(mode="paper") == []
    with pytest.raises(UserError, match="level is 'loud'"):
        await kit.records.log.list(level="loud")  # type: ignore[arg-type]


async def test_what_cannot_be_stored_is_told_as_text(kit: bk.Kit) -> None:
    run_of(kit).log(NOON_MS).warning("odd \ud800", what=object(), count=1)
    (line,) = await kit.records.log.list()
    assert line.message == "odd \\ud800"
    assert line.fields["what"].startswith("<object object")


class Mute:
    def __repr__(self) -> str:
        raise RuntimeError("not a word")


async def test_whatever_is_said_ends_no_strategy_and_leaves_the_log_readable(kit: bk.Kit) -> None:
    log = run_of(kit).log(NOON_MS)
    log.info("before")
    log.info({"answer": "long"})
    log.info(None)
    log.error(ValueError("no price"))
    log.info("named so", message="hello", level="high", self=1, when=2)
    log.info("mute", what=Mute(), **{"odd \ud800": 1})
    log.warning(Mute())
    lines = [(line.message, line.fields) for line in reversed(await kit.records.log.list())]
    assert [message for message, _ in lines] == [
        "before",
        "{'answer': 'long'}",
        "None",
        "no price",
        "named so",
        "mute",
        "<Mute that cannot be shown: RuntimeError>",
    ]
    assert lines[4][1] == {"message": "hello", "level": "high", "self": 1, "when": 2}
    assert lines[5][1] == {"what": "<Mute that cannot be shown: RuntimeError>", "odd \\ud800": "1"}


async def test_a_message_that_does_not_fit_its_arguments_ends_nobody(
    kit: bk.Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("tests.bridged"), "propagate", False)  # to handlers that do not take it
    kit.records.log.bridge("tests.bridged")
    logging.getLogger("tests.bridged").warning("%(price)s is low", {"volume": 1})
    logging.getLogger("tests.bridged").warning("%s", Mute())
    messages = [line.message for line in reversed(await kit.records.log.list())]
    assert messages == ["%(price)s is low {'volume': 1}", "%s <tuple that cannot be shown: RuntimeError>"]


async def test_lines_come_in_the_order_in_which_they_were_said(kit: bk.Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_GROUP", 70)  # several goes, of lines that a test server can take in a second
    log = run_of(kit).log(NOON_MS)
    for number in range(200):
        log.info(str(number))
    await kit.records.log.flush()
    found = await kit.records.log.list()
    assert [line.message for line in reversed(found)] == [str(number) for number in range(200)]


async def test_a_line_is_written_without_anybody_waiting_for_it(kit: bk.Kit) -> None:
    run_of(kit).log(NOON_MS).info("soon")
    async with asyncio.timeout(10):
        while not [each async for each in kit.persistence.log.list()]:
            await asyncio.sleep(0.001)


async def test_runs_of_a_backtest_have_logs_of_their_own(kit: bk.Kit, backtest: Callable[..., Any]) -> None:
    def say(ctx: bk.Context) -> None:
        ctx.log.info("asked", price=ctx.price)

    one, two = await asyncio.gather(backtest(say, run_id="one"), backtest(say, run_id="two", symbol="ETHUSDT"))
    for result in (one, two):
        lines = await kit.records.log.list(mode="backtest", run_id=result.run_id)
        assert {line.symbol for line in lines} == {result.symbol}
        assert len(lines) == 24 * 4
        whens = [line.when_ms for line in reversed(lines)]
        assert whens == sorted(whens, key=lambda when: when or 0)


async def test_the_standard_library_is_told_what_strategies_say(
    kit: bk.Kit, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    log = run_of(kit).log(NOON_MS)
    kit.records.log.bridge()  # what comes from the log is not taken in again
    caplog.set_level(logging.INFO)
    log.debug("too low")
    log.info("volume is thin", volume=12.5, far=Mute())
    log.error("100 % broken")
    thin, broken = caplog.records
    assert (thin.name, thin.levelno, thin.getMessage()) == (
        "backtest_kit.strategy",
        logging.INFO,
        "BTCUSDT trend: volume is thin volume=12.5 far=<Mute that cannot be shown: RuntimeError>",
    )
    assert (broken.getMessage(), broken.pathname) == ("BTCUSDT trend: 100 % broken", __file__)
    (line, *_) = await kit.records.log.list(level="error")
    assert vars(broken)["line"] == line
    assert [each.message for each in await kit.records.log.list()] == ["100 % broken", "volume is thin", "too low"]
    assert capfd.readouterr() == ("", "")
    kit.records.log.unbridge()


async def test_a_program_that_has_set_up_no_logging_prints_nothing(tmp_path: Path) -> None:
    program = """
import asyncio, backtest_kit as bk
async def get_signal(ctx):
    ctx.log.error("asked")
bk.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
bk.add_frame_schema("frame", start_date="2024-01-01", end_date="2024-01-01T01:00")
bk.add_strategy_schema("trend", interval="15m", get_signal=get_signal)
bk.Backtest.run_sync("BTCUSDT", strategy_name="trend", exchange_name="demo", frame_name="frame")
"""
    done = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await done.communicate()
    assert (done.returncode, out) == (0, b"")
    assert b"asked" not in err


async def test_the_standard_library_can_be_bridged(kit: bk.Kit) -> None:
    logger = logging.getLogger("someone.else")
    kit.records.log.bridge("someone", level="warning")
    with pytest.raises(UserError, match="bridge already"):
        kit.records.log.bridge()
    logger.info("too low")
    logger.warning("%d left", 3)
    thread = threading.Thread(target=logger.error, args=("from a thread",))
    thread.start()
    thread.join()
    try:
        raise ValueError("inside")
    except ValueError:
        logger.exception("caught")
    kit.records.log.unbridge()
    logger.error("not any more")
    lines = (await kit.records.log.list())[::-1]
    assert [line.message for line in lines] == ["3 left", "from a thread", "caught"]
    assert lines[0].logger == "someone.else"
    assert "ValueError: inside" in lines[2].fields["traceback"]


class Failing(MemoryStore):
    """Takes nothing until it is mended."""

    mended = False
    closed = False

    def namespace(self, name: str) -> MemoryStore:
        return self

    async def close(self) -> None:
        self.closed = True

    async def put(self, write: Write) -> Record:
        if not self.mended:
            raise RetryLater("the store is away: try again")
        return await super().put(write)


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[bk.Kit, Failing]:
    monkeypatch.setattr(log_module, "_PAUSE_S", 0.001)
    monkeypatch.setattr(log_module, "_FULL", 100)
    kit, store = bk.Kit(tmp_path), Failing()
    kit.persistence.bind("log", store)
    return kit, store


async def test_a_store_that_is_away_loses_nothing_that_has_room(failing: tuple[bk.Kit, Failing]) -> None:
    kit, store = failing
    for number in range(100):
        run_of(kit).log(NOON_MS).info(str(number))
    with pytest.raises(RetryLater):
        await kit.records.log.flush()
    store.mended = True
    lines = await kit.records.log.list()
    assert [line.message for line in reversed(lines)] == [str(number) for number in range(100)]
    await kit.close()


async def test_a_dead_store_does_not_fill_the_memory(failing: tuple[bk.Kit, Failing]) -> None:
    kit, store = failing
    log = run_of(kit).log(NOON_MS)
    for number in range(1000):
        log.info(str(number))
    await asyncio.sleep(0)
    store.mended = True
    lines = (await kit.records.log.list())[::-1]
    assert lines[0].message.startswith("900 lines of the log were dropped")
    assert [line.message for line in lines[1:]] == [str(number) for number in range(900, 1000)]
    await kit.close()


async def test_a_backtest_that_says_much_waits_for_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_FULL", 2_000)
    kit = kit_on("memory:", tmp_path)
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
    kit.add_frame_schema("day", start_date="2024-06-01", end_date="2024-06-02")

    def say(ctx: bk.Context) -> None:
        for number in range(10):
            ctx.log.info("line", number=number)

    kit.add_strategy_schema("talker", interval="1m", get_signal=say)
    where: Any = {"strategy_name": "talker", "exchange_name": "demo", "frame_name": "day"}
    result = await kit.backtest.background("BTCUSDT", **where)
    lines = await kit.records.log.list(mode="backtest", run_id=result.run_id, limit=None)
    assert len(lines) == 1440 * 10
    await kit.close()


async def test_a_log_that_cannot_be_written_costs_nobody_a_result(failing: tuple[bk.Kit, Failing]) -> None:
    kit, store = failing
    kit.add_exchange_schema("demo", source=bk.sources.synthetic(seed=7))
    kit.add_frame_schema("day", start_date="2024-06-01", end_date="2024-06-02")

    def say(ctx: bk.Context) -> bk.Signal:
        for number in range(10):
            ctx.log.info(str(number))
        return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1)

    kit.add_strategy_schema("talker", interval="1m", get_signal=say)
    where: Any = {"strategy_name": "talker", "exchange_name": "demo", "frame_name": "day"}
    result = await kit.backtest.background("BTCUSDT", **where)
    assert result.trades
    store.mended = True
    lines = await kit.records.log.list(mode="backtest", run_id=result.run_id)
    assert lines[0].message == "9"
    await kit.close()


async def test_a_log_that_cannot_be_written_leaves_no_store_open(failing: tuple[bk.Kit, Failing]) -> None:
    kit, store = failing
    run_of(kit).log(NOON_MS).info("unwritten")
    with pytest.raises(RetryLater):
        await kit.close()
    assert store.closed
