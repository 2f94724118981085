"""A simulated exchange: what a bot trades against where there is no network, and what tests break on purpose.

`exchange` matches orders, `venue` feeds it candles and time, `server` serves it as Binance does, `client` is
what a bot plugs in.
"""

from __future__ import annotations
