"""Risk profiles: functions that may refuse a signal before it is acted on."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from backtest_kit.errors import UserError
from backtest_kit.model.event import Identity
from backtest_kit.model.signal import Signal

if TYPE_CHECKING:
    from backtest_kit.run.schema import RiskSchema


class RiskRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a validation judges."""

    identity: Identity
    signal: Signal
    price: float
    """The current price."""
    when_ms: int

    @property
    def price_open(self) -> float:
        """Where the position would be entered."""
        return self.price if self.signal.price_open is None else self.signal.price_open


RiskValidation = Callable[[RiskRequest], Awaitable[str | None] | str | None]
"""Returns why the signal is refused, or None (or an empty text) to allow it; may be async."""


async def first_refusal(risk: RiskSchema, request: RiskRequest) -> str | None:
    """The reason of the first validation that refuses, or None if all of them allow.

    Raises:
        UserError: a validation returned something else than a text or None.
    """
    for validation in risk.validations:
        answer = validation(request)
        if inspect.isawaitable(answer):
            answer = await answer
        if answer is not None and not isinstance(answer, str):
            raise UserError(
                f"a validation of risk {risk.name!r} returned {answer!r}: return the reason of a refusal, or None"
            )
        if answer:
            return answer
    return None
