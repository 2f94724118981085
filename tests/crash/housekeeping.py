"""Kills a process at every crash point of a log of which lines are forgotten. Run by test_kills."""

from __future__ import annotations

import argparse
import asyncio
import sys

import msgspec

from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.testing.driver import Child, kill_at_points


async def forget_lines(child: Child) -> None:
    for version in range(1, 9):
        await asyncio.gather(*(child.write([CONTRACTS["log"]], writer, version) for writer in (1, 2, 3)))
        await child.write_and_forget(CONTRACTS["log"], version)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--most", type=int)
    given = parser.parse_args()
    outcome = kill_at_points(given.store + "-log", forget_lines, given.seed, given.most)
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
