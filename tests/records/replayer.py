"""A program that begins to replay a run, and goes on until it is killed. Run by test_exclusive."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.records.test_exclusive import WHERE, count, kit_that_asks

import backtest_kit as bk


async def replay(address: str, place: Path) -> None:
    async def ask_once(ctx: bk.Context) -> None:
        await count(ctx)
        sys.stdout.write("asked\n")
        sys.stdout.flush()
        await asyncio.Event().wait()

    kit = kit_that_asks(address, place, ask_once)
    await kit.backtest.background("BTCUSDT", **WHERE, frame_name="one", run_id="mine")


if __name__ == "__main__":
    asyncio.run(replay(sys.argv[1], Path(sys.argv[2])))
