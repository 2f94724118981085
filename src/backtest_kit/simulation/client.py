"""What a bot plugs in to trade on a simulated exchange: its candles, its clock, its broker."""

from __future__ import annotations

_SECTIONS = {
    "public": "/api/v3",
    "private": "/api/v3",
    "v1": "/api/v1",
    "sapi": "/sapi/v1",
    "sapiV2": "/sapi/v2",
    "sapiV3": "/sapi/v3",
    "sapiV4": "/sapi/v4",
    "fapiPublic": "/fapi/v1",
    "fapiPublicV2": "/fapi/v2",
    "fapiPublicV3": "/fapi/v3",
    "fapiPrivate": "/fapi/v1",
    "fapiPrivateV2": "/fapi/v2",
    "fapiPrivateV3": "/fapi/v3",
    "fapiData": "/futures/data",
    "dapiPublic": "/dapi/v1",
    "dapiPrivate": "/dapi/v1",
    "dapiPrivateV2": "/dapi/v2",
}


def ccxt_urls(url: str) -> dict[str, dict[str, str]]:
    """The option `urls` by which ccxt's `binance` and `binanceusdm` talk to the venue at `url`, and to nobody else.

    ccxt.binanceusdm({"apiKey": "bot", "secret": "simulated", "urls": ccxt_urls("http://127.0.0.1:8899")})
    """
    return {"api": {section: url.rstrip("/") + path for section, path in _SECTIONS.items()}}
