"""The settings, code and candles of a backtest, recorded in its result."""

from __future__ import annotations

import hashlib
import inspect
import platform
import zlib
from collections.abc import Callable
from types import CodeType
from typing import Final

import msgspec
import numpy as np

from backtest_kit import __version__
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.model.setup import Setup
from backtest_kit.run.replay.replay import Job
from backtest_kit.run.schema import StrategySchema
from backtest_kit.settings import Settings

_DIGITS: Final = 16
_COSTS: Final = ("CC_PERCENT_FEE", "CC_PERCENT_SLIPPAGE")


def setup_of(job: Job, candles: CandleSeries) -> Setup:
    """The setup of a backtest over `candles`, those before its frame included."""
    settings = job.settings
    return Setup(
        fill=job.rules.fill,
        gaps=job.gaps,
        dirty=job.dirty,
        fee_pct=settings.CC_PERCENT_FEE,
        slippage_pct=settings.CC_PERCENT_SLIPPAGE,
        settings=_changed(settings),
        versions={"backtest-kit": __version__, "python": platform.python_version(), "numpy": np.__version__},
        strategy_digest=_strategy_digest(job.strategy),
        candles_digest=_candles_digest(candles),
    )


def _changed(settings: Settings) -> dict[str, float | int | bool | str]:
    defaults = msgspec.structs.asdict(Settings())
    now = msgspec.structs.asdict(settings)
    return {name: value for name, value in now.items() if value != defaults[name] and name not in _COSTS}


def _strategy_digest(strategy: StrategySchema) -> str:
    digest = hashlib.sha256()
    for function in (strategy.get_signal, strategy.manage):
        digest.update(b"" if function is None else _text_of(function).encode())
    return digest.hexdigest()[:_DIGITS]


def _text_of(function: Callable[..., object]) -> str:
    """The source of a function, or of the class of a callable object; without source, its code."""
    made = function if inspect.isroutine(function) else type(function)
    try:
        return inspect.getsource(made)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return _code_text(code) if isinstance(code, CodeType) else repr(made)


def _code_text(code: CodeType) -> str:
    constants = [_code_text(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _candles_digest(candles: CandleSeries) -> str:
    # Checksums distinguish candles as well as a digest of all bytes, in a third of the time.
    columns = [getattr(candles, name) for name in COLUMNS]
    sums = [zlib.crc32(np.ascontiguousarray(column, column.dtype.newbyteorder("<")).data) for column in columns]
    return hashlib.sha256(f"{len(candles)} {sums}".encode()).hexdigest()[:_DIGITS]
