"""What a terminal shows of live runs: a row for each symbol."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from backtest_kit.cli.live_words import lost, price, troubles
from backtest_kit.model.interval import to_datetime
from backtest_kit.run.live import LiveStatus

_WIDE = 100
_AROUND = 7
"""Lines of the view that are no row, and one above it for what happened last."""


def view(head: str, statuses: Sequence[LiveStatus], width: int, height: int) -> RenderableType:
    """The whole view, for a terminal of this size in characters; a narrow one is shown the half of it."""
    room = max(1, height - _AROUND)
    shown = sorted(statuses, key=_boring)[:room] if len(statuses) > room else statuses
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, expand=True)
    table.add_column("Symbol", no_wrap=True)
    table.add_column("Price", no_wrap=True, justify="right")
    table.add_column("Position", no_wrap=True)
    for heading in ("PnL %", "To TP %", "To SL %"):
        table.add_column(heading, no_wrap=True, justify="right")
    wide = width >= _WIDE
    for heading in ("PnL", "Written", "Lease", "Next ask") if wide else ():
        table.add_column(heading, no_wrap=True, justify="right")
    table.add_column("State", ratio=1, no_wrap=True, overflow="ellipsis")
    for status in shown:
        more = _more(status) if wide else ()
        table.add_row(*_row(status), *more, _state(status))
    parts: list[RenderableType] = [_title(head, statuses), table]
    if len(shown) < len(statuses):
        parts.append(Text(f"and {len(statuses) - len(shown)} more, of which there is less to say", "dim"))
    reasons = dict.fromkeys(each.degraded for each in statuses if each.degraded)
    parts += [_cut(Text(f"DEGRADED, nothing new is opened: {reason}", "bold red")) for reason in reasons]
    return Group(*parts)


def _title(head: str, statuses: Sequence[LiveStatus]) -> Text:
    latest_ms = max((each.when_ms for each in statuses), default=0)
    when = f"   {to_datetime(latest_ms):%Y-%m-%d %H:%M} UTC" if latest_ms else "   starting"
    title = Text.assemble((head, "bold"), when)
    holders = dict.fromkeys(each.holder for each in statuses if each.holder)
    title.append("".join(f"   {holder}" for holder in holders), "dim")
    drift_ms = next((each.clock_drift_ms for each in statuses if each.clock_drift_ms), 0)
    if abs(drift_ms) > 1000:
        title.append(f"   this clock is {-drift_ms / 1000:+.1f} s off", "bold red")
    return _cut(title)


def _row(status: LiveStatus) -> Iterable[RenderableType]:
    if status.position is not None:
        held = Text(f"{status.direction} {price(status.price_open)}", "green" if status.direction == "long" else "red")
    elif status.entry is not None:
        held = Text(f"{status.direction} waits for {price(status.price_open)}", "cyan")
    else:
        held = Text("-", "dim")
    return (
        Text(status.identity.symbol, "bold"),
        price(status.price or None),
        held,
        _signed(status.pnl_pct),
        _distance(status.to_take_profit_pct),
        _distance(status.to_stop_loss_pct),
    )


def _more(status: LiveStatus) -> Iterable[RenderableType]:
    lease = Text("LOST", "bold red") if lost(status) else Text("held", "green") if status.held else Text("-", "dim")
    asked = "-" if status.decision_ms is None or not status.when_ms else _minute(status.decision_ms)
    return _signed(status.pnl_cost), _minute(status.written_ms), lease, asked


def _state(status: LiveStatus) -> Text:
    said = troubles(status)
    if said:
        return Text(", ".join(said), "bold red" if status.degraded or lost(status) else "yellow")
    return Text("ok", "green") if status.when_ms else Text("starting", "yellow")


def _boring(status: LiveStatus) -> int:
    if status.degraded or lost(status):
        return 0
    return 1 if status.position is not None else 2 if status.entry is not None else 3


def _signed(value: float | None) -> Text:
    return Text("-", "dim") if value is None else Text(f"{value:+.2f}", "green" if value > 0 else "red")


def _distance(value: float | None) -> Text:
    return Text("-", "dim") if value is None else Text(f"{value:.2f}")


def _minute(when_ms: int) -> str:
    return "-" if when_ms < 0 else f"{to_datetime(when_ms):%H:%M}"


def _cut(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
