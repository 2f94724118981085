"""Risk profiles of live runs: shared by every process on one store, through the `risk` contract.

A profile is one record: who holds what, by position. A check and the reservation that follows it are one step:
the reservation expects the revision that the check has seen, and is written in the same batch as the order's
intent, in all profiles or in none.
"""

from __future__ import annotations

from collections.abc import Sequence

from backtest_kit.errors import Damaged
from backtest_kit.model.event import Identity, Mode
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.model.position import Position, RestingEntry
from backtest_kit.model.signal import Signal
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.codec import decode_as, encode
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.keys import path_of
from backtest_kit.persist.store import ABSENT, Key, Plain, Write
from backtest_kit.run.risk import ActivePosition, active, judge
from backtest_kit.run.schema import RiskSchema

_RISK = CONTRACTS["risk"]

_Slots = dict[str, ActivePosition]


class LiveRisk:
    """One position's place under its risk profiles."""

    def __init__(
        self,
        persistence: Persistence,
        mode: Mode,
        identity: Identity,
        risks: Sequence[RiskSchema],
        scope: Key,
        patience_minutes: float,
    ) -> None:
        """`patience_minutes` is how long a slot stays beyond the life of its position: an entry may rest before."""
        self._persistence = persistence
        self._mode = mode
        self._identity = identity
        self._risks = risks
        self._patience_ms = patience_minutes * MINUTE_MS
        self._own = "/".join(path_of(CONTRACTS["signal"], scope))
        self._seen: dict[str, tuple[int, _Slots]] = {}
        """Revision (0 for none) and slots of each profile, as read last."""
        self._asked: tuple[Signal, float, int] | None = None

    async def refusal(self, signal: Signal, price: float, when_ms: int) -> tuple[str, str] | None:
        """(profile, reason) of the first validation that refuses, or None if all profiles allow.

        Raises:
            UserError: a validation returned something else than a text or None.
            Damaged, RetryLater: a profile could not be read.
        """
        self._asked = signal, price, when_ms
        for risk in self._risks:
            slots = await self._read(risk.name)
            others = tuple(self._others(slots, when_ms).values())
            reason = await judge(risk, self._identity, signal, price, when_ms, others)
            if reason:
                return risk.name, reason
        return None

    async def ask_again(self) -> tuple[str, str] | None:
        """The last question once more: somebody has changed a profile since."""
        if self._asked is None:
            await self.read()
            return None
        return await self.refusal(*self._asked)

    async def read(self) -> None:
        """Take in how all profiles are now."""
        for risk in self._risks:
            await self._read(risk.name)

    def writes(self, held: Position | RestingEntry | None, when_ms: int) -> list[Write]:
        """What makes the profiles, as they were seen last, count `held` and nothing else of this position.

        A write expects that they are still so. Slots whose time is over are taken out with it; nothing is
        written where nothing changes for this position.
        """
        found = []
        for risk in self._risks:
            rev, slots = self._seen[risk.name]
            own = None if held is None else active(held)
            if slots.get(self._own) == own:
                continue
            left = self._others(slots, when_ms)
            if own is not None:
                left[self._own] = own
            key = (self._identity.exchange_name, risk.name)
            found.append(Write(_RISK, key, encode(left), when=when_ms, expect=rev or ABSENT))
        return found

    def written(self, writes: Sequence[Write]) -> None:
        """The writes went through."""
        for write in writes:
            name = str(write.key[1])
            self._seen[name] = self._seen[name][0] + 1, _slots(write.key, write.value)

    def _others(self, slots: _Slots, when_ms: int) -> _Slots:
        """All slots but our own, and but those whose time is over: their owner is gone."""
        since_ms = when_ms - self._patience_ms
        return {
            name: slot
            for name, slot in slots.items()
            if name != self._own and since_ms < slot.opened_at_ms + slot.minutes * MINUTE_MS
        }

    async def _read(self, risk_name: str) -> _Slots:
        key = (self._identity.exchange_name, risk_name)
        record = await self._persistence.store_for(_RISK, self._mode).get(_RISK, key)
        slots = {} if record is None else _slots(key, record.value)
        self._seen[risk_name] = (0 if record is None else record.rev), slots
        return slots


def _slots(key: Key, value: Plain) -> _Slots:
    try:
        return decode_as(_Slots, value or {})
    except Damaged as error:
        raise Damaged(f"risk {'/'.join(map(str, key))} is not one of this program: {error}") from error
