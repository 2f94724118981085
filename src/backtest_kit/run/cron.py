"""Work at the boundaries of candles, in the time of the runs: once per boundary, however many symbols run."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import datetime
from typing import Final

import msgspec

from backtest_kit.errors import UserError
from backtest_kit.events import Handler, Listener, as_listener
from backtest_kit.model.identity import Identity, Mode
from backtest_kit.model.interval import MINUTE_MS, floor_ms, interval_ms, iso, to_datetime
from backtest_kit.run.schema import check_name

_ScopeKey = tuple[asyncio.AbstractEventLoop, str, Mode]


class CronTick(msgspec.Struct, frozen=True, kw_only=True):
    """A boundary that a run has reached."""

    name: str
    when_ms: int
    """The boundary: now, in the time of the run."""
    interval: str
    identity: Identity
    """The run that reached it first."""

    @property
    def when(self) -> datetime:
        return to_datetime(self.when_ms)

    @property
    def symbol(self) -> str:
        return self.identity.symbol


class _Job(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    name: str
    interval: str
    step_ms: int
    listener: Listener[CronTick]
    symbols: frozenset[str] | None

    def concerns(self, symbol: str) -> bool:
        return self.symbols is None or symbol in self.symbols


class _Round:
    """One running job at one boundary."""

    __slots__ = ("done", "error", "when_ms")

    def __init__(self, when_ms: int) -> None:
        self.when_ms = when_ms
        self.done = asyncio.Event()
        self.error: Exception | None = None


class _Progress:
    """The last boundary of one job, for one scope and, if it runs per symbol, one symbol."""

    __slots__ = ("last_ms", "under_way")

    def __init__(self) -> None:
        self.last_ms: int | None = None
        self.under_way: _Round | None = None


class _Scope:
    """The runs that replay one frame at the same time, or all live runs."""

    __slots__ = ("progress", "runs")

    def __init__(self) -> None:
        self.runs = 0
        self.progress: dict[tuple[_Job, str | None], _Progress] = {}


_FIRING: Final[ContextVar[tuple[_Round, ...]]] = ContextVar("backtest_kit_cron_firing", default=())


class Cron:
    """Jobs that run at aligned boundaries of a run's own time.

    Runs of the same frame and mode on one event loop share a scope. Within it a job runs once per boundary, in the run
    that reaches the boundary first, and boundaries only grow: a slower run skips them. A job with `symbols` runs once
    per boundary for each of these symbols. When the last run of a scope has ended, the next one starts over.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._scopes: dict[_ScopeKey, _Scope] = {}

    def add(
        self, name: str, *, interval: str, handler: Handler[CronTick], symbols: Iterable[str] | None = None
    ) -> None:
        """Register a job. Do so before the runs start: runs that start without any job do not wait for each other.

        Args:
            interval: 1m to 1d; boundaries are aligned to UTC.
            handler: A function of `(tick)` or `(tick, ctx)`, sync or async. Its error is raised in the runs that
                reached the boundary and stops a backtest; the boundary does not count as done.
            symbols: Run it for each of these symbols, instead of once for all symbols together.

        Raises:
            UserError: the name is taken or empty, the interval is unknown, or an argument is wrong.
        """
        if check_name("name of a cron job", name) in self._jobs:
            raise UserError(f"cron job {name!r} is already registered: choose another name, or remove it first")
        step_ms = interval_ms(interval, what=f"interval of cron job {name!r}")
        if isinstance(symbols, str):
            raise UserError(f"symbols of cron job {name!r} is the text {symbols!r}: give a list")
        chosen = None if symbols is None else frozenset(check_name("symbol", each) for each in symbols)
        if chosen is not None and not chosen:
            raise UserError(f"symbols of cron job {name!r} is empty: name some, or leave it out for all together")
        self._jobs[name] = _Job(
            name=name,
            interval=interval,
            step_ms=step_ms,
            listener=as_listener(handler, given="tick"),
            symbols=chosen,
        )

    def remove(self, name: str) -> None:
        """Remove a job. Added again, it starts over.

        Raises:
            UserError: the job is not registered.
        """
        if self._jobs.pop(name, None) is None:
            known = ", ".join(repr(each) for each in self._jobs) or "none"
            raise UserError(f"cron job {name!r} is not registered (registered: {known})")

    def __bool__(self) -> bool:
        """Whether there is any job."""
        return bool(self._jobs)

    def begin(self, identity: Identity) -> None:
        """Register a run of this identity. Each call is paired with one of `end`."""
        self._scopes.setdefault(_scope_of(identity), _Scope()).runs += 1

    def end(self, identity: Identity) -> None:
        """Unregister a run of this identity, however it ended."""
        key = _scope_of(identity)
        self._scopes[key].runs -= 1
        if not self._scopes[key].runs:
            del self._scopes[key]

    def next_boundary(self, when_ms: int, symbol: str) -> int | None:
        """The first boundary after `when_ms` of any job that concerns `symbol`: a minute that a run must visit."""
        if not self._jobs:
            return None
        steps = [job.step_ms for job in self._jobs.values() if job.concerns(symbol)]
        return min((floor_ms(when_ms, step_ms) + step_ms for step_ms in steps), default=None)

    async def fire(self, when_ms: int, identity: Identity, ctx: object = None, *, since_ms: int | None = None) -> None:
        """Run, in order, the jobs that have a boundary at `when_ms` and that no run of the scope has run yet.

        `since_ms` is the previous minute of the run, by default one minute earlier. Where it is earlier than that,
        because minutes are missing, a job with a boundary among them runs now, for the last of them.

        Of several runs at one boundary, the first runs the job; the others wait for it and share its error.

        Raises:
            UserError: the run was started by the job that it would wait for.
            Exception: what a handler raises; this run does not run the jobs after it.
        """
        since_ms = when_ms - MINUTE_MS if since_ms is None else since_ms
        for job in tuple(self._jobs.values()):
            boundary_ms = floor_ms(when_ms, job.step_ms)
            if boundary_ms > since_ms and job.concerns(identity.symbol):
                scope = self._scopes[_scope_of(identity)]
                symbol = None if job.symbols is None else identity.symbol
                progress = scope.progress.setdefault((job, symbol), _Progress())
                await _perform(job, progress, boundary_ms, identity, ctx)


def _scope_of(identity: Identity) -> _ScopeKey:
    return asyncio.get_running_loop(), identity.frame_name, identity.mode


async def _perform(job: _Job, progress: _Progress, when_ms: int, identity: Identity, ctx: object) -> None:
    """Run the job at this boundary, unless it has run; wait first for a run of it that has started."""
    while (current := progress.under_way) is not None and current.when_ms <= when_ms:
        if current in _FIRING.get():
            raise UserError(
                f"cron job {job.name!r} would wait for itself: a run that its handler started has come to "
                f"{iso(when_ms)} of the same frame. Give that run a frame of its own, or start it outside of the job"
            )
        await current.done.wait()
        if current.when_ms == when_ms and current.error is not None:
            raise current.error
    if current is not None or (progress.last_ms is not None and when_ms <= progress.last_ms):
        return
    current = progress.under_way = _Round(when_ms)
    _FIRING.set((*(each for each in _FIRING.get() if not each.done.is_set()), current))
    try:
        tick = CronTick(name=job.name, when_ms=when_ms, interval=job.interval, identity=identity)
        answer = job.listener(tick, ctx)
        if inspect.isawaitable(answer):
            await answer
        progress.last_ms = when_ms
    except Exception as error:
        current.error = error
        raise
    finally:
        # Also when cancelled: the boundary is free again, and one of the waiting runs takes it.
        progress.under_way = None
        current.done.set()
