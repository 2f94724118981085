"""Time as the engine counts it: epoch milliseconds in UTC, cut into aligned intervals."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from backtest_kit.errors import UserError

MINUTE_MS: Final = 60_000
DAY_MS: Final = 86_400_000

INTERVAL_MS: Final[dict[str, int]] = {
    "1m": MINUTE_MS,
    "3m": 3 * MINUTE_MS,
    "5m": 5 * MINUTE_MS,
    "15m": 15 * MINUTE_MS,
    "30m": 30 * MINUTE_MS,
    "1h": 60 * MINUTE_MS,
    "2h": 120 * MINUTE_MS,
    "4h": 240 * MINUTE_MS,
    "6h": 360 * MINUTE_MS,
    "8h": 480 * MINUTE_MS,
    "12h": 720 * MINUTE_MS,
    "1d": DAY_MS,
}
"""Length of every known interval. All of them divide a day, so alignment to the epoch is alignment in UTC."""

CANDLE_INTERVALS: Final = tuple(name for name in INTERVAL_MS if name != "12h")
STRATEGY_INTERVALS: Final = ("1m", "3m", "5m", "15m", "30m", "1h")
FRAME_INTERVALS: Final = tuple(INTERVAL_MS)


def interval_ms(interval: str, allowed: tuple[str, ...] = FRAME_INTERVALS, *, what: str = "interval") -> int:
    """Length of `interval` in milliseconds.

    Raises:
        UserError: it is none of `allowed`; `what` names the field in the message.
    """
    if interval not in allowed:
        raise UserError(f"{what} is {interval!r}: use one of {', '.join(allowed)}")
    return INTERVAL_MS[interval]


def floor_ms(when_ms: int, step_ms: int) -> int:
    """The start of the aligned step that contains `when_ms`."""
    return when_ms - when_ms % step_ms


def to_datetime(when_ms: int) -> datetime:
    """The aware UTC datetime of an epoch in milliseconds."""
    return datetime.fromtimestamp(when_ms / 1000, UTC)


def to_ms(value: datetime | str | int, *, what: str = "date") -> int:
    """Epoch milliseconds of a public date: an aware datetime, an ISO 8601 text, or milliseconds.

    A date without a zone is taken as UTC, the zone of every candle.

    Raises:
        UserError: the value is not a date; `what` names the field.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise UserError(
                f"{what} is {value!r}: write it as ISO 8601, like '2022-01-31' or '2022-01-31T10:00'"
            ) from None
    if not isinstance(value, datetime):
        raise UserError(f"{what} is {value!r}: give a datetime, an ISO text like '2022-01-31T10:00' or epoch ms")
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    return round(value.timestamp() * 1000)


def iso(when_ms: int) -> str:
    """`2022-01-31T10:00Z`: a time in messages and reports (with seconds only if there are any)."""
    moment = to_datetime(when_ms)
    return moment.strftime("%Y-%m-%dT%H:%MZ" if when_ms % MINUTE_MS == 0 else "%Y-%m-%dT%H:%M:%SZ")
