"""`Context`: all that a strategy may know at the minute of a call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime

from backtest_kit.errors import UserError
from backtest_kit.market.history import History
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.identity import Identity, Mode
from backtest_kit.model.interval import to_datetime, to_ms
from backtest_kit.model.price import price_text
from backtest_kit.records import RunRecords
from backtest_kit.records.log import Log
from backtest_kit.records.memory import Memory
from backtest_kit.records.session import Session
from backtest_kit.records.state import State
from backtest_kit.run.run_state import EntryView, PositionView, RunState

HistoryOf = Callable[[str], Awaitable[History]]


class Context:
    """The world at one minute. A stored context still shows its own minute, never a later one."""

    __slots__ = ("_history_of", "_identity", "_records", "entry", "position", "price", "when_ms")

    _identity: Identity
    _history_of: HistoryOf
    _records: RunRecords
    price: float
    """The current price of the symbol: the volume-weighted average of the last closed minutes."""
    when_ms: int
    """Now, in epoch milliseconds; every candle that opened before it is closed."""
    position: PositionView | None
    """The open position and its commands, or None."""
    entry: EntryView | None
    """The resting entry and its commands, or None."""

    def __init__(self, identity: Identity, run_state: RunState, history_of: HistoryOf, records: RunRecords) -> None:
        put = super().__setattr__
        put("_identity", identity)
        put("_history_of", history_of)
        put("_records", records)
        put("when_ms", run_state.tick.when_ms)
        put("price", run_state.tick.price)
        put("position", run_state.position())
        put("entry", run_state.entry())

    @property
    def symbol(self) -> str:
        return self._identity.symbol

    @property
    def strategy_name(self) -> str:
        return self._identity.strategy_name

    @property
    def exchange_name(self) -> str:
        return self._identity.exchange_name

    @property
    def frame_name(self) -> str:
        """Empty when live."""
        return self._identity.frame_name

    @property
    def mode(self) -> Mode:
        return self._identity.mode

    @property
    def run_id(self) -> str | None:
        """The run id of a backtest; None live and on paper, where records continue without one."""
        return self._records.run_id

    @property
    def when(self) -> datetime:
        """Now, as an aware UTC datetime."""
        return to_datetime(self.when_ms)

    async def candles(
        self, interval: str, limit: int, *, symbol: str | None = None, until: datetime | str | int | None = None
    ) -> CandleSeries:
        """The last `limit` closed candles of an interval, as numpy columns, oldest first.

        Their window is aligned: `[A - limit * interval, A)` with A the start of the interval that
        contains now, so the candle that is still forming is never included. `until` moves the end of the
        window back in time; `symbol` reads another market of the same exchange.

        Raises:
            LookAhead: `until` is later than now.
            UserError: unknown interval or symbol, `limit` below 1, or no candles that far back.
        """
        history = await self._history_of(self._identity.symbol if symbol is None else symbol)
        until_ms = None if until is None else to_ms(until, what="until")
        return await history.window(interval, limit, self.when_ms, until_ms=until_ms)

    def state(self, bucket: str, *, signal_id: str | None = None, shared: bool = False) -> State:
        """A value of any kind under a bucket name: `await ctx.state("plan").get(default)`, `.set(...)`, `.update(...)`.

        While a position is open or an entry rests, it belongs to the signal, and starts with the value that the
        strategy set before. Otherwise it belongs to the strategy on this symbol. `shared` always selects the
        strategy's value, `signal_id` that of another signal.

        Raises:
            UserError: `bucket` or `signal_id` is not a text, or both `signal_id` and `shared` are given.
        """
        return self._records.state(bucket, self.when_ms, self._held_id(), signal_id, shared)

    def memory(self, bucket: str, *, signal_id: str | None = None, shared: bool = False) -> Memory:
        """Notes of a model under a bucket name: `write`, `read`, `list`, `search`, `as_messages`, `remove`.

        While a position is open or an entry rests, new notes belong to the signal, and the strategy's earlier notes are
        visible too. Otherwise notes belong to the strategy on this symbol. `shared` always selects the strategy's
        notes alone, `signal_id` those of another signal.

        Raises:
            UserError: `bucket` or `signal_id` is not a text, or both `signal_id` and `shared` are given.
        """
        return self._records.memory(bucket, self.when_ms, self._held_id(), signal_id, shared)

    @property
    def session(self) -> Session:
        """Values that the strategy computed for this symbol and keeps across restarts, such as indicators."""
        return self._records.session(self.when_ms)

    @property
    def log(self) -> Log:
        """The log, with symbol, strategy, mode and this minute: `ctx.log.info("volume is thin", volume=12.5)`."""
        return self._records.log(self.when_ms)

    def _held_id(self) -> str | None:
        if self.position is not None:
            return self.position.signal_id
        return None if self.entry is None else self.entry.value.signal_id

    def __repr__(self) -> str:
        return f"Context({self.symbol!r}, {self.when.isoformat()}, price={price_text(self.price)}, mode={self.mode!r})"

    def __setattr__(self, name: str, value: object) -> None:
        raise UserError(f"ctx.{name} is read-only: a context shows one minute as it was")
