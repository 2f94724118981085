"""A bot whose exit is refused, and which is killed before the next minute. Run by test_refused_close."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from tests.live.rig import START, WHERE, Rig, UntilClock, Venue
from tests.live.scenario import prepared

import backtest_kit as bk
from backtest_kit.model.interval import MINUTE_MS


class Deadly(Venue):
    """Refuses the first exit. At the next minute it is asked for it, and instead of an answer comes the end."""

    handle: bk.LiveHandle

    def __init__(self) -> None:
        super().__init__()
        self.script["close", 1] = "rejected"

    async def find(self, order: bk.Order) -> bk.OrderReport:
        sys.stdout.write(repr(self.handle._run.order_manager.position_state))
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        return await super().find(order)


async def trade(place: Path) -> None:
    rig = Rig(place, bk.FileStore(place / "store"))
    rig.venue = venue = Deadly()
    clock = UntilClock(START, START + 12 * MINUTE_MS)
    venue.handle = prepared(rig).kit(clock).live.background("BTCUSDT", **WHERE)
    await venue.handle


if __name__ == "__main__":
    asyncio.run(trade(Path(sys.argv[1])))
