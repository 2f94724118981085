"""`backtest-kit log`, `records` and `store compact` as an operator uses them."""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.commands import run_command
from tests.records.conftest import NOON_MS
from tests.records.happenings import IDENTITY, closed, observe, opened

import backtest_kit as bk
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.retention import DAY_MS, Retention, Rule, compact
from backtest_kit.persist.urls import store_at
from backtest_kit.persist.writing import now_ms

COMMAND = str(Path(sys.executable).with_name("backtest-kit"))
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("CC_")}


def run(*arguments: str, cwd: Path, code: int = 0, **environment: str) -> str:
    done = run_command(*arguments, cwd=cwd, environment=environment)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


async def fill(kit: bk.Kit) -> None:
    ether = bk.Identity("ETHUSDT", "trend", "binance", "", "live")
    await observe(kit, [opened("s-1"), closed("s-1", 5)])
    await observe(kit, [opened("s-2", 7, ether)])
    kit.records.of_run(IDENTITY, None).log(NOON_MS).info("quiet", volume=12.5)
    kit.records.of_run(IDENTITY, None).log(NOON_MS + 60_000).error("loud [red]")
    kit.records.of_run(ether, None).log(NOON_MS).warning("other")
    paper = bk.Identity("BTCUSDT", "trend", "binance", "", "paper")
    kit.records.of_run(paper, None).log(NOON_MS).info("on paper")
    backtest = bk.Identity("BTCUSDT", "trend", "binance", "day", "backtest")
    kit.records.of_run(backtest, "one").log(NOON_MS).info("in a run")
    await kit.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    asyncio.run(fill(bk.Kit(tmp_path / "dump")))
    return tmp_path


def messages(output: str) -> list[str]:
    return [json.loads(line)["message"] for line in output.splitlines()]


def test_the_log_is_filtered(place: Path) -> None:
    assert messages(run("log", cwd=place)) == ["quiet", "loud [red]", "other"]
    assert messages(run("log", "--symbol", "BTCUSDT", "--level", "warning", cwd=place)) == ["loud [red]"]
    assert messages(run("log", "--since", "2024-06-01T12:01", cwd=place)) == ["loud [red]"]
    assert messages(run("log", "-n", "1", cwd=place)) == ["other"]
    assert messages(run("log", "--mode", "paper", cwd=place)) == ["on paper"]
    assert messages(run("log", "--run", "one", cwd=place)) == ["in a run"]
    line = json.loads(run("log", "-n", "3", "--json", cwd=place).splitlines()[0])
    assert line["fields"] == {"volume": 12.5}
    assert (line["symbol"], line["strategyName"], line["mode"], line["whenMs"]) == ("BTCUSDT", "trend", "live", NOON_MS)
    # The rest may be bound elsewhere: the log lies in files.
    assert len(messages(run("log", cwd=place, CC_STORE="sqlite:bot.db"))) == 3
    assert "level is 'loud'" in run("log", "--level", "loud", cwd=place, code=2)
    for command in (("log",), ("records", "ls")):
        refused = run(*command, "--run", "nope", cwd=place, code=2, CC_STORE="sqlite:bot.db")
        assert "no run 'nope' has records in file:./dump: the last runs are one" in refused
    assert run("records", "ls", "state", "--run", "one", "--json", cwd=place) == "", "it has kept something else"
    assert "name its run with --run" in run("log", "--mode", "backtest", cwd=place, code=2)
    assert "does not exist" in run("log", "--store", "file:nowhere", cwd=place, code=2)


async def on_paper_only(kit: bk.Kit) -> None:
    paper = bk.Identity("BTCUSDT", "trend", "binance", "", "paper")
    await observe(kit, [opened("s-1", identity=paper)])
    kit.records.of_run(paper, None).log(NOON_MS).info("on paper")
    await kit.close()


def test_records_of_another_mode_are_pointed_to(tmp_path: Path) -> None:
    asyncio.run(on_paper_only(bk.Kit(tmp_path / "dump")))
    pointed = "Nothing in live mode. There are records with --mode paper.\n"
    assert run("log", cwd=tmp_path) == pointed
    assert run("log", "--symbol", "XYZ", "--mode", "paper", cwd=tmp_path) == ""
    for contract in ("storage", "notification"):
        assert run("records", "ls", contract, "--json", cwd=tmp_path) == pointed
        assert run("records", "ls", contract, "--json", "--mode", "paper", cwd=tmp_path) != ""
    assert pointed in run("records", "ls", cwd=tmp_path)
    assert run("records", "ls", "memory", "--json", cwd=tmp_path) == "", "there are none of these anywhere"


def test_records_of_a_backtest_are_pointed_to(tmp_path: Path) -> None:
    async def fill_run(kit: bk.Kit) -> None:
        backtest = bk.Identity("BTCUSDT", "trend", "binance", "day", "backtest")
        kit.records.of_run(backtest, "one").log(NOON_MS).info("in a run")
        await kit.close()

    asyncio.run(fill_run(bk.Kit(tmp_path / "dump")))
    assert run("log", "--mode", "paper", cwd=tmp_path) == ("Nothing in paper mode. There are records with --run one.\n")


def test_the_log_is_readable_on_a_terminal(place: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    with subprocess.Popen([COMMAND, "log"], cwd=place, env=ENVIRONMENT | {"TERM": "xterm"}, stdout=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # how Linux says that the other side is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    assert b"\x1b[" in shown
    assert b"loud [red]" in shown
    assert b"2024-06-01T12:01Z BTCUSDT trend" in shown


class Following:
    """A `backtest-kit log --follow` and what it has said."""

    def __init__(self, place: Path, *options: str) -> None:
        self._process = subprocess.Popen(
            [COMMAND, "log", "--follow", *options], cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe, selectors.EVENT_READ)
        self._rest = b""
        self.messages: list[str] = []

    def until(self, message: str) -> list[str]:
        deadline = time.monotonic() + 30
        while message not in self.messages:
            assert self._selector.select(max(0, deadline - time.monotonic())), (message, self.messages)
            self._rest += os.read(self._pipe.fileno(), 1 << 16)
            *whole, self._rest = self._rest.split(b"\n")
            self.messages += [str(json.loads(line)["message"]) for line in whole]
        return self.messages

    def end(self) -> None:
        self._process.send_signal(signal.SIGINT)
        assert self._process.wait(20) == 130
        self._pipe.close()


@pytest.fixture
def following(place: Path) -> Iterator[Following]:
    follower = Following(place, "--symbol", "BTCUSDT")
    yield follower
    follower.end()


def test_following_survives_forgetting(place: Path, following: Following) -> None:
    following.until("loud [red]")

    async def say() -> None:
        kit = bk.Kit(place / "dump")
        log = kit.records.of_run(IDENTITY, None).log(NOON_MS)
        store = kit.persistence.store_for(CONTRACTS["log"], "live")
        for turn in range(4):
            for number in range(20):
                log.info(f"{turn}-{number}")
            await kit.records.log.flush()
            if turn % 2:
                await asyncio.to_thread(following.until, f"{turn}-19")
                await compact(store, Retention({"log": Rule(last=turn - 1)}, 1, Rule()), at_ms=now_ms() + DAY_MS)
        log.info("last")
        await kit.close()

    asyncio.run(say())
    expected = [f"{turn}-{number}" for turn in range(4) for number in range(20)]
    assert following.until("last") == ["quiet", "loud [red]", *expected, "last"]


def test_records_are_listed_and_shown(place: Path) -> None:
    summary = run("records", "ls", cwd=place)
    assert "storage" in summary
    assert "signal" not in summary
    listed = run("records", "ls", "storage", cwd=place)
    assert "BTCUSDT trend: closed long from 100 to 110, +9.50 %" in listed
    assert "ETHUSDT" in listed
    narrowed = run("records", "ls", "storage", "--symbol", "ETHUSDT", "--json", cwd=place)
    (found,) = [json.loads(line) for line in narrowed.splitlines()]
    assert found["key"]["signalId"] == "s-2"
    assert run("records", "ls", "storage", "--strategy", "other", "--json", cwd=place) == ""
    since = run("records", "ls", "notification", "--since", "2024-06-01T12:06", "--json", cwd=place)
    assert len(since.splitlines()) == 1
    shown = run("records", "show", "storage", "live/s-1", cwd=place)
    assert "take_profit" in shown
    assert "2024-06-01T12:05Z" in shown
    whole: dict[str, Any] = json.loads(run("records", "show", "storage", "live/s-1", "--json", cwd=place))
    assert (whole["rev"], whole["value"]["trade"]["pnlPct"]) == (1, 9.5)
    assert "in a run" in run("records", "ls", "log", "--run", "one", cwd=place)
    assert "records ls storage" in run("records", "show", "storage", "live/nothing", cwd=place, code=2)
    assert "store ls signal" in run("records", "ls", "signal", cwd=place, code=2)


def test_what_has_no_symbol_is_not_listed_by_one(place: Path) -> None:
    for name in ("state", "memory", "measure", "interval"):
        refused = run("records", "ls", name, "--symbol", "BTCUSDT", cwd=place, code=2)
        assert (
            f"{name} cannot be listed by --symbol: its records are known by {CONTRACTS[name].key_fields[0]}" in refused
        )
        assert f"backtest-kit store ls {name}" in refused
    both = run("records", "ls", "state", "--symbol", "BTCUSDT", "--strategy", "trend", cwd=place, code=2)
    assert "cannot be listed by --symbol and --strategy" in both
    counted, _, left_out = run("records", "ls", "--symbol", "BTCUSDT", cwd=place).partition(
        "not counted, because they cannot be filtered by --symbol"
    )
    assert left_out == ": measure, interval, memory, state\n"
    assert "storage" in counted
    assert "not counted" not in run("records", "ls", "--since", "2024-06-01", cwd=place)


def test_a_limit_of_0_is_nothing_and_one_below_is_refused(place: Path) -> None:
    listed = {("records", "ls", "storage"): "s-2", ("log",): "ETHUSDT", ("store", "ls", "storage"): "s-2"}
    for command, name in listed.items():
        assert name in run(*command, "-n", "1", cwd=place)
        assert name not in run(*command, "-n", "0", cwd=place)
        assert "greater than or equal" in run(*command, "-n", "-1", cwd=place, code=2)
    assert "storage" in run("records", "ls", "-n", "0", cwd=place), "how many there are is no list"


def test_records_in_files_are_found_wherever_the_rest_is_bound(tmp_path: Path) -> None:
    async def keep() -> None:
        kit = bk.Kit(tmp_path / "dump")
        kit.persistence.bind("*", store_at(f"sqlite:{tmp_path}/bot.db"))
        where: Any = {"symbol": "BTCUSDT", "strategy_name": "trend", "exchange_name": "binance"}
        await kit.records.state("plan", **where, mode="backtest", run_id="one").set({"stop": 95})
        kit.records.of_run(IDENTITY, None).log(NOON_MS).info("live")
        if bound:
            await kit.records.state("plan", **where).set({"stop": 99})
        await kit.close()

    for bound in (False, True):
        asyncio.run(keep())
        assert (tmp_path / "bot.db").exists() == bound
        listed = run("records", "ls", "state", "--run", "one", "--json", cwd=tmp_path, CC_STORE="sqlite:bot.db")
        (record,) = map(json.loads, listed.splitlines())
        assert record["value"] == {"stop": 95}
        key = "/".join(record["key"].values())
        assert "95" in run("records", "show", "state", key, "--run", "one", cwd=tmp_path, CC_STORE="sqlite:bot.db")
        assert "live" in run("records", "ls", "log", cwd=tmp_path, CC_STORE="sqlite:bot.db")
    assert "99" in run("records", "show", "state", key, cwd=tmp_path, CC_STORE="sqlite:bot.db")


def test_what_is_too_old_is_shown_and_forgotten(place: Path) -> None:
    settings: Any = {"CC_RETENTION_LOG_COUNT": "1", "COLUMNS": "200"}
    before = run("store", "du", cwd=place, **settings)
    assert "would delete 2 records" in before
    assert "log: 2 records" in run("store", "compact", cwd=place, **settings)
    assert "nothing is too old" in run("store", "compact", cwd=place, **settings)
    assert messages(run("log", cwd=place)) == ["other"]
    assert "CC_RETENTION_LOG_COUNT is -1" in run("store", "compact", cwd=place, code=2, CC_RETENTION_LOG_COUNT="-1")
