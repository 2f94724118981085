"""What a run remembers: one module for each record, the same in backtest, paper and live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Unpack
from weakref import WeakValueDictionary

from backtest_kit.errors import BacktestKitError, UserError
from backtest_kit.model.event import Event
from backtest_kit.model.identity import Identity, Mode
from backtest_kit.model.interval import to_ms
from backtest_kit.records import sinks as sinks
from backtest_kit.records.delivery import Deliveries, Notifications
from backtest_kit.records.exclusive import exclusive_run
from backtest_kit.records.housekeeping import Housekeeping
from backtest_kit.records.interval import Windows
from backtest_kit.records.log import Log, Logs, LogWriter
from backtest_kit.records.measure import Measure
from backtest_kit.records.memory import Memory, Shelves
from backtest_kit.records.record_writer import RecordWriter
from backtest_kit.records.scope import Scope, Turns, View, When, Written, check_texts, strategy_owner
from backtest_kit.records.session import Session
from backtest_kit.records.signals import Recent, Storage
from backtest_kit.records.state import STATE, State
from backtest_kit.settings import Settings

if TYPE_CHECKING:
    from backtest_kit.persist.binding import Persistence


class Whose(View, total=False):
    """Names a record from outside of its run: `signal_id` alone, or symbol, strategy and exchange."""

    signal_id: str | None
    symbol: str | None
    strategy_name: str | None
    exchange_name: str | None


class Records:
    """The records of a program, from outside of its runs: `kit.records`.

    A strategy has those of its own run in its context (`ctx.state`, `ctx.session`, ...), as of its own minute.
    Here they are named in full: by mode, and for a backtest by the id of its run. `when` shows them as they
    were seen at a moment; without it everything is seen. Where history is kept, and not as far back as `when`,
    reading raises `NotKept`.
    """

    def __init__(self, persistence: Callable[[], Persistence], settings: Callable[[], Settings] = Settings) -> None:
        """`persistence` is called when a record is first read or written, and no earlier."""
        self._persistence = persistence
        self._turns = Turns()
        self._written: WeakValueDictionary[tuple[Identity, str], Written] = WeakValueDictionary()
        """Of the backtests that are running, or whose contexts are still referenced."""
        self._deliveries = Deliveries(persistence, settings)
        self._record_writer = RecordWriter(persistence, self._deliveries)
        self._writer = LogWriter(persistence)
        self._upkeep = Housekeeping(persistence, settings)
        self.measure = Measure(self.scope)
        self.interval = Windows(self.scope)
        self.storage = Storage(self.scope)
        self.recent = Recent(self.scope)
        self.notification = Notifications(self.scope, self._deliveries)
        self.log = Logs(self.scope, self._writer)

    async def begin(self, mode: Mode) -> None:
        """A run of this mode begins: start the sinks where they were, and delete old records, now and daily."""
        if mode != "backtest":
            await self._deliveries.begin(mode)
            self._upkeep.start()

    async def close(self) -> None:
        """Deliver notifications and write records, within some seconds, and end the tasks of this event loop."""
        self.log.unbridge()
        await self.leave()

    async def leave_loop(self) -> None:
        """Close the connections of the event loop of a blocking call."""
        await self._persistence().leave_loop()

    async def leave(self) -> None:
        """As `close`, at the end of a blocking call: the program goes on."""
        async with AsyncExitStack() as steps:  # from the last to the first; one that fails does not skip the others
            steps.push_async_callback(self.leave_loop)
            steps.push_async_callback(self._writer.flush)
            steps.push_async_callback(self._deliveries.close)
            steps.push_async_callback(self._record_writer.close)
            steps.push_async_callback(self._upkeep.close)

    def scope(
        self,
        mode: Mode = "live",
        run_id: str | None = None,
        when: When | None = None,
        identity: Identity | None = None,
    ) -> Scope:
        """The records of one mode, or of one run of a backtest; with `identity`, as that run itself sees them.

        Raises:
            UserError: a backtest without a run id, or a run id in another mode.
        """
        when_ms = None if when is None else to_ms(when, what="when")
        written = None
        if run_id is not None and identity is not None:
            written = self._written.get((identity, run_id)) or Written()
        return Scope(self._persistence, self._turns, mode, run_id, when_ms, written, is_outside=identity is None)

    def of_run(self, identity: Identity, run_id: str | None) -> RunRecords:
        """The records of a run that begins, for its contexts."""
        written = Written()
        if run_id is not None:
            self._written[identity, run_id] = written
        scope = self.scope(identity.mode, run_id, None, identity)
        return RunRecords(self, scope, identity)

    async def runs(self) -> list[str]:
        """The ids of the backtests that have records. As `Persistence.runs`."""
        return await self._persistence().runs()

    def state(self, bucket: str, **whose: Unpack[Whose]) -> State:
        """The state of a signal, or of a strategy on a symbol of an exchange.

        Raises:
            UserError: neither of the two is named, or the run is not.
        """
        scope, owner = self._of(bucket, **whose)
        return State(scope, bucket, (owner,))

    def memory(self, bucket: str, **whose: Unpack[Whose]) -> Memory:
        """The memory of a signal, or of a strategy on a symbol of an exchange. Raises as `state`."""
        scope, owner = self._of(bucket, **whose)
        return Memory(scope, bucket, (owner,), Shelves())

    def _of(
        self,
        bucket: str,
        *,
        signal_id: str | None = None,
        symbol: str | None = None,
        strategy_name: str | None = None,
        exchange_name: str | None = None,
        **view: Unpack[View],
    ) -> tuple[Scope, str]:
        owner = _owner(bucket, signal_id, strategy_name, exchange_name, symbol)
        return self.scope(**view), owner

    def session(
        self,
        *,
        symbol: str,
        strategy_name: str,
        exchange_name: str,
        frame_name: str = "",
        **view: Unpack[View],
    ) -> Session:
        """The session of a strategy on a symbol.

        Raises:
            UserError: the run is not named.
        """
        scope = self.scope(**view)
        return Session(scope, Identity(symbol, strategy_name, exchange_name, frame_name, scope.mode))


class RunRecords:
    """The records of one run. No store is opened before a record is used."""

    __slots__ = ("_identity", "_keeper", "_owner", "_records", "_scope", "_shelves")

    def __init__(self, records: Records, scope: Scope, identity: Identity) -> None:
        self._records = records
        self._scope = scope
        self._identity = identity
        self._keeper: asyncio.Task[None] | None = None
        self._shelves = Shelves()
        self._owner = strategy_owner(identity.strategy_name, identity.exchange_name, identity.symbol)

    @property
    def run_id(self) -> str | None:
        return self._scope.run_id

    async def begin(self) -> None:
        """The run begins. As `Records.begin`."""
        await self._records.begin(self._identity.mode)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Lock the run against other processes while the block runs.

        Raises:
            Conflict: another process replays it; `take_breath` raises that once the lock is lost.
            Damaged, OutOfSpace, RetryLater: as `Store.put`.
        """
        persistence = self._records._persistence()
        store = persistence.store_for(STATE, "backtest", history=False)
        async with exclusive_run(store, str(self.run_id), self._identity, persistence.seams) as self._keeper:
            yield

    def urge(self, events: Sequence[Event]) -> None:
        """Notify people of events that could not be written yet: the sinks get them without the store."""
        self._records._record_writer.urge(events, self._identity.mode)

    async def observe(self, events: Sequence[Event]) -> None:
        """Record what has happened. The same events may come again. Raises as `Store.put`."""
        await self._records._record_writer.observe(events, self._identity.mode, self._scope.run_id)

    async def take_breath(self) -> None:
        """Yield to other tasks, and wait for the log if it has fallen behind.

        Raises:
            Conflict: another process has taken the run.
        """
        if self._keeper is not None and self._keeper.done():
            self._keeper.result()
        if self._records._writer.crowded:
            # The writer retries a store that rejects lines, logs that, and drops the oldest lines.
            with suppress(BacktestKitError):
                await self._records._writer.flush()
        await asyncio.sleep(0)

    async def settle(self) -> None:
        """Wait until everything that a backtest passed to `observe` is written. Raises as `Store.put`."""
        if self.run_id is not None:
            await self._records._record_writer.settle(self.run_id)

    async def end(self) -> None:
        """The run is over: write its records and its log. Raises as `Store.put`."""
        await self.settle()
        await self._records._writer.flush()

    def log(self, when_ms: int) -> Log:
        return Log(self._records._writer, self._identity, self._scope.run_id, when_ms)

    def state(self, bucket: str, when_ms: int, held_id: str | None, signal_id: str | None, shared: bool) -> State:
        return State(self._scope.at(when_ms), bucket, self._owners(bucket, held_id, signal_id, shared))

    def memory(self, bucket: str, when_ms: int, held_id: str | None, signal_id: str | None, shared: bool) -> Memory:
        owners = self._owners(bucket, held_id, signal_id, shared)
        return Memory(self._scope.at(when_ms), bucket, owners, self._shelves)

    def session(self, when_ms: int) -> Session:
        return Session(self._scope.at(when_ms), self._identity)

    def _owners(self, bucket: str, held_id: str | None, signal_id: str | None, shared: bool) -> tuple[str, ...]:
        """The owner of the record, then the owner whose value it starts with."""
        check_texts((("bucket", bucket),))
        if signal_id is not None:
            if shared:
                raise UserError(f"bucket {bucket!r} is requested as shared and for signal {signal_id!r}: choose one")
            check_texts((("signal_id", signal_id),))
            return (signal_id,)
        return (self._owner,) if shared or held_id is None else (held_id, self._owner)


def _owner(
    bucket: str, signal_id: str | None, strategy_name: str | None, exchange_name: str | None, symbol: str | None
) -> str:
    check_texts((("bucket", bucket),))
    named = (("strategy_name", strategy_name), ("exchange_name", exchange_name), ("symbol", symbol))
    if signal_id is None:
        check_texts(named)
        return strategy_owner(*(str(value) for _, value in named))
    check_texts((("signal_id", signal_id),))
    if any(value is not None for _, value in named):
        raise UserError(
            f"bucket {bucket!r} is requested by signal_id and by strategy: give signal_id alone, "
            "or strategy_name, exchange_name and symbol"
        )
    return signal_id
