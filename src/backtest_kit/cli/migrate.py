"""`backtest-kit store migrate`: copies everything from one store to another, with progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Final

from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeElapsedColumn

from backtest_kit.cli.printing import add, console, say, table
from backtest_kit.cli.store import require_existing
from backtest_kit.errors import UserError
from backtest_kit.persist.comparison import Comparison, Sum, compare_stores
from backtest_kit.persist.migration import Migration, Progress, migrate_store
from backtest_kit.persist.store import Capability
from backtest_kit.persist.urls import shown, store_at
from backtest_kit.persist.walk import Part

_SECONDS_PER_LINE: Final = 5.0
"""How often a line is printed without a terminal."""


def run_migrate(source_url: str, target_url: str, *, verify: bool, resume: bool) -> int:
    """Move, and print what was moved; the exit code is 1 if the stores were compared and differ."""
    require_existing(source_url)
    moved, compared = asyncio.run(_migrate(source_url, target_url, verify=verify, resume=resume))
    _show_moved(moved)
    if compared is None:
        return 0
    _show_compared(compared)
    different = sum(item.difference is not None for item in compared)
    say(f"{different} of them differ." if different else "Both stores have the same records, in the same order.")
    return 1 if different else 0


async def _migrate(
    source_url: str, target_url: str, *, verify: bool, resume: bool
) -> tuple[Migration, list[Comparison] | None]:
    source, target = store_at(source_url, existing=True, patient=True), store_at(target_url, patient=True)
    # Not opened before the very end, when the source is known to be a store.
    writable = store_at(source_url, patient=True)
    if Capability.DURABLE not in target.capabilities:
        raise UserError(f"{target_url} does not outlive this command: name a file or a server")
    try:
        with _shown() as (on_progress, on_part):
            moved = await migrate_store(
                source,
                target,
                resume=resume,
                on_progress=on_progress,
                source_to_mark=writable,
                target_name=shown(target_url),
            )
            compared = await compare_stores(source, target, on_part=on_part) if verify else None
    finally:
        async with AsyncExitStack() as stack:
            for store in (target, writable, source):
                stack.push_async_callback(store.close)
    return moved, compared


@contextmanager
def _shown() -> Iterator[tuple[Callable[[Progress], None], Callable[[Part], None]]]:
    """Progress: a bar on a terminal, a line now and then elsewhere."""
    started = time.monotonic()
    output = console()
    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[counts]}", markup=False),
        TimeElapsedColumn(),
        console=output,
        transient=True,
        disable=not output.is_terminal,
    )
    task = bar.add_task("looking at both stores", total=None, counts="")
    reported = started

    def on_progress(now: Progress) -> None:
        nonlocal reported
        done = now.records + now.candles
        rate = done / max(time.monotonic() - started, 1e-9)
        counts = f"{now.records:,} records, {now.candles:,} candles, {rate:,.0f} a second"
        bar.update(task, description=str(now.part), total=now.parts, completed=now.number - 1, counts=counts)
        if bar.disable and time.monotonic() - reported >= _SECONDS_PER_LINE:
            say(f"{counts}; now {now.part}")
            reported = time.monotonic()

    def on_part(part: Part) -> None:
        bar.update(task, description=f"comparing {part}", total=None, counts="")

    with bar:
        yield on_progress, on_part


def _show_moved(moved: Migration) -> None:
    rows = table("Contract", "Copied", "Already there")
    for item in moved.contracts:
        add(rows, item.contract, f"{item.copied:,}", f"{item.present:,}")
    console().print(rows)
    for finding in moved.left_out:
        say(f"left out: {finding.path}: {finding.problem}")


def _show_compared(compared: list[Comparison]) -> None:
    def shown(side: Sum) -> str:
        return f"{side.count:,} {side.digest}"

    rows = table("Namespace", "Contract", "Source", "Target", "Difference")
    for item in compared:
        namespace = "/".join(item.namespace) or "(live)"
        add(rows, namespace, item.contract, shown(item.source), shown(item.target), item.difference or "none")
    console().print(rows)
