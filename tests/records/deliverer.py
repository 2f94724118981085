"""A program that tells some things, delivers them and goes on until it is killed. Run by test_deliverers."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.records.conftest import kit_on
from tests.records.happenings import observe, opened
from tests.records.receiver import SECRET

from backtest_kit.persist import lease
from backtest_kit.records import sinks


async def tell(address: str, place: Path, url: str, count: int) -> None:
    lease.DEFAULT_TTL = 1.5  # type: ignore[misc]  # of which others see in a tenth that it is dead
    kit = kit_on(address, place)
    kit.records.notification.sink(sinks.webhook(f"{url}/hook?token={SECRET}"))
    await observe(kit, [opened(f"s-{number}", number) for number in range(count)])
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(tell(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
