"""`backtest-kit log`: shows the log of runs, and follows it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

import msgspec
from rich.console import Console
from rich.text import Text

from backtest_kit.cli.records import other_spaces, point_to, require_run, since_ms, space_of
from backtest_kit.cli.store import require_existing
from backtest_kit.errors import Damaged
from backtest_kit.model.interval import iso, to_datetime
from backtest_kit.persist.binding import runs_in
from backtest_kit.persist.store import Record, Store
from backtest_kit.persist.urls import store_at
from backtest_kit.records.log import LOG, LogLine, at_least, line_of
from backtest_kit.records.signals import matching

_POLL_S: Final = 0.25
_KNOWN: Final = 4096
"""Lines that are remembered, so that none is shown twice."""
_OVERLAP: Final = 512
_SETTLED: Final = 32
_SETTLED_MS: Final = 15_000
"""How far a look reads behind the newest known line: so many known lines, of which so many are so old.

When two processes write at the same time a server can show the later line first, by as long as a store retries a
write."""
_COLOURS: Final = {"debug": "dim", "info": "cyan", "warning": "yellow", "error": "bold red"}


def run_log(
    url: str | None,
    *,
    mode: str,
    run_id: str | None,
    symbol: str | None,
    strategy_name: str | None,
    level: str,
    since: str | None,
    limit: int,
    follow: bool,
    as_json: bool,
) -> None:
    """Show the last lines and, to follow, new ones: with colors on a terminal, otherwise as JSON."""
    wanted_levels, from_ms = at_least(level), since_ms(since)
    matches = matching(symbol=symbol, strategy_name=strategy_name)

    def wanted(line: LogLine) -> bool:
        return (
            line.level in wanted_levels
            and matches(line)
            and (from_ms is None or (line.said_at_ms if line.when_ms is None else line.when_ms) >= from_ms)
        )

    async def main() -> None:
        store = store_at(address, existing=True)
        try:
            space = space_of(store, mode, run_id)
            if run_id is not None and not follow:  # to follow, it waits for one that begins
                require_run(run_id, await runs_in(store), address)
            shown = await _show(space, wanted, limit, show, follow=follow)
            if limit and not shown and run_id is None:
                point_to(mode, await other_spaces(store, mode, [LOG]))
        finally:
            await store.close()

    address = url or _address_of_files()
    require_existing(address)
    console = Console(highlight=False, soft_wrap=True)
    show = _write_json if as_json or not console.is_terminal else lambda line: console.print(_readable(line))
    asyncio.run(main())


async def _show(
    store: Store, wanted: Callable[[LogLine], bool], limit: int, show: Callable[[LogLine], None], *, follow: bool
) -> int:
    """Show the last lines, and new ones while it follows. Returns how many of the last there were."""
    seen: list[str] = []
    last: list[LogLine] = []
    reported: set[str] = set()
    async for record in _newest_first(store, reported):
        if len(seen) < _KNOWN:
            seen.append(str(record.key[0]))
        line = line_of(record)
        if wanted(line) and len(last) < limit:
            last.append(line)
        if len(last) == limit and len(seen) >= _SETTLED:
            break
    for line in reversed(last):
        show(line)
    known = deque(reversed(seen), maxlen=_KNOWN)
    while follow:
        await asyncio.sleep(_POLL_S)
        for record in await news_of(store, known, reported):
            line = line_of(record)
            if wanted(line):
                show(line)
    return len(last)


async def news_of(store: Store, known: deque[str], reported: set[str]) -> list[Record]:
    """What was written since any of `known`, the oldest first; known from then on.

    It reads the feed and not its file, which can begin anew or be shortened meanwhile. Lines are in order of writing.
    Their ids begin with the time at which they were logged, and another process can write one late. `reported` is what
    was printed about damage.
    """
    oldest, late = min(known, default=""), 0
    names, newest_ms, behind, settled = set(known), 0, 0, 0
    news: list[Record] = []
    maybe: list[Record] = []
    """New lines if a known one follows, otherwise older lines."""
    async for record in _newest_first(store, reported):
        key = str(record.key[0])
        if key in names:
            newest_ms = newest_ms or record.written_at
            behind += 1
            news += maybe
            maybe.clear()
            settled += record.written_at < newest_ms - _SETTLED_MS
            if behind == _OVERLAP or settled == _SETTLED:
                break
        elif behind:
            maybe.append(record)
            if len(maybe) == _OVERLAP:
                break
        else:
            news.append(record)
            late += key <= oldest
            if late == _KNOWN:
                break
    known.extend(str(record.key[0]) for record in reversed(news))
    if not behind:
        # All known lines are deleted by now, and older ones were written before.
        news = [record for record in news if str(record.key[0]) > oldest]
    return news[::-1]


async def _newest_first(store: Store, reported: set[str]) -> AsyncIterator[Record]:
    try:
        async for record in store.scan(LOG, newest_first=True):
            yield record
    except Damaged as error:
        if str(error) not in reported:
            reported.add(str(error))
            sys.stderr.write(f"damaged: {error}\n")


def _write_json(line: LogLine) -> None:
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    sys.stdout.flush()


def _readable(line: LogLine) -> Text:
    said = to_datetime(line.said_at_ms).strftime("%Y-%m-%d %H:%M:%S")
    when = "" if line.when_ms is None else iso(line.when_ms)
    text = Text(f"{said} ", style="dim")
    text.append(f"{line.level:<7} ", style=_COLOURS[line.level])
    text.append(" ".join(filter(None, (when, line.symbol, line.strategy_name, line.logger))) + " ", style="blue")
    text.append(line.message)
    for name, value in line.fields.items():
        text.append(f" {name}=", style="dim")
        text.append(str(value))
    return text


def _address_of_files() -> str:
    """The log lies in files wherever the rest is bound."""
    address = os.environ.get("CC_STORE", "")
    return address if address.startswith("file:") else "file:./dump"
