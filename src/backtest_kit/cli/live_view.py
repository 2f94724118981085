"""Live runs on a terminal: a row for each symbol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from backtest_kit.cli.live_words import lost, price, troubles
from backtest_kit.model.interval import to_datetime
from backtest_kit.run.live.exchange_time import DRIFT_MS
from backtest_kit.run.live.status import LiveStatus

_AROUND: Final = 8
"""Lines of the view outside of the table, and one above it for the last event."""
_NOTHING: Final = Text("-", "dim")


def view(head: str, statuses: Sequence[LiveStatus], width: int, height: int) -> RenderableType:
    """The whole view, for a terminal of this size in characters; a narrow one is shown less."""
    room = max(1, height - _AROUND)
    shown = sorted(statuses, key=_boring)[:room] if len(statuses) > room else statuses
    columns = [column for column in _COLUMNS if column.from_width <= width]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, expand=True)
    for column in columns:
        table.add_column(column.heading, no_wrap=True, justify=column.justify)
    table.add_column("State", ratio=1, no_wrap=True, min_width=10, overflow="ellipsis")
    for status in shown:
        table.add_row(*(column.cell(status) for column in columns), _state(status))
    parts: list[RenderableType] = [Text(), _title(head, statuses), table]
    if len(shown) < len(statuses):
        parts.append(Text(f"and {len(statuses) - len(shown)} more, less important", "dim"))
    reasons = dict.fromkeys(each.degraded for each in statuses if each.degraded)
    parts += [_cut(Text(f"DEGRADED, nothing new is opened: {reason}", "bold red")) for reason in reasons]
    waiting = {each.no_entry: each.identity.symbol for each in statuses if each.no_entry}
    for reason, symbol in list(waiting.items())[:1]:  # the others show in their rows and alarms
        parts.append(Text(f"NO ENTRIES for {symbol}: {reason}", "bold red"))
    return Group(*parts)


def _title(head: str, statuses: Sequence[LiveStatus]) -> Text:
    latest_ms = max((each.when_ms for each in statuses), default=0)
    when = f"   {to_datetime(latest_ms):%Y-%m-%d %H:%M} UTC" if latest_ms else "   starting"
    title = Text.assemble((head, "bold"), when)
    drift_ms = next((each.clock_drift_ms for each in statuses if each.clock_drift_ms is not None), None)
    if drift_ms is not None:
        wrong = abs(drift_ms) > DRIFT_MS
        title.append(f"   this clock is {-drift_ms / 1000:+.1f} s off", "bold red" if wrong else "dim")
    holder = next((each.holder for each in statuses if each.holder), "")
    title.append(f"   {holder}", "dim")
    return _cut(title)


def _symbol(status: LiveStatus) -> Text:
    return Text(status.identity.symbol, "bold")


def _price(status: LiveStatus) -> Text:
    return Text(price(status.price or None))


def _held(status: LiveStatus) -> Text:
    if status.position is not None:
        return Text(f"{status.direction} {price(status.price_open)}", "green" if status.direction == "long" else "red")
    if status.entry is not None:
        return Text(f"{status.direction} waits {price(status.price_open)}", "cyan")
    return _NOTHING


def _lease(status: LiveStatus) -> Text:
    return Text("LOST", "bold red") if lost(status) else Text("held", "green") if status.held else _NOTHING


def _next_call(status: LiveStatus) -> Text:
    quiet = status.paused or status.stopping or status.ended or status.degraded or status.no_entry or not status.when_ms
    return _NOTHING if quiet or status.next_decision_ms is None else _minute(status.next_decision_ms)


def _state(status: LiveStatus) -> Text:
    found = troubles(status)
    if found:
        return Text(", ".join(found), "bold red" if status.degraded or status.no_entry or lost(status) else "yellow")
    return Text("ok", "green") if status.when_ms else Text("starting", "yellow")


def _boring(status: LiveStatus) -> int:
    if status.degraded or status.no_entry or lost(status):
        return 0
    return 1 if status.position is not None else 2 if status.entry is not None else 3


def _signed(value: float | None) -> Text:
    return _NOTHING if value is None else Text(f"{value:+.2f}", "green" if value > 0 else "red")


def _distance(value: float | None) -> Text:
    return _NOTHING if value is None else Text(f"{value:.2f}")


def _minute(when_ms: int) -> Text:
    return _NOTHING if when_ms < 0 else Text(f"{to_datetime(when_ms):%H:%M}")


def _cut(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


class _Column(NamedTuple):
    heading: str
    justify: Literal["left", "right"]
    from_width: int
    """The column is shown from this width of the terminal on, in characters."""
    cell: Callable[[LiveStatus], Text]


_COLUMNS: Final = (
    _Column("Symbol", "left", 0, _symbol),
    _Column("Price", "right", 0, _price),
    _Column("Position", "left", 0, _held),
    _Column("PnL %", "right", 0, lambda status: _signed(status.pnl_pct)),
    _Column("PnL", "right", 110, lambda status: _signed(status.pnl_cost)),
    _Column("To TP %", "right", 76, lambda status: _distance(status.to_take_profit_pct)),
    _Column("To SL %", "right", 76, lambda status: _distance(status.to_stop_loss_pct)),
    _Column("Next call", "right", 94, _next_call),
    _Column("Written", "right", 110, lambda status: _minute(status.written_ms)),
    _Column("Lease", "left", 110, _lease),
)
