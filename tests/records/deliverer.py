"""A program that writes some notifications, delivers them and goes on until it is killed. Run by test_deliverers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from tests.records.conftest import kit_on
from tests.records.happenings import observe, opened
from tests.records.receiver import SECRET

from backtest_kit.records import sinks
from backtest_kit.records.notification import Notification


class Suicidal(sinks.HttpSink):
    """Kills the process once the receiver has accepted the notification of one signal, before that is marked."""

    fatal = ""

    async def deliver(self, notification: Notification) -> None:
        await super().deliver(notification)
        if notification.signal_id == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


async def deliver(address: str, place: Path, url: str, count: int, fatal: str) -> None:
    kit = kit_on(address, place)
    sink = Suicidal("webhook", f"{url}/hook?token={SECRET}", {}, 10.0)
    sink.fatal = fatal
    kit.records.notification.sink(sink)
    await observe(kit, [opened(f"s-{number}", number) for number in range(count)])
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(deliver(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]))
