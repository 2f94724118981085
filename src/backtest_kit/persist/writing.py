"""What a write does to a key, decided in one place for every backend that does not leave it to a server."""

from __future__ import annotations

from collections.abc import Sequence

from backtest_kit.errors import Conflict, UserError
from backtest_kit.persist.contracts import WriteRule
from backtest_kit.persist.store import ABSENT, ANY, Record, Write
from backtest_kit.seams import SYSTEM


def now_ms() -> int:
    """The wall clock, as `Record.written_at` has it."""
    return SYSTEM.wall_ms()


def decide(write: Write, current: Record | None) -> tuple[Record, bool]:
    """The record that stands after `write` on a key that holds `current`, and whether it must be stored.

    Raises:
        Conflict: `write.expect` does not hold.
    """
    rev = None if current is None else current.rev
    if write.expect != ANY and rev != (None if write.expect == ABSENT else write.expect):
        found = "nothing" if rev is None else f"revision {rev}"
        wanted = "nothing" if write.expect == ABSENT else f"revision {write.expect}"
        raise Conflict(
            f"{write.contract.name} {'/'.join(map(str, write.key))} holds {found}, the write expected {wanted}: "
            "another writer was there first, read it again"
        )
    if current is not None and write.contract.write_rule is not WriteRule.REPLACE:
        return current, False
    record = Record(
        key=write.key,
        value=write.value,
        rev=(rev or 0) + 1,
        when=write.when,
        written_at=now_ms(),
        removed=write.removed,
    )
    return record, True


def check_batch(writes: Sequence[Write]) -> None:
    """Raise `UserError` if `writes` has one key twice: which of the two would count?"""
    seen = set()
    for write in writes:
        name = (write.contract.name, write.key)
        if name in seen:
            raise UserError(
                f"a batch writes {write.contract.name} {'/'.join(map(str, write.key))} twice: put each key in it once"
            )
        seen.add(name)
