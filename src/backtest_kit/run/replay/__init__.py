"""Runs over past candles: backtests, and walks that compare several."""

from __future__ import annotations
