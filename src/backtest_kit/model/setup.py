"""What a result was computed from: shows whether two results can be compared."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Setup(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The options, costs, versions and inputs of a run. Digests are the first 16 hex digits of a SHA-256."""

    fill: str = ""
    """The fill model."""
    gaps: str = ""
    """What was done about missing minutes: "error" or "fill"."""
    dirty: str = ""
    """What was done about bad rows of the source: "refuse" or "repair"."""
    fee_pct: float = 0.0
    """Fee of each fill, in percent of its value."""
    slippage_pct: float = 0.0
    """Slippage of each fill, in percent of the price."""
    settings: Mapping[str, float | int | bool | str] = {}
    """The CC_* settings that differ from their defaults."""
    versions: Mapping[str, str] = {}
    """Of backtest-kit, Python and numpy."""
    strategy_digest: str = ""
    """Of the source of `get_signal` and `manage`, or of their code without a source. What they call or close
    over is not in it."""
    candles_digest: str = ""
    """Of all 1-minute candles of the symbol that were read, history before the frame included."""
