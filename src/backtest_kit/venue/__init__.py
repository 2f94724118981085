"""A simulated exchange: bots trade on it without a network, and tests inject faults into it.

`exchange` matches orders, `venue` feeds it candles and time, `server` serves it as Binance does, `client` is
what a bot plugs in.
"""

from __future__ import annotations
