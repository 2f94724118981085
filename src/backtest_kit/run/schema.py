"""What a user registers: exchanges, frames, strategies and risk profiles, each under a name."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Final, Generic, TypeVar, get_args

import msgspec

from backtest_kit.broker.base import Broker
from backtest_kit.errors import UserError
from backtest_kit.market.clock import Clock
from backtest_kit.market.sources import CandleSource
from backtest_kit.model.interval import FRAME_INTERVALS, MINUTE_MS, STRATEGY_INTERVALS, floor_ms, interval_ms, to_ms
from backtest_kit.model.signal import Signal
from backtest_kit.run.context import Context
from backtest_kit.run.risk_request import RiskValidation

# Numbers outside 1973 .. 9999 are seconds, years or typing errors, not dates of candles.
_FIRST_MS: Final = 10**11
_LAST_MS: Final = 253_402_300_800_000

_CLOCK: Final = ("now_ms", "sleep_until", "start", "stop")

GetSignal = Callable[[Context], Awaitable[Signal | None] | Signal | None]
Manage = Callable[[Context], Awaitable[None] | None]


class ExchangeSchema(msgspec.Struct, frozen=True, kw_only=True):
    """A market to trade on, and the source of its candles."""

    name: str
    source: CandleSource
    broker: Broker | None = None
    clock: Clock | None = None
    note: str = ""


class FrameSchema(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of time to replay: minutes from `start_ms` to `stop_ms`, both included."""

    name: str
    interval: str = "1m"
    start_ms: int
    stop_ms: int
    note: str = ""


class StrategySchema(msgspec.Struct, frozen=True, kw_only=True):
    """A strategy: the function that returns signals, how often it is called, and the risk profiles that must agree."""

    name: str
    interval: str
    get_signal: GetSignal
    manage: Manage | None = None
    risk_names: tuple[str, ...] = ()
    note: str = ""


class RiskSchema(msgspec.Struct, frozen=True, kw_only=True):
    """A risk profile: validations called in order; the first rejection decides."""

    name: str
    validations: tuple[RiskValidation, ...]
    note: str = ""


T = TypeVar("T", ExchangeSchema, FrameSchema, StrategySchema, RiskSchema)


class Schemas(Generic[T]):
    """The schemas of one kind by name."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._by_name: dict[str, T] = {}

    def add(self, schema: T, *, replace: bool) -> None:
        if schema.name in self._by_name and not replace:
            raise UserError(
                f"{self._kind} {schema.name!r} is already registered: choose another name, or pass replace=True"
            )
        self._by_name[schema.name] = schema

    def get(self, name: str) -> T:
        try:
            return self._by_name[name]
        except KeyError:
            known = ", ".join(repr(each) for each in self._by_name) or "none"
            raise UserError(
                f"{self._kind} {name!r} is not registered (registered: {known}): "
                f"call add_{self._kind}_schema({self._kind}_name={name!r}, ...) first"
            ) from None

    def all(self) -> list[T]:
        return list(self._by_name.values())


class Registry:
    """All schemas of one kit."""

    def __init__(self) -> None:
        self.exchanges: Schemas[ExchangeSchema] = Schemas("exchange")
        self.frames: Schemas[FrameSchema] = Schemas("frame")
        self.strategies: Schemas[StrategySchema] = Schemas("strategy")
        self.risks: Schemas[RiskSchema] = Schemas("risk")

    def strategy(self, strategy: str | StrategySchema) -> StrategySchema:
        """The registered strategy of a name, or the given one, which need not be registered."""
        return self.strategies.get(strategy) if isinstance(strategy, str) else strategy

    def risks_of(self, strategy: StrategySchema) -> tuple[RiskSchema, ...]:
        """The risk profiles of a strategy."""
        return tuple(self.risks.get(name) for name in strategy.risk_names)


def exchange_schema(
    exchange_name: str, source: CandleSource, broker: Broker | None, clock: Clock | None, note: str
) -> ExchangeSchema:
    if not isinstance(source, CandleSource):
        raise UserError(
            f"source of exchange {exchange_name!r} is {source!r}: give one of backtest_kit.sources, "
            "such as sources.csv(path), sources.ccxt('binance') or sources.function(get_candles)"
        )
    if not (broker is None or isinstance(broker, Broker)):
        raise UserError(
            f"broker of exchange {exchange_name!r} is {broker!r}: give an object of a subclass of backtest_kit.Broker"
        )
    if not (clock is None or all(callable(getattr(clock, name, None)) for name in _CLOCK)):
        raise UserError(f"clock of exchange {exchange_name!r} is {clock!r}: give an object with {', '.join(_CLOCK)}")
    name = check_name("exchange_name", exchange_name)
    return ExchangeSchema(name=name, source=source, broker=broker, clock=clock, note=note)


def frame_schema(
    frame_name: str, interval: str, start_date: datetime | str | int, end_date: datetime | str | int, note: str
) -> FrameSchema:
    name = check_name("frame_name", frame_name)
    interval_ms(interval, FRAME_INTERVALS, what=f"interval of frame {name!r}")
    start = _minute(f"start_date of frame {name!r}", start_date)
    stop = _minute(f"end_date of frame {name!r}", end_date)
    if start >= stop:
        raise UserError(f"frame {name!r} ends at {end_date} and starts at {start_date}: end_date must be later")
    return FrameSchema(name=name, interval=interval, start_ms=start, stop_ms=stop, note=note)


def _minute(what: str, date: datetime | str | int) -> int:
    when_ms = to_ms(date, what=what)
    if not _FIRST_MS <= when_ms < _LAST_MS:
        raise UserError(f"{what} is {date}: a number is taken as epoch milliseconds, such as 1640995200000 for 2022")
    return floor_ms(when_ms, MINUTE_MS)


def strategy_schema(
    strategy_name: str,
    interval: str,
    get_signal: GetSignal,
    manage: Manage | None,
    risk_name: str | None,
    risk_names: Iterable[str],
    note: str,
) -> StrategySchema:
    name = check_name("strategy_name", strategy_name)
    interval_ms(interval, STRATEGY_INTERVALS, what=f"interval of strategy {name!r}")
    _check_takes_context(f"get_signal of strategy {name!r}", get_signal)
    if manage is not None:
        _check_takes_context(f"manage of strategy {name!r}", manage)
    if isinstance(risk_names, str):
        raise UserError(f"risk_names of strategy {name!r} is the text {risk_names!r}: give a list, or use risk_name")
    risks = (*((risk_name,) if risk_name else ()), *risk_names)
    return StrategySchema(
        name=name,
        interval=interval,
        get_signal=get_signal,
        manage=manage,
        risk_names=tuple(dict.fromkeys(check_name("risk name", risk) for risk in risks)),
        note=note,
    )


def risk_schema(risk_name: str, validations: Iterable[RiskValidation], note: str) -> RiskSchema:
    name = check_name("risk_name", risk_name)
    given: object = validations
    if not isinstance(given, list | tuple) or not all(callable(each) for each in given):
        raise UserError(f"validations of risk {name!r} is {given!r}: give a list of functions of one argument")
    return RiskSchema(name=name, validations=tuple(validations), note=note)


def _check_takes_context(what: str, function: object) -> None:
    if not callable(function):
        raise UserError(f"{what} is {function!r}: give a function of one argument, the context")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise UserError(f"{what} cannot be called with one argument, the context: {error}") from None
    except ValueError:
        return  # a builtin without a signature: only a call can show it


def check_choice(name: str, value: object, kind: object) -> None:
    """Raise `UserError` if an option is not one of the values of a `Literal`."""
    if value not in get_args(kind):
        raise UserError(f"{name} is {value!r}: use one of {', '.join(get_args(kind))}")


def check_name(what: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{what} is {value!r}: give a text that is not empty")
    return value
