"""`Identity`: which run something belongs to."""

from __future__ import annotations

from typing import Literal

import msgspec

from backtest_kit.model.inner import Inner

Mode = Literal["backtest", "paper", "live"]


class Identity(msgspec.Struct, frozen=True, rename="camel"):
    """Which run something belongs to: one engine, holding at most one position or resting entry."""

    symbol: str
    strategy_name: str
    exchange_name: str
    frame_name: str
    mode: Mode


class OfRun(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of what has an `identity`, read as its own."""

    symbol = Inner[str]("identity.symbol")
    strategy_name = Inner[str]("identity.strategy_name")
    exchange_name = Inner[str]("identity.exchange_name")
    frame_name = Inner[str]("identity.frame_name")
