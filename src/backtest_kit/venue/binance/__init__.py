"""Binance's REST interface in front of the simulated exchange."""

from __future__ import annotations
