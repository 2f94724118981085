"""Runs over what has happened: a backtest, and walks over several."""

from __future__ import annotations
