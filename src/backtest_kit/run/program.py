"""`Program`: what all runs of a kit share."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from backtest_kit.events import EventBus
from backtest_kit.records import Records
from backtest_kit.run.cron import Cron
from backtest_kit.run.feeds import Feeds
from backtest_kit.run.schema import Registry
from backtest_kit.settings import Settings


class Program(msgspec.Struct, frozen=True):
    """What all runs of a kit share."""

    registry: Registry
    feeds: Feeds
    bus: EventBus
    cron: Cron
    records: Records
    settings: Callable[[], Settings]
    """The settings in force."""
