"""Kills a process at every crash point of feeds that fill segments and are compacted. Run by test_kills."""

from __future__ import annotations

import argparse
import asyncio
import sys

import msgspec

from backtest_kit.persist.backends import file_feed
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.testing.driver import Child, kill_at_points


async def fill_segments(child: Child) -> None:
    for version in range(1, 9):
        await asyncio.gather(*(child.write([CONTRACTS["storage"]], writer, version) for writer in (1, 2, 3)))
        await child.write([CONTRACTS["log"]], 1, version)
        await child.write_and_forget(CONTRACTS["log"], version)
        await asyncio.sleep(0.003)  # housekeeping has its own thread


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    file_feed.SEGMENT_BYTES = 700  # type: ignore[misc]
    outcome = kill_at_points(parser.parse_args().store + "-feeds", fill_segments)
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
