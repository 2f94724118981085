"""The CC_* settings: typed, ranged, from the environment or `set_config`, all errors reported together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec

from backtest_kit.errors import UserError


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers and switches that a whole program shares. Percentages are in percent: 0.1 is 0.1 %."""

    CC_AVG_PRICE_CANDLES_COUNT: int = 5
    """Closed minutes in the volume-weighted average that is the current price. At least 1."""
    CC_PERCENT_SLIPPAGE: float = 0.1
    """Slippage of each fill, in percent of the price. At least 0."""
    CC_PERCENT_FEE: float = 0.1
    """Fee of each fill, in percent of its value. At least 0."""
    CC_MIN_TAKEPROFIT_DISTANCE_PERCENT: float = 0.5
    """Nearest take profit, in percent of the entry price; at least 2 x (slippage + fee), so that a take
    profit earns something. 0 switches the rule off."""
    CC_MIN_STOPLOSS_DISTANCE_PERCENT: float = 0.5
    """Nearest stop loss, in percent of the entry price; below the maximum. 0 switches the rule off."""
    CC_MAX_STOPLOSS_DISTANCE_PERCENT: float = 20.0
    """Farthest stop loss, in percent of the entry price. 0 switches the rule off."""
    CC_MAX_SIGNAL_LIFETIME_MINUTES: float = 1440.0
    """Default and longest life of a position, in whole minutes; `inf` allows positions without end."""
    CC_SCHEDULE_AWAIT_MINUTES: int = 120
    """How long a resting entry waits for its price, in minutes. At least 1."""
    CC_MAX_SIGNAL_GENERATION_SECONDS: float = 180.0
    """How long one `get_signal` may take. Above 0."""
    CC_GET_CANDLES_RETRY_COUNT: int = 3
    """Attempts at one request for candles, the first included. At least 1."""
    CC_GET_CANDLES_RETRY_DELAY_MS: int = 5000
    """Pause between two attempts. At least 0."""
    CC_MAX_CANDLES_PER_REQUEST: int = 1000
    """Page size of requests to an exchange. At least 1."""
    CC_GET_CANDLES_PRICE_ANOMALY_THRESHOLD_FACTOR: int = 1000
    """A price below the typical price of its series divided by this is refused. At least 1."""
    CC_GET_CANDLES_MIN_CANDLES_FOR_MEDIAN: int = 5
    """Series at least this long take the median as typical price, shorter ones the mean. At least 1."""
    CC_REPORT_SHOW_SIGNAL_NOTE: bool = False
    """Show the note of each signal as a column of the reports."""
    CC_ENABLE_LONG_SIGNAL: bool = True
    """Allow long positions."""
    CC_ENABLE_SHORT_SIGNAL: bool = True
    """Allow short positions."""
    CC_ENABLE_DCA_EVERYWHERE: bool = False
    """Allow adding to a position at any price, not only at a better one than every entry so far."""
    CC_ENABLE_TRAILING_EVERYWHERE: bool = False
    """Allow moving a stop or a take profit away from the price, not only towards it."""
    CC_BREAKEVEN_THRESHOLD: float = 0.2
    """Profit beyond the round trip of costs at which a stop may go to breakeven, in percent. At least 0."""
    CC_POSITION_ENTRY_COST: float = 100.0
    """Cost of a position whose signal names none, in quote currency. Above 0."""
    CC_ORDER_OPEN_RETRY_ATTEMPTS: int = 5
    """How often an order to open or to rest an entry is sent again before it is given up. At least 0."""
    CC_ORDER_CLOSE_RETRY_ATTEMPTS: int = 5
    """How often an order to close or to cancel is sent again before each further failure is an alarm; it is
    never given up. At least 0."""
    CC_ORDER_CHECK_RETRY_ATTEMPTS: int = 5
    """How many checks of an order in a row may fail before that is an alarm. At least 0."""
    CC_MAX_NOTIFICATION_DELIVERY_SECONDS: float = 15.0
    """How long a sink may take for one notification before that has failed and is tried again. Above 0."""
    CC_RETENTION_LOG_DAYS: float = 30.0
    """How long lines of the log are kept, in days; `inf` keeps them. All days are above 0, all counts 1 or more."""
    CC_RETENTION_LOG_COUNT: float = math.inf
    """How many lines of the log are kept, the newest ones."""
    CC_RETENTION_NOTIFICATION_DAYS: float = 90.0
    """How long notifications are kept, in days."""
    CC_RETENTION_NOTIFICATION_COUNT: float = math.inf
    """How many notifications are kept, the newest ones."""
    CC_RETENTION_STORAGE_DAYS: float = math.inf
    """How long a signal is kept after its last change, in days."""
    CC_RETENTION_STORAGE_COUNT: float = math.inf
    """How many signals are kept, those that changed last."""
    CC_RETENTION_MEASURE_DAYS: float = math.inf
    """How long a cached answer is kept, in days."""
    CC_RETENTION_INTERVAL_DAYS: float = 90.0
    """How long it is remembered that the work of a window was done, in days."""
    CC_RETENTION_STATE_DAYS: float = math.inf
    """How long the state of a signal that is over is kept after its last write, in days."""
    CC_RETENTION_MEMORY_DAYS: float = math.inf
    """How long the notes of a signal that is over are kept, in days."""
    CC_RETENTION_SESSION_DAYS: float = math.inf
    """How long a session is kept after its last write, in days."""
    CC_RETENTION_RECENT_DAYS: float = math.inf
    """How long the last signal of a strategy on a symbol is kept after its last change, in days."""
    CC_RETENTION_HISTORY_DAYS: float = 30.0
    """How long what a record was before is kept after it was replaced, in days, where history is kept at all."""
    CC_RETENTION_REMOVED_DAYS: float = 90.0
    """How many days a removed record is kept."""
    CC_RETENTION_RUN_DAYS: float = 30.0
    """How long the records of a backtest's run are kept after its last write, in days: one day at least."""
    CC_RETENTION_RUN_COUNT: float = 100.0
    """The records of how many runs are kept, those that wrote last."""


_AT_LEAST: Final[dict[str, float]] = {
    "CC_AVG_PRICE_CANDLES_COUNT": 1,
    "CC_PERCENT_SLIPPAGE": 0,
    "CC_PERCENT_FEE": 0,
    "CC_MIN_TAKEPROFIT_DISTANCE_PERCENT": 0,
    "CC_MIN_STOPLOSS_DISTANCE_PERCENT": 0,
    "CC_MAX_STOPLOSS_DISTANCE_PERCENT": 0,
    "CC_MAX_SIGNAL_LIFETIME_MINUTES": 1,
    "CC_BREAKEVEN_THRESHOLD": 0,
    "CC_SCHEDULE_AWAIT_MINUTES": 1,
    "CC_GET_CANDLES_RETRY_COUNT": 1,
    "CC_GET_CANDLES_RETRY_DELAY_MS": 0,
    "CC_MAX_CANDLES_PER_REQUEST": 1,
    "CC_GET_CANDLES_PRICE_ANOMALY_THRESHOLD_FACTOR": 1,
    "CC_GET_CANDLES_MIN_CANDLES_FOR_MEDIAN": 1,
    "CC_ORDER_OPEN_RETRY_ATTEMPTS": 0,
    "CC_ORDER_CLOSE_RETRY_ATTEMPTS": 0,
    "CC_ORDER_CHECK_RETRY_ATTEMPTS": 0,
}
_RETENTION: Final = tuple(
    field.name for field in msgspec.structs.fields(Settings) if field.name.startswith("CC_RETENTION_")
)
_COUNTS: Final = tuple(name for name in _RETENTION if name.endswith("_COUNT"))
_ABOVE_ZERO: Final = (
    "CC_MAX_SIGNAL_GENERATION_SECONDS",
    "CC_POSITION_ENTRY_COST",
    "CC_MAX_NOTIFICATION_DELIVERY_SECONDS",
    *(name for name in _RETENTION if name not in _COUNTS),
)
_BOOLEANS: Final = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


def with_settings(base: Settings, changes: Mapping[str, object]) -> Settings:
    """`base` with `changes` applied, checked as a whole.

    Raises:
        UserError: unknown names, wrong types, values out of range, contradictions; all in one message.
    """
    problems: list[str] = []
    values: dict[str, object] = {}
    known = {field.name: field.type for field in msgspec.structs.fields(Settings)}
    for name, value in changes.items():
        if name not in known:
            problems.append(f"{name} is not a setting; the settings are {', '.join(known)}")
            continue
        try:
            values[name] = _convert(value, known[name])
        except ValueError as error:
            problems.append(f"{name} is {value!r}: {error}")
    settings = msgspec.structs.replace(base, **values)
    problems += _problems(settings)
    if problems:
        raise UserError("; ".join(problems))
    return settings


def from_environment(environ: Mapping[str, str]) -> Settings:
    """The settings with every known CC_* variable of `environ` applied; unknown variables are left alone."""
    known = {field.name for field in msgspec.structs.fields(Settings)}
    return with_settings(Settings(), {name: value for name, value in environ.items() if name in known})


def _convert(value: object, kind: object) -> object:
    if kind is bool:
        if isinstance(value, str) and value.strip().lower() in _BOOLEANS:
            return _BOOLEANS[value.strip().lower()]
        if isinstance(value, bool):
            return value
        raise ValueError("give true or false")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("give a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("give a number") from None
    if math.isnan(number):
        raise ValueError("give a number")
    if kind is int:
        if not number.is_integer():
            raise ValueError("give a whole number")
        return int(number)
    return number


def _problems(settings: Settings) -> list[str]:
    values: dict[str, float] = {name: getattr(settings, name) for name in (*_AT_LEAST, *_ABOVE_ZERO, *_COUNTS)}
    lifetime = "CC_MAX_SIGNAL_LIFETIME_MINUTES"
    problems = [
        f"{name} is {values[name]:g}: it must be at least {least:g}"
        for name, least in _AT_LEAST.items()
        if values[name] < least
    ]
    problems += [f"{name} is {values[name]:g}: it must be above 0" for name in _ABOVE_ZERO if values[name] <= 0]
    problems += [
        f"{name} is {value:g}: it must be finite"
        for name, value in values.items()
        if math.isinf(value) and name not in (lifetime, *_RETENTION)
    ]
    problems += [
        f"{name} is {values[name]:g}: it must be a whole number, 1 or more, or inf"
        for name in _COUNTS
        if values[name] < 1 or not (math.isinf(values[name]) or values[name].is_integer())
    ]
    if not math.isinf(values[lifetime]) and not values[lifetime].is_integer():
        problems.append(f"{lifetime} is {values[lifetime]:g}: it must be whole minutes, or inf")
    round_trip = 2 * (settings.CC_PERCENT_SLIPPAGE + settings.CC_PERCENT_FEE)
    nearest = settings.CC_MIN_TAKEPROFIT_DISTANCE_PERCENT
    if 0 < nearest < round_trip:
        problems.append(
            f"CC_MIN_TAKEPROFIT_DISTANCE_PERCENT is {nearest:g}: it must be 0, "
            f"or at least 2 x (CC_PERCENT_SLIPPAGE + CC_PERCENT_FEE) = {round_trip:g}"
        )
    least, most = settings.CC_MIN_STOPLOSS_DISTANCE_PERCENT, settings.CC_MAX_STOPLOSS_DISTANCE_PERCENT
    if least and most and least >= most:
        problems.append(
            f"CC_MIN_STOPLOSS_DISTANCE_PERCENT is {least:g}: it must be below "
            f"CC_MAX_STOPLOSS_DISTANCE_PERCENT = {most:g}"
        )
    return problems
