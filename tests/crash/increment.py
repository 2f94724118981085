"""A process that counts in a record which others count in as well. Run by test_processes."""

from __future__ import annotations

import asyncio
from typing import Any

from backtest_kit.errors import Conflict
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import ABSENT, Write

STATE = CONTRACTS["state"]
KEY = ("counter", "shared")


def increment(root: str, count: int) -> None:
    asyncio.run(_increment(root, count))


async def _increment(root: str, count: int) -> None:
    store = FileStore(root)
    done = 0
    while done < count:
        found = await store.get(STATE, KEY)
        value: Any = found.value if found else 0
        try:
            await store.put(Write(STATE, KEY, value + 1, expect=found.rev if found else ABSENT))
        except Conflict:
            continue
        done += 1
    await store.close()
