"""`Log`: structured lines, kept in the order in which they were logged, without making the caller wait."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Unpack, get_args

import msgspec

from backtest_kit.errors import BacktestKitError, UserError
from backtest_kit.model.identity import Identity, Mode
from backtest_kit.model.interval import to_datetime
from backtest_kit.persist.codec import decode_as, encode
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Plain, Record, Write
from backtest_kit.persist.writing import now_ms
from backtest_kit.records.scope import Scopes, View
from backtest_kit.records.signals import matching, newest

if TYPE_CHECKING:
    from backtest_kit.persist.binding import Persistence

Level = Literal["debug", "info", "warning", "error"]

LOG: Final = CONTRACTS["log"]
LEVELS: Final[tuple[Level, ...]] = get_args(Level)
"""From the least to the most important."""
SAID: Final = logging.getLogger("backtest_kit.strategy")
"""The logger of the standard library that gets the lines of strategies."""
_ABOVE: Final = 3
"""Frames from there to the caller, for a handler that names file and line."""
SAID.addHandler(logging.NullHandler())  # else it prints them for a program that has set up no logging
_GROUP: Final = 500
_FULL: Final = 10_000
"""Lines that may wait. A caller that can wait does so at half of it; otherwise the oldest are dropped and counted."""
_PAUSE_S: Final = 1.0


class LogLine(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One line of a log."""

    entry_id: str
    level: Level
    message: str
    mode: Mode
    symbol: str = ""
    strategy_name: str = ""
    exchange_name: str = ""
    frame_name: str = ""
    logger: str = ""
    """The logger of the standard library that it came from; empty for lines of a strategy."""
    when_ms: int | None = None
    """Simulation time, None without one."""
    said_at_ms: int
    """Wall clock."""
    fields: dict[str, Any] = {}
    """What was logged with the message."""

    @property
    def when(self) -> datetime | None:
        return None if self.when_ms is None else to_datetime(self.when_ms)


def line_of(record: Record) -> LogLine:
    """The line in a stored record. Raises `Damaged` if it is not one."""
    return decode_as(LogLine, record.value)


class _Waiting(NamedTuple):
    mode: Mode
    run_id: str | None
    write: Write


class LogWriter:
    """Takes lines from any thread and writes them in the background, many in one go."""

    def __init__(self, persistence: Callable[[], Persistence]) -> None:
        self._persistence = persistence
        self._waiting: deque[_Waiting] = deque()
        self._guard = threading.Lock()
        self._dropped = 0
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn = asyncio.Lock()
        # Ids of two processes differ by the token, and those of one are in order.
        self._token = secrets.token_hex(4)
        self._serial = itertools.count()

    def new_id(self) -> str:
        return f"{time.time_ns():020d}-{self._token}-{next(self._serial)}"

    def add(self, mode: Mode, run_id: str | None, line: LogLine) -> None:
        """Take a line. It is written as soon as the event loop has its turn."""
        write = Write(LOG, (line.entry_id,), _plain(line), when=line.when_ms)
        with self._guard:
            if len(self._waiting) >= _FULL:
                self._waiting.popleft()
                self._dropped += 1
            self._waiting.append(_Waiting(mode, run_id, write))
        self._wake()

    @property
    def crowded(self) -> bool:
        """Whether so much waits that a caller that can wait should `flush` first."""
        return len(self._waiting) > _FULL // 2

    async def flush(self) -> None:
        """Write what waits.

        Raises:
            As `Store.put`; what was not written keeps waiting.
        """
        await self._write_all()

    def _wake(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # in another thread, or while no loop runs: written with the next line, or by flush
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._start, self._loop)
        else:
            self._start(loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            self._use(loop)
            self._task = loop.create_task(self._write_on(), name="log")

    async def _write_on(self) -> None:
        """Write until nothing waits. A store that does not take lines is tried again permanently."""
        failed = False
        while self._waiting:
            try:
                await self._write_all()
            except BacktestKitError as error:
                if not failed:
                    logging.getLogger(__name__).warning("lines of the log wait for the store: %s", error)
                failed = True
                await asyncio.sleep(_PAUSE_S)

    def _use(self, loop: asyncio.AbstractEventLoop) -> asyncio.Lock:
        if self._loop is not loop:
            self._loop, self._turn = loop, asyncio.Lock()
        return self._turn

    async def _write_all(self) -> None:
        # One at a time, because what is refused goes back to the front of the queue.
        async with self._use(asyncio.get_running_loop()):
            while group := self._take():
                results: Sequence[object] | None = None
                try:
                    results = await self._put(group)
                finally:
                    self._put_back(group, results)
                for result in results:
                    if isinstance(result, BaseException):
                        raise result

    async def _put(self, group: list[_Waiting]) -> list[object]:
        """Write a group, all lines of one store together; return the outcome of each."""
        places: dict[tuple[Mode, str | None], list[int]] = {}
        for place, each in enumerate(group):
            places.setdefault((each.mode, each.run_id), []).append(place)
        results: list[object] = [None] * len(group)
        for (mode, run_id), some in places.items():
            store = self._persistence().store_for(LOG, mode, run_id)
            for place, result in zip(some, await store.put_each([group[at].write for at in some]), strict=True):
                results[place] = result
        return results

    def _put_back(self, group: list[_Waiting], results: Sequence[object] | None) -> None:
        """Queue again those that were refused, or all of a group that was cancelled.

        A line that was written all the same is not written twice, for its id is taken.
        """
        if results is not None:
            group = [each for each, result in zip(group, results, strict=True) if isinstance(result, BaseException)]
        with self._guard:
            self._waiting.extendleft(reversed(group))

    def _take(self) -> list[_Waiting]:
        with self._guard:
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                first = self._waiting[0]
                line = LogLine(
                    entry_id=self.new_id(),
                    level="warning",
                    message=f"{dropped} lines of the log were dropped: the store could not keep up",
                    mode=first.mode,
                    said_at_ms=now_ms(),
                )
                write = Write(LOG, (line.entry_id,), _plain(line), when=first.write.when)
                self._waiting.appendleft(_Waiting(first.mode, first.run_id, write))
            return [self._waiting.popleft() for _ in range(min(_GROUP, len(self._waiting)))]


class Log:
    """The log of a run at one minute: `ctx.log.info("volume is thin", volume=12.5)`.

    Logging a line costs microseconds and does not wait. It is written within 50 ms, as structured JSON with symbol,
    strategy, mode and the simulation time of its minute. The standard library's logger `backtest_kit.strategy` gets it
    as well, with the whole line as `record.line`.
    """

    __slots__ = ("_identity", "_run_id", "_when_ms", "_writer")

    def __init__(self, writer: LogWriter, identity: Identity, run_id: str | None, when_ms: int | None) -> None:
        self._writer = writer
        self._identity = identity
        self._run_id = run_id
        self._when_ms = when_ms

    def debug(self, message: object, /, **fields: Any) -> None:
        """For debugging."""
        self._say("debug", message, fields)

    def info(self, message: object, /, **fields: Any) -> None:
        """What happened. `message` is kept as text; `fields` are anything that can be stored, under any name."""
        self._say("info", message, fields)

    def warning(self, message: object, /, **fields: Any) -> None:
        """Something to look at eventually."""
        self._say("warning", message, fields)

    def error(self, message: object, /, **fields: Any) -> None:
        """An error."""
        self._say("error", message, fields)

    def _say(self, level: Level, message: object, fields: dict[str, Any]) -> None:
        identity = self._identity
        line = LogLine(
            entry_id=self._writer.new_id(),
            level=level,
            message=message if isinstance(message, str) else _text(message),
            mode=identity.mode,
            symbol=identity.symbol,
            strategy_name=identity.strategy_name,
            exchange_name=identity.exchange_name,
            frame_name=identity.frame_name,
            when_ms=self._when_ms,
            said_at_ms=now_ms(),
            fields=fields,
        )
        self._writer.add(identity.mode, self._run_id, line)
        number = getattr(logging, level.upper())
        if SAID.isEnabledFor(number):
            SAID.log(number, "%s", _readable(line), extra={"line": line}, stacklevel=_ABOVE)


def _readable(line: LogLine) -> str:
    """`BTCUSDT trend: volume is thin volume=12.5`."""
    fields = (f"{name}={_text(value)}" for name, value in line.fields.items())
    return _utf8(" ".join((f"{line.symbol} {line.strategy_name}: {line.message}", *fields)))


class Logs:
    """The logs of a program, from outside of its runs: `kit.records.log`."""

    def __init__(self, scope: Scopes, writer: LogWriter) -> None:
        self._scope = scope
        self._writer = writer
        self._bridge: tuple[logging.Logger, _Bridge] | None = None

    async def list(
        self,
        *,
        level: Level = "debug",
        symbol: str | None = None,
        strategy_name: str | None = None,
        limit: int | None = 1000,
        **view: Unpack[View],
    ) -> list[LogLine]:
        """The lines that match all of this, of that level or a higher one, newest first; at most `limit`.

        Raises:
            UserError: unknown `level`, `limit` below 0, or a backtest without its run id.
            Damaged, RetryLater: as `Store.scan`.
        """
        levels, matches = at_least(level), matching(symbol=symbol, strategy_name=strategy_name)
        await self.flush()
        return await newest(
            self._scope(**view),
            LOG,
            (),
            partial(decode_as, LogLine),
            lambda line: line.level in levels and matches(line),
            limit,
        )

    def bridge(self, logger: str = "", *, level: Level = "info", mode: Mode = "live") -> None:
        """Also keep what goes to a logger of the standard library and those below it; "" is all of them.

        It changes no levels of the standard library: what a logger ignores is not kept.

        Raises:
            UserError: unknown `level`, or there is a bridge already.
        """
        at_least(level)
        if self._bridge is not None:
            raise UserError("there is a bridge already: kit.records.log.unbridge() ends it")
        source, bridge = logging.getLogger(logger), _Bridge(self._writer, mode, level)
        source.addHandler(bridge)
        self._bridge = source, bridge

    def unbridge(self) -> None:
        """End the bridge, if there is one."""
        if self._bridge is not None:
            source, bridge = self._bridge
            source.removeHandler(bridge)
            self._bridge = None

    async def flush(self) -> None:
        """Write all lines that were logged so far. Raises as `Store.put`."""
        await self._writer.flush()


class _Bridge(logging.Handler):
    """From the standard library's logging to the log."""

    def __init__(self, writer: LogWriter, mode: Mode, level: Level) -> None:
        super().__init__(getattr(logging, level.upper()))
        self._writer = writer
        self._mode = mode

    def emit(self, record: logging.LogRecord) -> None:
        if record.name in (__name__, SAID.name):
            return  # the log cannot contain that it cannot be written, and has its own lines already
        fields = {} if record.exc_info is None else {"traceback": "".join(traceback.format_exception(*record.exc_info))}
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit, or whose text raises: logging must not fail
            message = f"{_text(record.msg)} {_text(record.args)}"
        line = LogLine(
            entry_id=self._writer.new_id(),
            level=_level_of(record.levelno),
            message=message,
            mode=self._mode,
            logger=record.name,
            said_at_ms=int(record.created * 1000),
            fields=fields,
        )
        self._writer.add(self._mode, None, line)


def at_least(level: str) -> frozenset[str]:
    """This level and the higher ones.

    Raises:
        UserError: unknown level.
    """
    if level not in LEVELS:
        raise UserError(f"level is {level!r}: use one of {', '.join(LEVELS)}")
    return frozenset(LEVELS[LEVELS.index(level) :])


def _level_of(number: int) -> Level:
    if number >= logging.ERROR:
        return "error"
    if number >= logging.WARNING:
        return "warning"
    return "info" if number >= logging.INFO else "debug"


def _plain(line: LogLine) -> Plain:
    """The line as it is stored. What cannot be stored becomes text: a log must not end a strategy."""
    try:
        return encode(line)
    except UserError:
        fields = {_utf8(name): _utf8(_text(value)) for name, value in line.fields.items()}
        message = _utf8(line.message)
        return encode(msgspec.structs.replace(line, message=message, fields=fields))


def _text(value: object) -> str:
    """A value as text, even if its `repr` fails."""
    try:
        return str(value) if isinstance(value, (str, BaseException)) else repr(value)
    except Exception as error:  # a `repr` of the user's may raise anything
        return f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
