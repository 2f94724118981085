"""`Kit`: all state of one program. Two kits in one process never see each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from backtest_kit.broker.base import Broker
from backtest_kit.errors import UserError
from backtest_kit.events import EventBus
from backtest_kit.market.clock import Clock
from backtest_kit.market.sources import CandleSource
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import CandleStore, Store
from backtest_kit.persist.urls import store_at
from backtest_kit.records import Records
from backtest_kit.run.cron import Cron
from backtest_kit.run.feeds import Feeds
from backtest_kit.run.program import Program
from backtest_kit.run.replay.backtest import BacktestRunner
from backtest_kit.run.replay.walker import Walker
from backtest_kit.run.risk_request import RiskValidation
from backtest_kit.run.schema import (
    ExchangeSchema,
    FrameSchema,
    GetSignal,
    Manage,
    Registry,
    RiskSchema,
    StrategySchema,
    exchange_schema,
    frame_schema,
    risk_schema,
    strategy_schema,
)
from backtest_kit.seams import SYSTEM, Seams
from backtest_kit.settings import Settings, from_environment, with_settings

if TYPE_CHECKING:
    from backtest_kit.persist.binding import Persistence
    from backtest_kit.run.live.runner import LiveRunner


class Kit:
    """Schemas, settings and storage of one program.

    The functions of the package (`backtest_kit.add_strategy_schema`, ...) and `backtest_kit.Backtest`
    act on a default kit; a library or a test creates its own.

    Args:
        dump: The directory of files: candles, records, reports.
        now_ms: The clock of the market, in epoch milliseconds.
        seams: The machine's time and randomness, used by leases: a simulation passes its own.
    """

    def __init__(
        self,
        dump: str | os.PathLike[str] = "./dump",
        *,
        now_ms: Callable[[], int] | None = None,
        seams: Seams = SYSTEM,
    ) -> None:
        self._dump = Path(dump)
        self._registry = Registry()
        self._seams = seams
        self._settings: Settings | None = None
        self._persistence: Persistence | None = None
        self._files_in_use = False
        bus, cron = EventBus(), Cron()
        self.on = bus.on
        self.events = bus.events
        self.cron = cron.add
        self.remove_cron = cron.remove
        self.records = Records(lambda: self.persistence, self.get_config)
        self._live: LiveRunner | None = None
        feeds = Feeds(self._registry, self._candle_store, now_ms or seams.wall_ms)
        self._program = Program(self._registry, feeds, bus, cron, self.records, self.get_config)
        self.backtest = BacktestRunner(self._program, now_ms or seams.wall_ms, lambda: self._dump / "backtest")
        self.walker = Walker(self.backtest, lambda: self._dump / "walker")

    @property
    def live(self) -> LiveRunner:
        """Runs strategies on a live market, with real orders or on paper."""
        if self._live is None:
            from backtest_kit.run.live.runner import LiveRunner

            self._live = LiveRunner(self._program, lambda: self.persistence, lambda: self._dump)
        return self._live

    @property
    def dump(self) -> Path:
        """The directory of files. To move it, set it before the first run or binding."""
        return self._dump

    @dump.setter
    def dump(self, path: str | os.PathLike[str]) -> None:
        if self._files_in_use:
            raise UserError(f"files are already in use in {self._dump}: set dump to {path} before the first run")
        self._dump = Path(path)

    @property
    def persistence(self) -> Persistence:
        """The store of each contract: `kit.persistence.bind("*", store)`, and a front door per contract.

        Without a binding it is the store at the address in the environment variable CC_STORE, such as
        `sqlite:bot.db`, or else the files under `dump`.

        Raises:
            UserError: CC_STORE is not the address of a store.
        """
        if self._persistence is None:
            from backtest_kit.persist.binding import Persistence

            self._persistence = Persistence(files=self._file_store, environ=os.environ, seams=self._seams)
        return self._persistence

    async def close(self) -> None:
        """Deliver notifications, write pending records, then flush and close every store in use."""
        try:
            await self.records.close()
        finally:
            if self._persistence is not None:
                await self._persistence.close()

    def add_exchange_schema(
        self,
        exchange_name: str,
        *,
        source: CandleSource,
        broker: Broker | None = None,
        clock: Clock | None = None,
        note: str = "",
        replace: bool = False,
    ) -> None:
        """Register an exchange and the source of its candles: one of `backtest_kit.sources`.

        Candles of a source that is not a local file are cached under the exchange's name, so one name
        stands for one market. `replace=True` overwrites an exchange of that name.

        Args:
            broker: Sends the orders of live runs to the exchange; paper runs and backtests need none.
            clock: The time of the exchange; by default the wall clock of this machine.

        Raises:
            UserError: the name is taken or empty, or another argument has the wrong type.
        """
        self._registry.exchanges.add(exchange_schema(exchange_name, source, broker, clock, note), replace=replace)

    def add_frame_schema(
        self,
        frame_name: str,
        *,
        start_date: datetime | str | int,
        end_date: datetime | str | int,
        interval: str = "1m",
        note: str = "",
        replace: bool = False,
    ) -> None:
        """Register a stretch of time to replay, from `start_date` to `end_date`, both included.

        Dates are aware datetimes, ISO texts (UTC if they name no zone) or epoch milliseconds.
        `interval` is the grid on which decisions may fall; positions are watched every minute anyway.

        Raises:
            UserError: the name is taken or empty, the dates cannot be read or are in the wrong order, or the
                interval is unknown.
        """
        self._registry.frames.add(frame_schema(frame_name, interval, start_date, end_date, note), replace=replace)

    def add_strategy_schema(
        self,
        strategy_name: str,
        *,
        get_signal: GetSignal,
        manage: Manage | None = None,
        interval: str = "1m",
        risk_name: str | None = None,
        risk_names: Iterable[str] = (),
        note: str = "",
        replace: bool = False,
    ) -> None:
        """Register a strategy.

        Args:
            get_signal: `async def get_signal(ctx: Context) -> Signal | None`, or the same without async.
                While no position is open, it is called once in each aligned slot of `interval`.
            manage: `async def manage(ctx: Context) -> None`, or the same without async. It is called at every
                minute in which a position is open (`ctx.position`) or an entry rests (`ctx.entry`), and gives
                its commands there.
            interval: 1m, 3m, 5m, 15m, 30m or 1h.
            risk_name, risk_names: Risk profiles, all of which must allow a signal.

        Raises:
            UserError: the name is taken or empty, the interval is unknown, or `get_signal` is not a function.
        """
        schema = strategy_schema(strategy_name, interval, get_signal, manage, risk_name, risk_names, note)
        self._registry.strategies.add(schema, replace=replace)

    def add_risk_schema(
        self, risk_name: str, *, validations: Sequence[RiskValidation], note: str = "", replace: bool = False
    ) -> None:
        """Register a risk profile: functions that take a `RiskRequest` and return the reason to reject it, or None.

        Raises:
            UserError: the name is taken or empty, or a validation is not a function.
        """
        self._registry.risks.add(risk_schema(risk_name, validations, note), replace=replace)

    def list_exchange_schemas(self) -> list[ExchangeSchema]:
        """The registered exchanges, in the order of their registration."""
        return self._registry.exchanges.all()

    def list_frame_schemas(self) -> list[FrameSchema]:
        """The registered frames, in the order of their registration."""
        return self._registry.frames.all()

    def list_strategy_schemas(self) -> list[StrategySchema]:
        """The registered strategies, in the order of their registration."""
        return self._registry.strategies.all()

    def list_risk_schemas(self) -> list[RiskSchema]:
        """The registered risk profiles, in the order of their registration."""
        return self._registry.risks.all()

    def get_config(self) -> Settings:
        """The settings in force: defaults, then CC_* environment variables, then `set_config`.

        Raises:
            UserError: an environment variable has a bad value.
        """
        if self._settings is None:
            self._settings = from_environment(os.environ)
        return self._settings

    def set_config(self, **changes: object) -> None:
        """Change settings by name, such as `set_config(CC_PERCENT_FEE=0.05)`. Running backtests keep theirs.

        Raises:
            UserError: unknown names, bad values or contradictions, all in one message; nothing is changed.
        """
        self._settings = with_settings(self.get_config(), changes)

    def _file_store(self) -> Store:
        self._files_in_use = True
        return store_at(f"file:{self._dump}")

    def _candle_store(self) -> CandleStore:
        return self.persistence.store_for(CONTRACTS["candle"], "backtest").candles
