"""One minute of a run, the same in backtest, paper and live: the market, then cron, then the strategy."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from functools import partial
from types import CoroutineType
from typing import Final, Protocol

import msgspec

from backtest_kit.engine.step import Flat, Resting, State, Wanted, activates, admit, decision_due, step
from backtest_kit.engine.validation import check_signal
from backtest_kit.errors import RetryLater, UserError
from backtest_kit.model.decisions import Decisions
from backtest_kit.model.event import (
    BreakevenReached,
    EntryCancelled,
    EntryWaiting,
    Event,
    FallReached,
    LevelReached,
    PeakReached,
    PositionActive,
    Progress,
    RiskRejected,
)
from backtest_kit.model.interval import iso
from backtest_kit.model.signal import Signal
from backtest_kit.records import RunRecords
from backtest_kit.records.unawaited import Calls, forgotten, not_begun, used_unawaited, watch
from backtest_kit.run.context import Context, HistoryOf
from backtest_kit.run.deadline import within
from backtest_kit.run.program import Program
from backtest_kit.run.run_state import RunState
from backtest_kit.run.schema import StrategySchema

ON_DEMAND: Final = (
    PositionActive,
    EntryWaiting,
    LevelReached,
    BreakevenReached,
    PeakReached,
    FallReached,
    Progress,
)
"""Events that are made only if a handler listens: each of them makes a replay stop more often."""


class RiskGate(Protocol):
    """The risk profiles of a run."""

    async def refusal(self, signal: Signal, price: float, when_ms: int) -> tuple[str, str] | None:
        """(profile, reason) of the first validation that rejects the signal, or None if all profiles allow it."""
        ...


class Flags(Protocol):
    """The flags that the handle of a run sets."""

    @property
    def stopping(self) -> bool: ...

    @property
    def paused(self) -> bool: ...


class RunHooks:
    """What a run does around its events, and on errors in the user's code."""

    def on_event(self, event: Event) -> None:
        """Called before an event is published."""

    def on_published(self, event: Event) -> None:
        """Called after all handlers of an event have run."""

    async def on_error(self, what: str, error: Exception) -> None:
        """Called when the user's code raised. Raises the error again if it ends the run."""
        raise error


class Minute:
    """Runs the minute that the run state is at."""

    def __init__(
        self,
        run_state: RunState,
        strategy: StrategySchema,
        program: Program,
        risk_gate: RiskGate | None,
        flags: Flags,
        history_of: HistoryOf,
        records: RunRecords,
        hooks: RunHooks,
    ) -> None:
        self._run_state = run_state
        self._identity = run_state.rules.identity
        self._settings = run_state.rules.settings
        self._strategy = strategy
        self._bus = program.bus
        self._cron = program.cron
        self._risk_gate = risk_gate
        self._flags = flags
        self._history_of = history_of
        self._records = records
        self._hooks = hooks
        self._calls: Calls = {}
        self.decisions = Decisions()
        self._wanted: Wanted = frozenset()
        self._bus_version = -1

    def wanted(self) -> Wanted:
        """The events on demand that have a listener now."""
        if self._bus_version != self._bus.version:
            self._bus_version = self._bus.version
            identity = self._identity
            wanted = {
                kind
                for kind in ON_DEMAND
                if self._bus.wanted(kind, symbol=identity.symbol, strategy_name=identity.strategy_name)
            }
            if self._strategy.manage is not None:
                wanted |= {PositionActive, EntryWaiting}
            self._wanted = frozenset(wanted)
        return self._wanted

    def context(self) -> Context:
        """The context that the user's code gets at this minute."""
        return Context(self._identity, self._run_state, self._history_of, self._records)

    async def act(self, wanted: Wanted, happened: list[Event], *, since_ms: int, settled: bool = False) -> None:
        """Run the minute, publish its events, and add the lasting ones to `happened`.

        The market comes first: no command can undo what this minute's range has touched. Then cron, because a decision
        of the same minute may use its result. The strategy comes last.

        Args:
            since_ms: The previous minute of the run.
            settled: This minute's one transition has been made: nothing else opens or closes.
        """
        run_state = self._run_state
        was_flat = isinstance(run_state.state, Flat)
        if not was_flat and not settled:
            rejected = await self._check_activation()
            for event in (*rejected, *await run_state.apply(partial(self._stepped, wanted, bool(rejected)))):
                await self.publish(event, happened)
        boundary_ms = self._cron.next_boundary(since_ms, self._identity.symbol)
        if boundary_ms is not None and boundary_ms <= run_state.tick.when_ms:
            fire = partial(self._cron.fire, run_state.tick.when_ms, self._identity, self.context(), since_ms=since_ms)
            await self._call("a cron handler", fire)
            await self.publish_commands(happened)
        if was_flat and not settled and isinstance(run_state.state, Flat) and self._asks(run_state.state):
            for event in await self._enter(run_state.state):
                await self.publish(event, happened)
        if self._strategy.manage is not None and not isinstance(run_state.state, Flat):
            await self._call("manage", partial(self._strategy.manage, self.context()))
        if run_state.events:
            await self.publish_commands(happened)

    async def publish(self, event: Event, happened: list[Event]) -> None:
        """Publish an event, and then the events that its handlers' commands caused."""
        hooks = self._hooks
        hooks.on_event(event)
        if isinstance(event, EntryCancelled):
            self.decisions.count(self.decisions.cancelled, event.reason)
        if not isinstance(event, ON_DEMAND):
            happened.append(event)
        if self._bus.listened:
            await self._call("a handler", partial(self._bus.emit, event, self.context(), failed=hooks.on_error))
            hooks.on_published(event)
            await self.publish_commands(happened)
        else:
            hooks.on_published(event)

    async def publish_commands(self, happened: list[Event]) -> None:
        """Publish the events that commands and orders have caused since the last call."""
        for caused in self._run_state.take_events():
            await self.publish(caused, happened)

    def _stepped(self, wanted: Wanted, refused: bool, state: State) -> tuple[State, tuple[Event, ...]]:
        if refused and isinstance(state, Resting):
            state = msgspec.structs.replace(state, order="refuse")
        return step(state, self._run_state.tick, self._run_state.rules, wanted)

    async def _check_activation(self) -> tuple[Event, ...]:
        """Check the risk profiles again when a resting entry is reached: they may have changed since."""
        run_state = self._run_state
        if self._risk_gate is None or not isinstance(run_state.state, Resting):
            return ()
        if not activates(run_state.state, run_state.tick, run_state.rules):
            return ()
        return await self.refusal(run_state.state.entry.signal)

    def _asks(self, state: Flat) -> bool:
        run_state = self._run_state
        return (
            run_state.tick.real
            and not self._flags.paused
            and decision_due(state, run_state.tick.when_ms, run_state.rules)
        )

    async def _enter(self, state: Flat) -> tuple[Event, ...]:
        """Call the strategy, check its signal and the risk profiles, and act on it."""
        run_state, signal, rejected = self._run_state, None, tuple[Event, ...]()
        try:
            self.decisions.called += 1
            signal = await self._ask()
            if signal is None:
                self.decisions.returned_none += 1
            if self._flags.stopping:
                signal = None
            if signal is not None:
                check_signal(signal, self._identity, run_state.tick.price, run_state.tick.when_ms, self._settings)
                rejected = await self.refusal(signal)
        except Exception as error:
            await self._hooks.on_error("get_signal", error)
            if isinstance(error, RetryLater):
                return ()  # the store or exchange may answer again at the next minute
            # The slot is used up all the same: the strategy would raise again at every minute.
            signal = None
        admitted = await run_state.apply(partial(self._admitted, None if rejected else signal))
        if signal is not None and not rejected and not admitted and signal.id == state.last_signal_id:
            self.decisions.repeated += 1
        return (*rejected, *admitted)

    def _admitted(self, signal: Signal | None, state: State) -> tuple[State, tuple[Event, ...]]:
        if not isinstance(state, Flat):
            return state, ()
        return admit(state, signal, self._run_state.tick, self._run_state.rules)

    async def refusal(self, signal: Signal) -> tuple[Event, ...]:
        """The event of a risk profile that rejects the signal; none if all allow it."""
        if self._risk_gate is None:
            return ()
        tick = self._run_state.tick
        refusal = await self._risk_gate.refusal(signal, tick.price, tick.when_ms)
        if refusal is None:
            return ()
        risk_name, reason = refusal
        self.decisions.count(self.decisions.rejected, risk_name)
        return (
            RiskRejected(
                identity=self._identity,
                when_ms=tick.when_ms,
                price=tick.price,
                signal=signal,
                risk_name=risk_name,
                reason=reason,
            ),
        )

    async def _ask(self) -> Signal | None:
        strategy, context = self._strategy, self.context()
        seconds = self._settings.CC_MAX_SIGNAL_GENERATION_SECONDS
        deadline = asyncio.timeout(seconds)
        try:
            answer = await self._by_user("get_signal", partial(strategy.get_signal, context), deadline)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise UserError(
                f"{self._place('get_signal')} took longer than {seconds:g} s: "
                "raise CC_MAX_SIGNAL_GENERATION_SECONDS or do less"
            ) from None
        if answer is None or isinstance(answer, Signal):
            return answer
        raise UserError(f"{self._place('get_signal')} returned {answer!r}: return a backtest_kit.Signal or None")

    async def _call(self, what: str, call: Callable[[], object]) -> None:
        try:
            await self._by_user(what, call)
        except Exception as error:
            await self._hooks.on_error(what, error)

    async def _by_user(self, what: str, call: Callable[[], object], deadline: asyncio.Timeout | None = None) -> object:
        """What the user's function returns, awaited if it is a coroutine.

        Raises:
            UserError: it raised an exception that would end the event loop or the process, or forgot an `await`.
            Exception: any other error that it raised.
        """
        watch(self._calls)
        try:
            answer = call()
            if type(answer) is CoroutineType or inspect.isawaitable(answer):
                answer = await (answer if deadline is None else within(deadline, answer))
            if self._calls and (lost := forgotten(self._calls)):
                raise UserError(
                    f"{self._place(what)} did not await {lost}, so it was never carried out: write `await` before it"
                )
            return answer
        except (AttributeError, TypeError) as error:
            pending = not_begun(self._calls) or used_unawaited(error)
            if not pending:
                raise
            raise UserError(
                f"{self._place(what)} used the answer of {pending} without awaiting it: "
                "write `await` before the call, as in `(await ctx.candles('15m', 50)).close`"
            ) from error
        except (StopIteration, StopAsyncIteration, SystemExit) as error:
            raise UserError(f"{self._place(what)} raised {type(error).__name__}") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise UserError(f"{self._place(what)} raised CancelledError, but nothing had cancelled it") from error

    def _place(self, what: str) -> str:
        identity = self._identity
        when = iso(self._run_state.tick.when_ms)
        return f"{what} of strategy {identity.strategy_name!r} for {identity.symbol} at {when}"
