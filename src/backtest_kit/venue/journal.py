"""The actions at the simulated exchange in a file: replayed, they restore the same exchange."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import IO

import msgspec

from backtest_kit.errors import Damaged, Outcome, RetryLater, UserError
from backtest_kit.persist.files import Disk
from backtest_kit.venue.exchange import Terms
from backtest_kit.venue.orders import Kind, Market, NewOrder


class Place(msgspec.Struct, frozen=True, tag="place"):
    """Take an order; `part` and `rest_expires` as in `Exchange.place`."""

    new: NewOrder
    part: Decimal | None = None
    rest_expires: bool = False


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Cancel an order by either id."""

    symbol: str
    order_id: int | None = None
    client_order_id: str | None = None


class FillReference(msgspec.Struct, frozen=True, tag="fill"):
    """Fill a reference order."""

    client_order_id: str
    price: Decimal
    quantity: Decimal


class SetLeverage(msgspec.Struct, frozen=True, tag="leverage"):
    """Set the leverage of a futures position."""

    symbol: str
    leverage: int


Action = Place | Cancel | FillReference | SetLeverage


class Done(msgspec.Struct, frozen=True):
    """One action."""

    kind: Kind
    account: str
    action: Action


class JournalEntry(msgspec.Struct, frozen=True):
    """The actions of one moment, all or nothing."""

    at_ms: int
    done: tuple[Done, ...] = ()


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal for a replay."""

    version: int = 1
    candles: str
    start_ms: int
    markets: tuple[Market, ...]
    terms: Terms


class Journal:
    """A file of lines: a head, then an entry for each moment with actions, on the disk before it is answered."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._size = 0
        self._waiting: list[bytes] = []
        # Between threads: a write may outlive the task that requested it, and the next one must come after it.
        self._writing = threading.Lock()

    def read(self) -> tuple[Head, list[JournalEntry]] | None:
        """The content of the file, None without a file. An unfinished last line was never answered.

        Raises:
            Damaged: a line was not written by this program.
        """
        if not self._path.exists():
            return None
        lines = self._path.read_bytes().split(b"\n")
        torn = lines.pop()
        if not lines:
            return None
        try:
            head = msgspec.json.decode(lines[0], type=Head)
            entries = [msgspec.json.decode(line, type=JournalEntry) for line in lines[1:]]
        except msgspec.MsgspecError as error:
            raise Damaged(
                f"{self._path} is not the state of a venue ({error}): move it away, or give another file"
            ) from None
        if torn:
            os.truncate(self._path, self._path.stat().st_size - len(torn))
        return head, entries

    def latest_ms(self) -> int | None:
        """The time of the last action; None without a file. Raises as `read`."""
        kept = self.read()
        return kept and (kept[1][-1].at_ms if kept[1] else kept[0].start_ms)

    def open(self, head: Head) -> None:
        """Begin to write, with `head` if the file is new.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            fresh = not self._path.exists() or not self._path.stat().st_size
            Disk().make_file(str(self._path))
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}: give another file of state") from None
        self._size = self._path.stat().st_size
        if fresh:
            self._waiting.append(msgspec.json.encode(head))
            self._flush(durable=True)

    async def write(self, entries: Sequence[JournalEntry], *, durable: bool) -> None:
        """Append entries; with `durable` they are on the disk when this returns.

        Raises:
            RetryLater: the file cannot be written now (a full disk). The actions are written with the next entries.
        """
        self._waiting += [msgspec.json.encode(entry) for entry in entries]
        await asyncio.to_thread(self._flush, durable)

    def close(self) -> None:
        with self._writing:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _flush(self, durable: bool) -> None:
        with self._writing:
            if self._file is None:
                raise UserError(f"{self._path} is not open: start the venue before it is used")
            lines = list(self._waiting)
            data = b"".join(line + b"\n" for line in lines)
            try:
                self._file.write(data)
                if durable:
                    os.fsync(self._file.fileno())
            except OSError as error:
                os.truncate(self._path, self._size)
                raise RetryLater(
                    f"{self._path} cannot be written ({error.strerror}): make room; the actions are written then",
                    outcome=Outcome.UNKNOWN,
                ) from None
            self._size += len(data)
            del self._waiting[: len(lines)]
