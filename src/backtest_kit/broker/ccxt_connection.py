"""Connecting to an exchange to trade there: credentials, client, and the checks without which no order is sent."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec

from backtest_kit.broker.base import OrderRejected
from backtest_kit.broker.ccxt_errors import NotAllowed
from backtest_kit.broker.ccxt_rules import MarketKind, VenueRules
from backtest_kit.broker.ccxt_venue import CcxtVenue
from backtest_kit.ccxt_client import open_client
from backtest_kit.errors import BacktestKitError, RetryLater, UserError

_log = logging.getLogger(__name__)
KEY_VARIABLES: Final = {"apiKey": "CC_CCXT_API_KEY", "secret": "CC_CCXT_SECRET", "password": "CC_CCXT_PASSWORD"}
_SKEW_WARNED_MS: Final = 1000
_NEEDED: Final = ("createOrder", "cancelOrder", "fetchOrder", "fetchOpenOrders", "fetchBalance", "fetchMyTrades")


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach an account."""

    exchange_id: str
    kind: MarketKind
    credentials: Mapping[str, str | None]
    urls: Mapping[str, Any]
    options: Mapping[str, Any]
    timeout_ms: int
    arrival_ms: int
    rate_limit: bool
    test_network: bool

    def __repr__(self) -> str:
        return f"Connection({self.exchange_id!r}, {self.kind!r})"

    async def open(self) -> tuple[CcxtVenue, Callable[[], Awaitable[None]], tuple[str, ...]]:
        """The account, checked; a function that closes it; and notes about the exchange.

        Raises:
            UserError: keys, permissions, account mode or market make trading impossible.
            RetryLater: the exchange does not answer.
        """
        secrets = self._secrets()
        client = open_client(self.exchange_id, self._config(secrets))
        if self.test_network:
            _enter_test_network(client, self.exchange_id)
        # The DEBUG log of ccxt contains the key in its headers.
        client.logger = logging.getLogger(f"{__name__}.requests")
        client.logger.setLevel(logging.WARNING)
        if self.urls:
            client.urls["api"] = {**client.urls["api"], **self.urls}
            if all(str(url).startswith("http:") for url in self.urls.values()):
                client.timeout_on_exit = 0  # ccxt gives TLS this time to end, and here is none
        rules = VenueRules(client, self.kind)
        try:
            venue = CcxtVenue(
                client,
                self.exchange_id,
                rules,
                deadline_s=1.5 * self.timeout_ms / 1000,
                arrival_s=self.arrival_ms / 1000,
                secrets=[secret for secret in secrets.values() if secret],
            )
            notes = await self._check(client, venue, rules)
        except BaseException:
            await client.close()
            raise
        for note in notes:
            _log.warning("%s", note)
        return venue, client.close, tuple(notes)

    def account(self) -> str:
        """A digest of the key, the market and the address; empty without a key.

        The name of the exchange is not in it: `binance` and `binanceusdm` reach the same futures.
        """
        key = self.credentials.get("apiKey") or os.environ.get(KEY_VARIABLES["apiKey"])
        if not key:
            return ""
        reached = repr((key, self.test_network, sorted((name, str(url)) for name, url in self.urls.items())))
        return f"{self.kind}:{hashlib.sha256(reached.encode()).hexdigest()[:32]}"

    def _secrets(self) -> dict[str, str | None]:
        found = {name: self.credentials.get(name) or os.environ.get(env) for name, env in KEY_VARIABLES.items()}
        missing = [KEY_VARIABLES[name] for name in ("apiKey", "secret") if not found[name]]
        if missing:
            way_out = f"set {' and '.join(missing)}, or give CcxtBroker api_key and secret"
            raise UserError(f"{self.exchange_id}: no credentials: {way_out}")
        return found

    def _config(self, secrets: Mapping[str, str | None]) -> dict[str, Any]:
        futures = self.kind == "futures"
        options: dict[str, Any] = {
            "defaultType": "swap" if futures else "spot",
            "adjustForTimeDifference": True,
            "recvWindow": self.arrival_ms,
            "fetchCurrencies": False,
            **self.options,
            # An order that ccxt repeats by itself is sent twice.
            "maxRetriesOnFailure": 0,
        }
        if self.exchange_id.startswith("binance"):
            options.setdefault("fetchMarkets", {"types": ["linear" if futures else "spot"]})
        given = {name: secret for name, secret in secrets.items() if secret}
        return {**given, "timeout": self.timeout_ms, "enableRateLimit": self.rate_limit, "options": options}

    async def _check(self, client: Any, venue: CcxtVenue, rules: VenueRules) -> list[str]:
        """Check that the exchange can be traded; returns notes about it."""
        needed = (*_NEEDED, "fetchPositions") if self.kind == "futures" else _NEEDED
        lacking = [name for name in needed if not client.has.get(name)]
        if lacking:
            raise UserError(f"{self.exchange_id} cannot be traded through ccxt: it has no {', '.join(lacking)}")
        notes = rules.check()
        await self._asked(venue, "load the markets", client.load_markets)
        if not client.markets:
            raise RetryLater(f"{self.exchange_id}: the list of markets is empty, or ccxt cannot read it")
        balance = await self._asked(venue, "check the key", client.fetch_balance)
        if (balance.get("info") or {}).get("canTrade") is False:
            raise UserError(f"{self.exchange_id}: the account may not trade: allow trading for this API key")
        if self.kind == "futures" and client.has.get("fetchPositionMode"):
            mode = await self._asked(venue, "read the position mode", client.fetch_position_mode)
            if mode.get("hedged"):
                raise UserError(
                    f"{self.exchange_id}: the account is in hedge mode, and a stop could close the wrong side: "
                    "switch its position mode to one-way"
                )
        skew_ms = int(client.options.get("timeDifference") or 0)
        if abs(skew_ms) > _SKEW_WARNED_MS:
            _log.warning(
                "%s: the clock of this machine is %+d ms off: orders are sent in the exchange's time; "
                "synchronise this clock (NTP)", self.exchange_id, skew_ms
            )  # fmt: skip
        return notes

    async def _asked(self, venue: CcxtVenue, doing: str, request: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await venue.call(doing, request)
        except NotAllowed as error:
            raise UserError(f"{error}; check the API key, its permissions and its list of addresses") from None
        except OrderRejected as error:
            raise UserError(f"{error}; check the options and urls given to CcxtBroker") from None
        except BacktestKitError as error:
            raise RetryLater(str(error)) from None


def _enter_test_network(client: Any, exchange_id: str) -> None:
    if client.urls.get("demo") and hasattr(client, "enable_demo_trading"):
        client.enable_demo_trading(True)
    elif client.urls.get("test"):
        client.set_sandbox_mode(True)
    else:
        raise UserError(f"{exchange_id} has no test network that ccxt knows: leave test_network out")
