"""The ccxt library: imported here and nowhere else, on first use. Candles and orders both come through it."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable
from typing import Any

from backtest_kit.errors import UserError


def library() -> Any:
    """`ccxt.async_support`.

    Raises:
        UserError: ccxt is not installed.
    """
    try:
        return importlib.import_module("ccxt.async_support")
    except ImportError:
        raise UserError("an exchange needs ccxt: pip install 'backtest-kit[ccxt]'") from None


def open_client(exchange_id: str, options: dict[str, Any]) -> Any:
    """An asynchronous client of the running loop; the caller closes it.

    Raises:
        UserError: ccxt has no such exchange, or is not installed.
    """
    exchanges = library()
    if exchange_id not in exchanges.exchanges:
        near = difflib.get_close_matches(exchange_id, exchanges.exchanges, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `ccxt.exchanges`"
        raise UserError(f"ccxt knows no exchange {exchange_id!r}: {hint}")
    return getattr(exchanges, exchange_id)({"enableRateLimit": True, **options})


def find_market(client: Any, exchange_id: str, symbol: str) -> dict[str, Any]:
    """The market that `symbol` names, as ccxt writes it (`BTC/USDT`) or as the exchange does (`BTCUSDT`).

    `client` has its markets loaded. Where one id names several markets, as BTCUSDT is a spot pair and a
    perpetual of Binance, the client's `defaultType` decides.

    Raises:
        UserError: there is none.
    """
    markets: dict[str, Any] = client.markets
    if symbol in markets:
        return dict(markets[symbol], symbol=symbol)
    same_id: list[dict[str, Any]] = (client.markets_by_id or {}).get(symbol, [])
    if same_id:
        kind = (client.options or {}).get("defaultType", "spot")
        return next((each for each in same_id if each.get("type") == kind), same_id[0])
    known = {*markets, *(client.markets_by_id or {})}
    near = difflib.get_close_matches(symbol.upper(), sorted(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {len(markets):,} others"
    raise UserError(f"{exchange_id} has no market {symbol!r}: {hint}")


def redacted(error: Exception, secrets: Iterable[str] = ()) -> str:
    """The kind and text of an error, without `secrets`, and without query strings: those of signed requests are
    private."""
    text = re.sub(r"\?\S+", "?...", str(error))
    for secret in secrets:
        text = text.replace(secret, "...")
    return f"{type(error).__name__}: {text:.300}"
