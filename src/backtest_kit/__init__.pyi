from .default import (
    Backtest as Backtest,
    Walker as Walker,
    add_exchange_schema as add_exchange_schema,
    add_frame_schema as add_frame_schema,
    add_risk_schema as add_risk_schema,
    add_strategy_schema as add_strategy_schema,
    default_kit as default_kit,
    get_config as get_config,
    list_exchange_schemas as list_exchange_schemas,
    list_frame_schemas as list_frame_schemas,
    list_risk_schemas as list_risk_schemas,
    list_strategy_schemas as list_strategy_schemas,
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
from .model.candle import (
    CandleSeries as CandleSeries,
)
from .model.event import (
    EntryCancelled as EntryCancelled,
    EntryScheduled as EntryScheduled,
    Event as Event,
    Identity as Identity,
    PositionClosed as PositionClosed,
    PositionOpened as PositionOpened,
    RiskRejected as RiskRejected,
)
from .model.position import (
    Entry as Entry,
    Position as Position,
    Reduction as Reduction,
    RestingEntry as RestingEntry,
    Trade as Trade,
)
from .model.signal import (
    Signal as Signal,
)
from .report.comparison import (
    Comparison as Comparison,
    Contender as Contender,
)
from .report.result import (
    BacktestResult as BacktestResult,
    Results as Results,
)
from .report.statistics import (
    Statistics as Statistics,
)
from .run.backtest import (
    BacktestHandle as BacktestHandle,
)
from .run.context import (
    Context as Context,
)
from .run.risk import (
    RiskRequest as RiskRequest,
)
from .run.walker import (
    ParameterSet as ParameterSet,
    WalkProgress as WalkProgress,
)
from .settings import (
    Settings as Settings,
)

__version__: str
__all__: list[str]
