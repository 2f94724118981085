"""The live runner of the default kit: apart from `default`, so that a backtest does not wait for what only it needs."""

from __future__ import annotations

from backtest_kit.default import default_kit

Live = default_kit.live
