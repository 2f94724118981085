from .broker.base import (
    Broker as Broker,
    Fill as Fill,
    Order as Order,
    OrderDeleted as OrderDeleted,
    OrderRejected as OrderRejected,
    OrderReport as OrderReport,
    OrderTransient as OrderTransient,
    VenuePosition as VenuePosition,
    VenueSignal as VenueSignal,
)
from .broker.ccxt import (
    CcxtBroker as CcxtBroker,
)
from .broker.paper import (
    PaperBroker as PaperBroker,
)
from .default import (
    Backtest as Backtest,
    Live as Live,
    PersistBreakevenAdapter as PersistBreakevenAdapter,
    PersistCandleAdapter as PersistCandleAdapter,
    PersistIntervalAdapter as PersistIntervalAdapter,
    PersistLogAdapter as PersistLogAdapter,
    PersistMeasureAdapter as PersistMeasureAdapter,
    PersistMemoryAdapter as PersistMemoryAdapter,
    PersistNotificationAdapter as PersistNotificationAdapter,
    PersistPartialAdapter as PersistPartialAdapter,
    PersistRecentAdapter as PersistRecentAdapter,
    PersistRiskAdapter as PersistRiskAdapter,
    PersistScheduleAdapter as PersistScheduleAdapter,
    PersistSessionAdapter as PersistSessionAdapter,
    PersistSignalAdapter as PersistSignalAdapter,
    PersistStateAdapter as PersistStateAdapter,
    PersistStorageAdapter as PersistStorageAdapter,
    PersistStrategyAdapter as PersistStrategyAdapter,
    Walker as Walker,
    add_exchange_schema as add_exchange_schema,
    add_frame_schema as add_frame_schema,
    add_risk_schema as add_risk_schema,
    add_strategy_schema as add_strategy_schema,
    cron as cron,
    default_kit as default_kit,
    get_config as get_config,
    interval as interval,
    list_exchange_schemas as list_exchange_schemas,
    list_frame_schemas as list_frame_schemas,
    list_risk_schemas as list_risk_schemas,
    list_strategy_schemas as list_strategy_schemas,
    measure as measure,
    on as on,
    remove_cron as remove_cron,
    set_config as set_config,
)
from .engine import (
    sizing as sizing,
)
from .errors import (
    BacktestKitError as BacktestKitError,
    Conflict as Conflict,
    Damaged as Damaged,
    LookAhead as LookAhead,
    Outcome as Outcome,
    OutOfSpace as OutOfSpace,
    RetryLater as RetryLater,
    UserError as UserError,
)
from .kit import (
    Kit as Kit,
)
from .market import (
    sources as sources,
)
from .market.clock import (
    AcceleratedClock as AcceleratedClock,
    Clock as Clock,
    SteppedClock as SteppedClock,
    SystemClock as SystemClock,
)
from .model.candle import (
    CandleSeries as CandleSeries,
)
from .model.decisions import (
    Decisions as Decisions,
)
from .model.event import (
    BreakevenReached as BreakevenReached,
    ClockJumped as ClockJumped,
    EntryCancelled as EntryCancelled,
    EntryScheduled as EntryScheduled,
    EntryWaiting as EntryWaiting,
    Event as Event,
    FallReached as FallReached,
    LevelReached as LevelReached,
    MarketEvent as MarketEvent,
    MinutesMissed as MinutesMissed,
    OrderFailed as OrderFailed,
    OrphanFound as OrphanFound,
    Paused as Paused,
    PeakReached as PeakReached,
    PositionActive as PositionActive,
    PositionChanged as PositionChanged,
    PositionClosed as PositionClosed,
    PositionOpened as PositionOpened,
    Progress as Progress,
    Recovered as Recovered,
    RiskRejected as RiskRejected,
    RunDone as RunDone,
    RunFailed as RunFailed,
    StoreDegraded as StoreDegraded,
    StoreRecovered as StoreRecovered,
    StrategyFailed as StrategyFailed,
)
from .model.identity import (
    Identity as Identity,
)
from .model.position import (
    Entry as Entry,
    Position as Position,
    Reduction as Reduction,
    RestingEntry as RestingEntry,
    Trade as Trade,
)
from .model.setup import (
    Setup as Setup,
)
from .model.signal import (
    Signal as Signal,
)
from .persist.backends.dummy import (
    DummyStore as DummyStore,
)
from .persist.backends.file import (
    FileStore as FileStore,
)
from .persist.backends.memory import (
    MemoryStore as MemoryStore,
)
from .persist.backends.sqlite import (
    SqliteStore as SqliteStore,
)
from .persist.binding import (
    Persistence as Persistence,
)
from .records import (
    sinks as sinks,
)
from .records.log import (
    Log as Log,
    LogLine as LogLine,
)
from .records.memory import (
    Memory as Memory,
    MemoryEntry as MemoryEntry,
)
from .records.notification import (
    Notification as Notification,
)
from .records.session import (
    Session as Session,
)
from .records.signals import (
    StoredSignal as StoredSignal,
)
from .records.state import (
    State as State,
)
from .report.comparison import (
    Comparison as Comparison,
)
from .report.ranking import (
    Contender as Contender,
)
from .report.result import (
    BacktestResult as BacktestResult,
    Results as Results,
)
from .report.statistics import (
    Statistics as Statistics,
)
from .run.context import (
    Context as Context,
)
from .run.cron import (
    CronTick as CronTick,
)
from .run.live.runner import (
    LiveHandle as LiveHandle,
    LiveOptions as LiveOptions,
)
from .run.live.status import (
    LiveStatus as LiveStatus,
)
from .run.replay.backtest import (
    BacktestHandle as BacktestHandle,
    BacktestOptions as BacktestOptions,
    ReplayOptions as ReplayOptions,
)
from .run.replay.walker import (
    ParameterSet as ParameterSet,
    WalkProgress as WalkProgress,
)
from .run.risk_request import (
    ActivePosition as ActivePosition,
    RiskRequest as RiskRequest,
)
from .run.run_state import (
    CommandOutcome as CommandOutcome,
    EntryView as EntryView,
    PositionView as PositionView,
)
from .settings import (
    Settings as Settings,
)

__version__: str
__all__: list[str]
