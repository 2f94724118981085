"""How exchanges differ: ccxt's own description (`features`), and a table for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

from backtest_kit.errors import UserError

MarketKind = Literal["spot", "futures"]
LISTED_DAYS: Final = 30
"""How far back lists of orders are searched for a client id that the exchange cannot look up."""
_NONE: Final[Mapping[Any, Any]] = MappingProxyType({})
_SHORT: Final = "client order ids of at most 28 characters, and an id here has 32"
_NUMBERS: Final = "numbers only as client order ids, and an id here is 32 hex digits"
_METHOD_OF: Final = {"fetchCanceledOrders": "fetchClosedOrders"}
"""Methods that ccxt does not describe, and the method that they resemble."""


class _Known(msgspec.Struct, frozen=True, kw_only=True):
    """One exchange whose rule of client order ids is known."""

    refuses: Mapping[MarketKind, str] = _NONE
    """The ids it takes instead of ours, by market; other markets take ours."""
    certain: bool = False
    """Its `fetch_order` looks up by client id, and "no such order" is true."""
    lists_only: bool = False
    """Its `fetch_order` cannot look up by a client id of ours."""
    lookup: Mapping[str, Any] = _NONE
    """Further parameters of a look-up."""
    trigger: Mapping[str, Any] = MappingProxyType({"trigger": True})
    """Parameters that ask for conditional orders."""
    stop_id: str = ""
    """The name of the client id of conditional orders, if it differs from other orders."""
    window_days: Mapping[MarketKind, float] = _NONE
    """The longest window of a list of orders, if it differs from ccxt's."""
    market_stops: bool = True
    """Whether a stop may become a market order."""


# By the name of ccxt's class or of one that it is made from: okxus is an okx, binanceusdm a binance.
_TABLE: Final[dict[str, _Known]] = {
    "binance": _Known(certain=True, window_days={"spot": 1}),
    "bitfinex": _Known(refuses={"spot": _NUMBERS, "futures": _NUMBERS}),
    "bitget": _Known(),
    "bybit": _Known(lookup={"acknowledged": True}),
    "coinbase": _Known(market_stops=False),
    "gate": _Known(refuses={"spot": _SHORT, "futures": _SHORT}),
    "htx": _Known(refuses={"futures": _NUMBERS}),
    "hyperliquid": _Known(refuses={"futures": "client order ids that begin with 0x", "spot": "ids that begin with 0x"}),
    "kraken": _Known(lists_only=True),
    "krakenfutures": _Known(),
    "kucoin": _Known(),
    "mexc": _Known(),
    "okx": _Known(trigger={"trigger": True, "ordType": "conditional"}, stop_id="algoClOrdId"),
}
_UNKNOWN: Final = _Known()


class VenueRules:
    """The rules of one exchange, for one kind of market."""

    def __init__(self, client: Any, kind: MarketKind) -> None:
        """`client` is one of ccxt's."""
        self._id, self._kind = str(client.id), kind
        names = [each.__name__ for each in type(client).__mro__]
        self._known = next((_TABLE[name] for name in names if name in _TABLE), None)
        self._row = self._known or _UNKNOWN
        features = client.features or {}
        self._features: Any = features.get("spot") if kind == "spot" else (features.get("swap") or {}).get("linear")

    @property
    def certain(self) -> bool:
        """Whether a look-up by client id that finds nothing is reliable."""
        return self._row.certain

    @property
    def lookup(self) -> dict[str, Any] | None:
        """Parameters of a look-up by client id; None if the exchange has none: its lists are searched."""
        return None if self._row.lists_only else dict(self._row.lookup)

    def check(self) -> list[str]:
        """Notes about what is unknown of the exchange.

        Raises:
            UserError: it is known not to take our client order ids, or no protective stop can be placed there.
        """
        taken = self._row.refuses.get(self._kind)
        if taken:
            raise UserError(f"{self._id} cannot be traded here: it takes {taken}")
        if self._feature("createOrder", "stopLossPrice") is False:
            raise UserError(
                f"{self._id} cannot be traded here: ccxt places no stop loss on its {self._kind} markets, and no "
                "position is held without one"
            )
        if self._known is None:
            return [
                f"{self._id}: its rule for client order ids is not known. If the first order is refused because of "
                "its id, this exchange cannot be traded; try with the smallest amount"
            ]
        return []

    def trigger(self, method: str) -> dict[str, Any] | None:
        """Parameters of `method` for conditional orders; None if it returns them with all others."""
        return None if self._feature(method, "trigger") is False else dict(self._row.trigger)

    def stop_id(self, client_id: str) -> dict[str, Any]:
        """Parameters of a conditional order that name it, besides `clientOrderId`."""
        return {self._row.stop_id: client_id} if self._row.stop_id else {}

    def books(self, method: str) -> list[dict[str, Any]]:
        """Parameters of each request that `method` takes to list all orders."""
        trigger = self.trigger(method)
        return [{}] if trigger is None else [{}, trigger]

    def days_back(self, method: str) -> float | None:
        """How many days back `method` may go; None without a limit."""
        name = "daysBackCanceled" if method == "fetchCanceledOrders" else "daysBack"
        days = self._feature(method, name)
        return None if days is None else float(days)

    def window_days(self, method: str) -> float | None:
        """How many days one request of `method` may span; None if it takes no end."""
        own = self._row.window_days.get(self._kind)
        if own is not None:
            return own
        days = self._feature(method, "untilDays")
        return None if days is None else float(days)

    def market_stop(self, raw: Mapping[str, Any]) -> bool:
        """Whether a stop of a market, as ccxt describes it, may become a market order."""
        kinds = (raw.get("info") or {}).get("orderTypes") or ()  # Binance's, and of those that copied its interface
        return self._row.market_stops and (not kinds or bool({"STOP_LOSS", "STOP_MARKET"} & set(kinds)))

    def _feature(self, method: str, name: str) -> Any:
        found = (self._features or {}).get(_METHOD_OF.get(method, method))
        return found.get(name) if isinstance(found, Mapping) else None
