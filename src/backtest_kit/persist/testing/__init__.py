"""What the authors of stores test with.

`from backtest_kit.persist.testing import StoreConformance` needs pytest and pytest-asyncio; the rest of
this package does not, which is why the name is looked up only when somebody asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backtest_kit.persist.testing.conformance import StoreConformance

__all__ = ["StoreConformance"]


def __getattr__(name: str) -> Any:
    if name != "StoreConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    pytest.register_assert_rewrite(f"{__name__}.harness", *(f"{__name__}.{part}_cases" for part in _PARTS))
    from backtest_kit.persist.testing.conformance import StoreConformance

    return StoreConformance


_PARTS = ("record", "value", "change", "scan", "prune", "life", "candle", "look_ahead")
