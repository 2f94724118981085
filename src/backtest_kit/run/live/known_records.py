"""`KnownRecords`: records of a store with their last known revision, which every write expects."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from backtest_kit.errors import Conflict, OutOfSpace, RetryLater
from backtest_kit.model.identity import Mode
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.store import ABSENT, Key, Plain, Write

_Name = tuple[str, Key]


class KnownRecords:
    """The records of one position. Not for concurrent use."""

    def __init__(self, persistence: Persistence, mode: Mode) -> None:
        self._persistence = persistence
        self._mode = mode
        self._known: dict[_Name, tuple[int, Plain]] = {}
        """Revision (0 for none) and value of each record, as read or written last."""
        self._unsure: dict[_Name, Plain] = {}
        """The intended values of a write whose outcome is unknown."""

    def __contains__(self, name: _Name) -> bool:
        return name in self._known

    def value(self, row: Contract, key: Key) -> Plain:
        """The last known value of a record; None if there was none."""
        return self._known[row.name, key][1]

    async def read(self, row: Contract, key: Key) -> Plain:
        """Read the current value of a record; None if there is none.

        Raises:
            Damaged, RetryLater: as `Store.get`.
        """
        found = await self._persistence.store_for(row, self._mode).get(row, key)
        self._unsure.pop((row.name, key), None)
        self._known[row.name, key] = (0, None) if found is None else (found.rev, found.value)
        return self.value(row, key)

    def forget(self, names: Sequence[_Name]) -> None:
        """These are not written again."""
        for name in names:
            self._known.pop(name, None)

    def change(self, row: Contract, key: Key, value: Plain, when_ms: int) -> list[Write]:
        """The write that sets a record to `value`; none if it has that value."""
        rev, known = self._known[row.name, key]
        same = known == value if rev else value in (None, {})
        return [] if same else [Write(row, key, value, when=when_ms, expect=rev or ABSENT)]

    async def commit(self, own: Sequence[Write], shared: Sequence[Write] = ()) -> bool:
        """Write everything in one batch, first the `shared` records, which other processes write as well. Must not be
        cancelled half-way. Call `find_out` first: `change` relies on it.

        False if another process has changed a shared record since it was read: nothing was written.

        Raises:
            Conflict: another process has changed one of our own; it has taken the position over.
            OutOfSpace, RetryLater: as `Store.put`. The next `find_out` learns the outcome.
        """
        wanted = {(write.contract.name, write.key): write.value for write in own}
        self._unsure = dict(wanted)
        try:
            await self._persistence.batch([*shared, *own], mode=self._mode)
        except Conflict:
            await self.find_out()
            if not shared:
                raise
            return False
        except (OutOfSpace, RetryLater):
            with suppress(OutOfSpace, RetryLater):
                await self.find_out()
            if self._unsure or any(self._known[name][1] != value for name, value in wanted.items()):
                raise
        else:
            self._unsure.clear()
            self._written(own)
        self._written(shared)
        return True

    def _written(self, writes: Sequence[Write]) -> None:
        for write in writes:
            name = write.contract.name, write.key
            self._known[name] = self._known[name][0] + 1, write.value

    async def find_out(self) -> None:
        """Learn the outcome of uncertain writes. Call it before `change`, which expects the revisions they left.

        Raises:
            Conflict: another process wrote.
            RetryLater: the store does not answer.
        """
        for name in list(self._unsure):
            row, key = CONTRACTS[name[0]], name[1]
            rev, value = self._known[name]
            found = await self._persistence.store_for(row, self._mode).get(row, key)
            now = 0 if found is None else found.rev
            if found is not None and now == rev + 1 and found.value == self._unsure[name]:
                self._known[name] = now, found.value
            elif now != rev:
                raise Conflict(
                    f"{row.name} {'/'.join(map(str, key))} has revision {now} and was left with {rev}: "
                    "another process trades this position, stop this one"
                )
            else:
                self._known[name] = rev, value
            del self._unsure[name]
