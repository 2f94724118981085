"""`Promises`: changes that are durable in a journal, and how they get into their files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from backtest_kit.errors import Damaged, RetryLater
from backtest_kit.persist.backends.file_feed import Feed
from backtest_kit.persist.backends.file_segments import Line
from backtest_kit.persist.backends.file_writes import Writes
from backtest_kit.persist.codec import NewerSchema, dump_value, open_envelope, parse, seal_text, unseal
from backtest_kit.persist.contracts import ALL_CONTRACTS, Contract, Kind
from backtest_kit.persist.files import Disk
from backtest_kit.persist.locks import Locked, LockSet
from backtest_kit.persist.quarantine import Quarantine
from backtest_kit.persist.store import Key, Record

PATIENCE: Final = 2.0

_log = logging.getLogger(__name__)

Target = tuple[str, Key]


class Promised(NamedTuple):
    """A change that is durable in the journal."""

    contract: Contract
    record: Record
    dumped: bytes
    tick: int


class Promises:
    """What this process has promised and not carried out yet. Methods block."""

    def __init__(
        self,
        root: str,
        disk: Disk,
        locks: LockSet,
        quarantine: Quarantine,
        writes: Writes,
        feed: Callable[[Contract, str], Feed],
    ) -> None:
        self._root = root
        self._disk = disk
        self._locks = locks
        self._quarantine = quarantine
        self._writes = writes
        self._feed = feed
        self._promised: dict[Target, Promised] = {}

    @property
    def any(self) -> bool:
        """Whether anything is promised."""
        return bool(self._promised)

    def find(self, target: Target) -> Record | None:
        """The record that is promised there."""
        promised = self._promised.get(target)
        return None if promised is None else open_envelope(promised.contract, None, parse(promised.dumped))

    def add(self, promised: Mapping[Target, Promised]) -> None:
        self._promised.update(promised)

    def clear(self) -> None:
        self._promised.clear()

    def carry_out(self) -> bool:
        """Put what a failing disk has not let through into its files; returns whether there was anything."""
        for (path, _), item in list(self._promised.items()):
            try:
                with self._locks.hold((path,), PATIENCE):
                    self._apply(path, item)
            except Locked as error:  # it stops every write, not only those that need this lock
                raise RetryLater(str(error)) from None
        found = bool(self._promised)
        self._promised.clear()
        return found

    def redo(self, change: dict[str, Any]) -> bool:
        """Carry out a change of a process that died; False where its key is blocked."""
        row = ALL_CONTRACTS[change["record"]["contract"]]
        record = open_envelope(row, None, change["record"])
        item = Promised(row, record, dump_value(change["record"]), change["tick"])
        try:
            with self._locks.hold((change["path"],)):
                self._apply(change["path"], item)
        except Damaged as error:
            _log.error("not recovered from the journal, the operator decides: %s", error)
            return False
        return True

    def _apply(self, path: str, item: Promised) -> None:
        if item.contract.kind is Kind.FEED:
            feed = self._feed(item.contract, path)
            current = feed.find(item.record.key, locked=True)
            if current is None or current.rev < item.record.rev:
                feed.append([Line(item.tick, item.record, item.dumped)])
                self._disk.sync_file(f"{self._root}/{path}/{feed.tail_name}")
            return
        promised = open_envelope(item.contract, None, parse(item.dumped))
        beneath = self._record_beneath(path, item)
        # An equal one is written again, for nobody knows whether it was synced. Another one of the same revision
        # was acknowledged to somebody after the entry had been given up.
        if beneath is None or beneath.rev < promised.rev or beneath == promised:
            self._writes.write_durably(path, seal_text(item.dumped), item.tick)
        elif beneath.rev == promised.rev:
            _log.warning("revision %d of %s/%s is not the one in the journal: kept", beneath.rev, self._root, path)

    def _record_beneath(self, path: str, item: Promised) -> Record | None:
        try:
            data = self._disk.read(f"{self._root}/{path}")
        except FileNotFoundError:
            self._quarantine.refuse_blocked(path)
            return None
        try:
            return unseal(item.contract, item.record.key, data)
        except NewerSchema:
            raise
        except Damaged as error:
            # Torn because the host went down before it was synced: the journal has the whole of it.
            reason = f"{error} (the journal had the record, which is in its place)"
            self._quarantine.keep(item.contract, item.record.key, path, data, reason, blocks=False)
            return None
