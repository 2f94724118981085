"""The output of a live run: a view on a terminal with lines above it, or lines alone.

A stopped terminal, a pipe without a reader and a full disk must not hold up trading. So one thread writes, and the
runs only queue their lines; when the queue is full, the oldest lines are dropped.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.live import Live
from rich.text import Text

from backtest_kit.cli.live_view import view
from backtest_kit.cli.live_words import document, standing, words
from backtest_kit.cli.strategy_file import explained
from backtest_kit.format import severity
from backtest_kit.model.event import Event, StrategyFailed
from backtest_kit.model.interval import MINUTE_MS, floor_ms, iso, to_datetime
from backtest_kit.run.live.status import LiveStatus

_PAUSE_S: Final = 0.25
_KEPT: Final = 10_000
"""Lines that wait to be written."""
_HOUR_MS: Final = 60 * MINUTE_MS
_PATIENCE_S: Final = 2.0
"""How long the exit waits for a terminal or a pipe that takes nothing."""


class Output(logging.Handler):
    """Events as lines of text on standard output. As a log handler it prints the warnings that are not events."""

    def __init__(self, head: str) -> None:
        """`head` names the run."""
        super().__init__(logging.WARNING)
        self.head = head
        self._waiting: deque[tuple[str, bool]] = deque(maxlen=_KEPT)
        self._statuses: Sequence[LiveStatus] = ()
        self._reported_ms: dict[str, int] = {}
        self._wake = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._write_all, name="output", daemon=True)

    def __enter__(self) -> Output:
        self._thread.start()
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)
        self._over = True
        self._wake.set()
        self._thread.join(_PATIENCE_S)

    def say(self, text: str, *, alarm: bool = False) -> None:
        """Report something about the program itself."""
        self._put(text, alarm=alarm)

    def event(self, event: Event) -> None:
        """Report what happened in a run."""
        text = f"{to_datetime(event.when_ms):%Y-%m-%d %H:%M}  {event.symbol}  {words(event)}"
        if isinstance(event, StrategyFailed):
            text = f"{text}\n{explained(event.error)}"
        self._put(text, alarm=severity(event) == "alarm")

    def stand(self, statuses: Sequence[LiveStatus]) -> None:
        """Report the state of the runs; may be called at any rate."""
        self._statuses = statuses
        for each in statuses:
            if not each.ended and self._is_new(each, _HOUR_MS):
                self._put(f"{to_datetime(each.when_ms):%Y-%m-%d %H:%M}  {each.identity.symbol}  {standing(each)}")

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "event"):
            self.say(self.format(record), alarm=record.levelno >= logging.ERROR)

    def _is_new(self, status: LiveStatus, step_ms: int) -> bool | None:
        """Whether another `step_ms` has begun since the last call; None at the first call."""
        if not status.when_ms:
            return False
        begun_ms, symbol = floor_ms(status.when_ms, step_ms), status.identity.symbol
        before_ms = self._reported_ms.get(symbol)
        self._reported_ms[symbol] = begun_ms
        return None if before_ms is None else begun_ms > before_ms

    def _put(self, text: str, *, alarm: bool = False) -> None:
        self._waiting.append((text, alarm))
        self._wake.set()

    # In the thread

    def _write_all(self) -> None:
        while not self._over:
            self._wake.wait(_PAUSE_S)
            self._wake.clear()
            self._write()
        self._write()

    def _write(self) -> None:
        while self._waiting:
            text, alarm = self._waiting.popleft()
            left = memoryview(f"{'ALARM  ' if alarm else ''}{text}\n".encode(errors="replace"))
            # A full disk or a closed pipe is not a reason to stop trading; later lines may find room again.
            with suppress(OSError):
                while left:
                    left = left[os.write(sys.stdout.fileno(), left) :]


class JsonOutput(Output):
    """A JSON document in each line: every event, and once a minute how each run stands."""

    def say(self, text: str, *, alarm: bool = False) -> None:
        self._document({"action": "note", "text": text, "alarm": alarm})

    def event(self, event: Event) -> None:
        self._document({**document(event), "text": words(event), "alarm": severity(event) == "alarm"})

    def stand(self, statuses: Sequence[LiveStatus]) -> None:
        for each in statuses:
            if self._is_new(each, MINUTE_MS) is not False:
                head = {"action": "status", "symbol": each.identity.symbol, "when": iso(each.when_ms)}
                self._document({**head, **msgspec.to_builtins(each)})

    def _document(self, fields: dict[str, Any]) -> None:
        self._put(msgspec.json.encode(fields).decode())


class ViewOutput(Output):
    """A view of all runs at the foot of a terminal; what happens runs along above it."""

    def __init__(self, head: str, console: Console) -> None:
        super().__init__(head)
        self._console = console
        self._live: Live | None = None

    def stand(self, statuses: Sequence[LiveStatus]) -> None:
        self._statuses = statuses

    def _write_all(self) -> None:
        with Live(console=self._console, auto_refresh=False, vertical_overflow="crop") as self._live:
            super()._write_all()

    def _write(self) -> None:
        while self._waiting:
            text, alarm = self._waiting.popleft()
            self._console.print(Text(f"{'ALARM  ' if alarm else ''}{text}", "red" if alarm else ""))
        if self._live is not None and self._statuses:
            size = self._console.size
            self._live.update(view(self.head, self._statuses, size.width, size.height), refresh=True)
