"""`backtest-kit doctor`: the health of the store, as a table or as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Final

import msgspec
from rich.text import Text

from backtest_kit.cli.printing import add, console, say, table
from backtest_kit.persist.diagnosis import examine, fails
from backtest_kit.persist.upkeep import Reading, Status
from backtest_kit.persist.urls import shown, store_at

_STYLES: Final = {
    Status.OK: "green",
    Status.NEW: "cyan",
    Status.WARNING: "yellow",
    Status.DEGRADED: "yellow",
    Status.WEAK: "magenta",
    Status.FAULT: "bold red",
}


def run_doctor(url: str, *, live: bool, allow_weak: bool, as_json: bool, samples: int) -> int:
    """Print what was found; the exit code is 1 if something has to be done."""
    readings = asyncio.run(_examine(url, samples))
    failed = fails(readings, live=live, allow_weak=allow_weak)
    if as_json:
        document = {"store": shown(url), "fit": not failed, "readings": msgspec.to_builtins(readings)}
        sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    else:
        _show(url, readings, live=live, failed=failed)
    return int(failed)


async def _examine(url: str, samples: int) -> list[Reading]:
    store = store_at(url, existing=True)
    try:
        return await examine(store, samples=samples)
    finally:
        await store.close()


def _show(url: str, readings: list[Reading], *, live: bool, failed: bool) -> None:
    rows = table("What", "Status", "Found", "ms")
    for each in readings:
        # Literally: what a server reports may look like markup.
        found = Text(each.detail)
        if each.remedy:
            found.append(f"\n-> {each.remedy}", "bold")
        took = "" if each.median_ms is None else f"{each.median_ms:.2f}"
        add(rows, each.subject, Text(each.status.value, _STYLES[each.status]), found, took)
    console().print(rows)
    use = "live trading" if live else "use"
    weak = any(each.status is Status.WEAK for each in readings)
    verdict = f"not fit for {use}" if failed else f"fit for {use}"
    if weak and not live:
        verdict += "; --live would fail on weak points"
    say(f"{shown(url)}: {verdict}.")
