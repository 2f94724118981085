"""A program that trades and talks until it is killed, and tells what it has done. Run by test_feed_kills."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from tests.records.conftest import NOON_MS, kit_on
from tests.records.happenings import IDENTITY, observe, opened


async def talk(address: str, place: Path, life: str) -> None:
    kit = kit_on(address, place)
    log = kit.records.of_run(IDENTITY, None).log(NOON_MS)

    async def say() -> None:
        number = 0
        while True:
            log.info(f"{life}-{number}", at_ns=time.monotonic_ns())
            sys.stdout.write(f"said {life}-{number} {time.monotonic_ns()}\n")
            sys.stdout.flush()
            number += 1
            await asyncio.sleep(0.001)

    async def trade() -> None:
        number = 0
        while True:
            await observe(kit, [opened(f"{life}-{number}", number)])
            await kit.persistence.signal.write(
                {"id": f"{life}-{number}"}, strategy_name="trend", exchange_name="binance", symbol=f"S{life}-{number}"
            )
            sys.stdout.write(f"kept {life}-{number} {time.monotonic_ns()}\n")
            sys.stdout.flush()
            number += 1

    await asyncio.gather(say(), trade())


if __name__ == "__main__":
    asyncio.run(talk(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
