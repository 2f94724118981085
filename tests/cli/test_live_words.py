"""What `backtest-kit live` says and shows, without a run."""

from __future__ import annotations

import io
import json
import re
from math import inf
from typing import Any

import msgspec
import pytest
from rich.console import Console
from tests.records.happenings import closed
from tests.values import make_entry, make_position, make_trade

import backtest_kit as bk
from backtest_kit.cli.live_view import view
from backtest_kit.cli.live_words import SHOWN, awaited, document, standing, words
from backtest_kit.format import severity
from backtest_kit.model.identity import Identity
from backtest_kit.model.interval import to_ms
from backtest_kit.records.notification import notification_of
from backtest_kit.run.live.status import LiveStatus

NOON = to_ms("2024-06-01T12:00")
WHO = Identity("BTCUSDT", "trend", "binance", "", "live")
ENTRY = make_entry(identity=WHO, price=48_000.0, take=51_000.0, stop=47_000.0, at_ms=NOON)
FILLED = make_entry(identity=WHO, price=50_000.0, take=51_000.0, stop=49_000.0, minutes=inf, at_ms=NOON)
POSITION = make_position(FILLED)
TRADE = make_trade(POSITION, closed_at_ms=NOON, price_close=51_000.0, pnl_pct=1.6, peak_pct=2.0, fall_pct=-1.0)
ORDER: dict[str, Any] = {"client_order_id": "s-1-2", "attempt": 1, "reason": "no answer", "next_step": "it waits"}
SIGNAL = bk.Signal.bracket("long", price=50_000.0, take_profit_pct=2, stop_loss_pct=1)

SAID: list[tuple[type[bk.Event], dict[str, Any], str, bool]] = [
    (bk.Recovered, {}, "starts with no position", False),
    (
        bk.Recovered,
        {"position": POSITION, "down_ms": 720_000, "steps": ("asked the venue",)},
        "starts 12 minutes after the last write, with long 100 from 50000, take profit 51000, stop loss 49000, "
        "opened 2024-06-01T12:00Z; asked the venue",
        False,
    ),
    (bk.Recovered, {"entry": ENTRY}, "starts with a resting order, long 100 at 48000, take profit 51000, stop", False),
    (
        bk.EntryScheduled,
        {"price": 1.0, "entry": ENTRY},
        "resting order placed: long 100 at 48000, take profit 51000",
        False,
    ),
    (
        bk.EntryCancelled,
        {"price": 1.0, "entry": ENTRY, "reason": "price_reject"},
        "resting long order at 48000 cancelled: price reject",
        False,
    ),
    (bk.PositionOpened, {"price": 1.0, "position": POSITION}, "opened long 100 from 50000, take profit 51000", False),
    (
        bk.PositionChanged,
        {"price": 1.0, "position": POSITION, "change": "stop_moved"},
        "stop moved: long 100 from 50000, take profit 51000, stop loss 49000",
        False,
    ),
    (bk.PositionClosed, {"price": 1.0, "trade": TRADE}, "closed long at 51000, take profit: +1.60 % (+1.60)", False),
    (bk.BreakevenReached, {"price": 1.0, "position": POSITION}, "breakeven reached", False),
    (
        bk.RiskRejected,
        {"price": 1.0, "signal": SIGNAL, "risk_name": "few", "reason": "too many"},
        "signal rejected by risk profile few: too many",
        False,
    ),
    (bk.OrderFailed, {**ORDER, "kind": "move_stop"}, "order s-1-2 to move stop failed: no answer; it waits", False),
    (
        bk.OrderFailed,
        {**ORDER, "kind": "check", "alarm": True},
        "the exchange did not report the order: no",
        True,
    ),
    (
        bk.OrphanFound,
        {"what": "foreign_position", "quantity": 0.5, "reason": "the exchange holds 0.5", "next_step": "adopt it"},
        "foreign position: the exchange holds 0.5; adopt it",
        True,
    ),
    (
        bk.StoreDegraded,
        {"reason": "disk full", "kept": True},
        "disk full; the emergency file has the missing writes",
        True,
    ),
    (bk.StoreDegraded, {"reason": "disk full", "kept": False}, "disk full; A CRASH NOW LOSES THE MISSING WRITES", True),
    (bk.StoreRecovered, {}, "recovered: the store has all writes", False),
    (
        bk.StrategyFailed,
        {"what": "manage", "error": KeyError("x")},
        "manage raised KeyError: 'x'; the run goes on",
        True,
    ),
    (
        bk.MinutesMissed,
        {"count": 3, "first_ms": NOON, "reason": "no candle"},
        "missed 3 minutes from 2024-06-01T12:00Z: no candle",
        False,
    ),
    (bk.ClockJumped, {"by_ms": -2500}, "the system clock moved by -2.5 s", False),
    (bk.Paused, {"paused": True}, "paused: the strategy is not called", False),
    (bk.Paused, {"paused": False}, "resumed: the strategy is called again", False),
    (bk.RunDone, {"trades": (TRADE,)}, "ended, 1 position closed in this run", False),
    (
        bk.RunDone,
        {"trades": (), "cancelled": True},
        "ended immediately, open positions left as they are, 0 positions closed",
        False,
    ),
    (bk.RunFailed, {"error": bk.Conflict("taken")}, "failed: taken", True),
]


def status_of(**fields: Any) -> LiveStatus:
    given = {"identity": WHO, "when_ms": NOON, "next_ms": NOON + 60_000, "price": 50_100.0, "written_ms": NOON}
    return LiveStatus(**{**given, "holder": "process 7 on here", "held": True, **fields})


HELD: dict[str, Any] = {
    "position": POSITION, "direction": "long", "price_open": 50_000.0, "pnl_pct": 0.2, "pnl_cost": 0.2,
    "to_take_profit_pct": 1.8, "to_stop_loss_pct": 2.2,
}  # fmt: skip
WAITING: dict[str, Any] = {"entry": ENTRY, "direction": "long", "price_open": 48_000.0}


@pytest.mark.parametrize(("kind", "fields", "said", "alarm"), SAID)
def test_an_event_in_words_and_as_json(kind: type[bk.Event], fields: dict[str, Any], said: str, alarm: bool) -> None:
    event = kind(identity=WHO, when_ms=NOON, **fields)
    assert said in words(event)
    assert (severity(event) == "alarm") is alarm
    told = json.loads(msgspec.json.encode(document(event)))
    assert not [name for name in names_in(told) if not CAMEL_CASE.fullmatch(name)]
    assert (told["action"], told["symbol"], told["when"]) == (event.action, "BTCUSDT", "2024-06-01T12:00Z")


def names_in(document: object) -> list[str]:
    """Every field name of a JSON document, whatever it lies in."""
    if isinstance(document, dict):
        return [*document, *(name for value in document.values() for name in names_in(value))]
    return [name for value in document for name in names_in(value)] if isinstance(document, list) else []


CAMEL_CASE = re.compile("[a-z][a-zA-Z0-9]*")


@pytest.mark.parametrize("fields", [HELD, WAITING, {}])
def test_a_status_has_its_fields_spelled_as_an_event_has(fields: dict[str, Any]) -> None:
    told = json.loads(msgspec.json.encode(status_of(**fields)))
    assert {"whenMs", "nextMs"} <= set(told)
    assert not [name for name in names_in(told) if not CAMEL_CASE.fullmatch(name)]


def test_every_kind_that_is_told_is_tried() -> None:
    assert set(SHOWN) == {kind for kind, *_ in SAID} - {bk.RunFailed}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "at 50100, no position"),
        (HELD, "long from 50000, +0.20 %, 1.80 % to its take profit, 2.20 % to its stop loss"),
        (WAITING, "long waits for 48000"),
        ({"degraded": "disk full"}, "DEGRADED"),
        ({"no_entry": "the exchange holds 0.5"}, "NO ENTRIES"),
        ({"held": False}, "LEASE LOST"),
        ({"held": False, "ended": True, "stopping": True}, "no position, ended"),
        ({"pending_order": "s-1"}, "order s-1 pending"),
        ({"paused": True, "missed": 4}, "paused, 4 minutes missed"),
        ({"written_ms": NOON + 60_000}, "the clock is behind the last write, of 2024-06-01T12:01Z"),
    ],
)
def test_how_a_run_stands(fields: dict[str, Any], said: str) -> None:
    assert said in standing(status_of(**fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (HELD, "until its long position closes: at 51000 or 49000"),
        (WAITING, "for the next minute, to cancel its resting entry"),
        ({"pending_order": "s-1"}, "for the outcome of order s-1"),
        ({"when_ms": 0}, "for its start to finish"),
    ],
)
def test_what_a_stop_waits_for(fields: dict[str, Any], said: str) -> None:
    assert awaited(status_of(**fields)) == said


def drawn(statuses: list[LiveStatus], *, width: int = 120, height: int = 30) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(view("live  trend on binance", statuses, width, height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("height", [12, 30, 60])
def test_a_thousand_symbols_fit_and_what_matters_is_shown(height: int) -> None:
    many = [status_of(identity=msgspec.structs.replace(WHO, symbol=f"COIN{n}")) for n in range(1000)]
    many[500] = msgspec.structs.replace(many[500], **HELD)
    many[900] = msgspec.structs.replace(many[900], held=False)
    lines = drawn(many, height=height)
    assert len(lines) < height
    rows = [line.split()[0] for line in lines if "COIN" in line]
    assert rows[:2] == ["COIN900", "COIN500"]
    assert f"and {1000 - len(rows)} more" in "\n".join(lines)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    troubled = status_of(
        **HELD, degraded="the disk is full " * 20, missed=7, pending_order="s-1-2", clock_drift_ms=5000
    )
    lines = drawn([troubled, status_of(**WAITING), status_of(when_ms=0, held=False, holder="")], width=width)
    assert all(len(line) <= width for line in lines)
    assert sum("DEGRADED, nothing new is opened: the disk is full" in line for line in lines) == 1
    assert any(line.split()[:4] == ["BTCUSDT", "50100", "long", "50000"] for line in lines)


def test_why_nothing_is_opened_is_shown_in_full() -> None:
    reason = "the exchange holds long 0.5 of BTCUSDT, and this store knows nothing of it: adopt it or close it by hand"
    lines = drawn([status_of(no_entry=reason, next_decision_ms=NOON), status_of()], width=80)
    assert f"NO ENTRIES for BTCUSDT: {reason}" in " ".join(" ".join(lines).split())
    assert sum("NO ENTRIES" in line for line in lines) == 2


@pytest.mark.parametrize(("drift_ms", "words"), [(None, ""), (-200, "+0.2 s off"), (5000, "-5.0 s off")])
def test_how_far_the_clock_is_off_is_shown(drift_ms: int | None, words: str) -> None:
    title = drawn([status_of(clock_drift_ms=None), status_of(clock_drift_ms=drift_ms)], width=200)[1]
    assert words in title if words else "off" not in title


def test_a_price_is_the_same_wherever_it_is_read() -> None:
    """Six digits would hide the cents of a coin of 68,000 dollars, and an exponent the size of one of a millionth."""
    for price, text in ((68_006.85, "68006.85"), (1.2345e-5, "0.000012345")):
        event = closed("s-1")
        trade = msgspec.structs.replace(event.trade, price_close=price)
        event = msgspec.structs.replace(event, trade=trade)
        notification = notification_of(event)
        assert notification is not None
        assert f" at {text}, " in notification.text
        assert f" at {text}, " in words(event)
