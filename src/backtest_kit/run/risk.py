"""Risk profiles: the positions under each of them, and whether another one is allowed."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable, Sequence

from backtest_kit.errors import UserError
from backtest_kit.model.identity import Identity
from backtest_kit.model.position import Position, RestingEntry
from backtest_kit.model.signal import Signal
from backtest_kit.run.lockstep import Lockstep
from backtest_kit.run.risk_request import ActivePosition, RiskRequest
from backtest_kit.run.schema import RiskSchema

_Scope = tuple[asyncio.AbstractEventLoop, str, str]
_Profile = tuple[str, str]
"""Exchange and risk profile names."""


class RiskGroup:
    """The runs of one frame that share a clock, and their positions under each risk profile."""

    def __init__(self) -> None:
        self.lockstep = Lockstep()
        self._held: dict[_Profile, dict[int, ActivePosition]] = {}

    def positions(self, profile: _Profile, but: int) -> tuple[ActivePosition, ...]:
        return tuple(each for member, each in self._held.get(profile, {}).items() if member != but)

    def hold(self, profiles: Iterable[_Profile], member: int, position: ActivePosition) -> None:
        for profile in profiles:
            self._held.setdefault(profile, {})[member] = position

    def release(self, profiles: Iterable[_Profile], member: int) -> None:
        for profile in profiles:
            self._held.get(profile, {}).pop(member, None)


class RiskBook:
    """The risk groups of a kit. A group exists while it has a run."""

    def __init__(self) -> None:
        self._groups: dict[_Scope, RiskGroup] = {}

    def join(self, identity: Identity, risks: Sequence[RiskSchema], start_ms: int) -> RiskSeat:
        """Join before the first minute, so that no other run gets ahead of this one."""
        # Runs of two loops cannot wait for each other: each loop is a market of its own.
        scope = (asyncio.get_running_loop(), identity.frame_name, identity.mode)
        group = self._groups.setdefault(scope, RiskGroup())
        return RiskSeat(self, scope, group, identity, risks, group.lockstep.join(start_ms))

    def close_group(self, scope: _Scope, group: RiskGroup) -> None:
        if not len(group.lockstep) and self._groups.get(scope) is group:
            del self._groups[scope]


class RiskSeat:
    """One run's place in its risk group.

    A check and the reservation that follows it are one step: between `turn` and the next `turn` of
    this seat no other run of the group acts.
    """

    def __init__(
        self,
        book: RiskBook,
        scope: _Scope,
        group: RiskGroup,
        identity: Identity,
        risks: Sequence[RiskSchema],
        member: int,
    ) -> None:
        self._book = book
        self._scope = scope
        self._group = group
        self._identity = identity
        self._risks = risks
        self._profiles: list[_Profile] = [(identity.exchange_name, risk.name) for risk in risks]
        self._member = member

    def enter(self) -> None:
        """Mark this task, and the tasks it starts, as part of the run."""
        self._group.lockstep.enter(self._member)

    async def turn(self, when_ms: int) -> None:
        """Wait until every other run of the group is past `when_ms`, or behind this one in line."""
        await self._group.lockstep.turn(self._member, when_ms)

    async def refusal(self, signal: Signal, price: float, when_ms: int) -> tuple[str, str] | None:
        """(profile, reason) of the first validation that rejects the signal, or None if all profiles allow it.

        Raises:
            UserError: a validation returned something else than a text or None.
        """
        for risk, profile in zip(self._risks, self._profiles, strict=True):
            positions = self._group.positions(profile, self._member)
            reason = await judge(risk, self._identity, signal, price, when_ms, positions)
            if reason:
                return risk.name, reason
        return None

    def hold(self, held: Position | RestingEntry) -> None:
        """Count a position or a resting entry under every profile of the run."""
        position = active(held)
        self._group.hold(self._profiles, self._member, position)

    def release(self) -> None:
        """Stop counting this run under its profiles."""
        self._group.release(self._profiles, self._member)

    def leave(self) -> None:
        """Leave the group. Idempotent."""
        self.release()
        self._group.lockstep.leave(self._member)
        self._book.close_group(self._scope, self._group)


async def judge(
    risk: RiskSchema,
    identity: Identity,
    signal: Signal,
    price: float,
    when_ms: int,
    positions: tuple[ActivePosition, ...],
) -> str:
    """The reason of the first validation that rejects the signal; empty if all allow it.

    Raises:
        UserError: a validation returned something else than a text or None.
    """
    request = RiskRequest(identity=identity, signal=signal, price=price, when_ms=when_ms, positions=positions)
    for validation in risk.validations:
        answer = validation(request)
        if inspect.isawaitable(answer):
            answer = await answer
        if answer is not None and not isinstance(answer, str):
            raise UserError(
                f"a validation of risk {risk.name!r} returned {answer!r}: return the reason for a rejection, or None"
            )
        if answer:
            return answer
    return ""


def active(held: Position | RestingEntry) -> ActivePosition:
    """How a position or a resting entry counts under a risk profile."""
    if isinstance(held, Position):
        return ActivePosition(entry=held.entry, cost=held.cost, opened_at_ms=held.opened_at_ms)
    return ActivePosition(entry=held, cost=held.cost, opened_at_ms=held.scheduled_at_ms)
