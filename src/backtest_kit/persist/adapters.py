"""The front doors: one object per contract, for binding a store and for reading and writing by name.

The values that pass here are the caller's own: encoded once on the way in, decoded once on the way out.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any, Final, Protocol

from backtest_kit.errors import Conflict, UserError
from backtest_kit.model.candle import CandleSeries
from backtest_kit.model.identity import Mode
from backtest_kit.model.interval import to_ms
from backtest_kit.persist.codec import decode, encode
from backtest_kit.persist.contracts import Contract, Delete
from backtest_kit.persist.history import RevisionStore
from backtest_kit.persist.keys import check_key
from backtest_kit.persist.store import ANY, CandleStore, Capability, Key, KeyPart, SeriesKey, Store, Write
from backtest_kit.persist.urls import store_at
from backtest_kit.persist.wrapper import AdapterStore

When = datetime | str | int
"""A simulation time: an aware datetime, an ISO 8601 text or epoch ms."""


def adapter_name(row: Contract) -> str:
    """`PersistSignalAdapter`: what the front door of a contract is called in public."""
    return f"Persist{row.name.capitalize()}Adapter"


def snake(field: str) -> str:
    """`strategyName` as Python writes it."""
    return re.sub(r"(?<!^)([A-Z])", r"_\1", field).lower()


class Stores(Protocol):
    """Which store keeps a contract, and how that is chosen: `Persistence`."""

    def bind(self, contract_name: str, store: Store, *, mode: Mode | None = None) -> None: ...

    def keep_history(self, *contract_names: str) -> None: ...

    def store_for(self, row: Contract, mode: Mode, run: str | None = None) -> Store: ...

    def file_store(self) -> Store: ...


class _Door:
    """What the front door of every contract can do: choose where it leads."""

    def __init__(self, stores: Stores, row: Contract) -> None:
        self._stores = stores
        self._contract = row
        self._fields: Final = {snake(field): field for field in row.key_fields}

    def use_store(self, store: Store, *, mode: Mode | None = None) -> None:
        """Keep this contract in `store`, in one mode or in all."""
        self._stores.bind(self._contract.name, store, mode=mode)

    def use_file(self, *, mode: Mode | None = None) -> None:
        """Keep this contract in the files of the program."""
        self.use_store(self._stores.file_store(), mode=mode)

    def use_memory(self, *, mode: Mode | None = None) -> None:
        """Keep this contract in a memory of its own, for as long as the program runs."""
        self.use_store(store_at("memory:"), mode=mode)

    def use_dummy(self, *, mode: Mode | None = None) -> None:
        """Accept and forget what is written to this contract."""
        self.use_store(store_at("dummy:"), mode=mode)

    def use_adapter(self, adapter: object, *, mode: Mode | None = None) -> None:
        """Keep this contract in an object with `read_value` and `write_value`, see `persist.wrapper`.

        A class, or a function that returns the object, is called once, here; an object is used as it is.
        The same method is called `use_persist_signal_adapter` on the door of `signal`, and so on.

        Raises:
            UserError: it has no such methods.
        """
        self.use_store(AdapterStore(self._contract, adapter), mode=mode)

    def _by_contract(self) -> dict[str, Callable[..., Any]]:
        """Methods that carry the name of the contract, as the reference has them."""
        return {f"use_persist_{self._contract.name}_adapter": self.use_adapter}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if "_contract" not in self.__dict__ or name not in (named := self._by_contract()):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return named[name]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._by_contract()]

    def __repr__(self) -> str:
        return f"<{adapter_name(self._contract)}({', '.join(self._fields)})>"

    def _key(self, parts: dict[str, KeyPart], *, prefix: bool = False) -> Key:
        """The key that keyword arguments name."""
        names = list(self._fields)
        given = names[: len(parts)] if prefix else names
        if set(parts) != set(given):
            kind = "a listing takes the first of" if prefix else "the key has"
            raise UserError(
                f"{adapter_name(self._contract)} got {', '.join(parts) or 'no key'}: {kind} {', '.join(names)}"
            )
        return check_key(self._contract, [parts[name] for name in given], prefix=prefix)


class ContractAdapter(_Door):
    """The front door of a contract: `await PersistSignalAdapter.read(symbol=..., strategy_name=..., ...)`.

    The key is given by name, its fields in Python spelling. `mode` is "live", "paper" or "backtest", and
    `run` the id of a backtest's run. With `when`, a moment of simulation, a record that was written later
    than that moment is not there.
    """

    def keep_history(self) -> None:
        """Keep what these records were before, for reads `as_of` a moment. As `Persistence.keep_history`."""
        self._stores.keep_history(self._contract.name)

    async def read(
        self,
        *,
        when: When | None = None,
        as_of: When | None = None,
        mode: Mode = "live",
        run: str | None = None,
        **key: KeyPart,
    ) -> Any:
        """The value under a key, or None if there is none, it was removed, or it is later than `when`.

        `as_of` takes the value as it stood at that moment, whatever has replaced it since.

        Raises:
            UserError: the key has missing, unknown or ill-typed fields; the message lists them. Or `as_of` is given
                and no history was kept, or not that far back (`NotKept`).
            Damaged, RetryLater: as `Store.get`.
        """
        store, name = self._store(mode, run), self._key(key)
        if as_of is not None:
            if when is not None:
                raise UserError(f"when={when!r} and as_of={as_of!r} are both given: choose one")
            if not isinstance(store, RevisionStore):
                raise UserError(
                    f"no history is kept of {self._contract.name}, so it is not known what it was at {as_of}: call "
                    f"{adapter_name(self._contract)}.keep_history() where the program starts, for what comes then"
                )
            was = await store.as_of(self._contract, name, to_ms(as_of, what="as_of"))
            return None if was is None or was.removed else decode(was.value)
        record = await store.get(self._contract, name)
        now_ms = None if when is None else to_ms(when, what="when")
        return None if record is None or record.removed or record.later_than(now_ms) else decode(record.value)

    async def write(
        self, value: object, *, when: When | None = None, mode: Mode = "live", run: str | None = None, **key: KeyPart
    ) -> None:
        """Keep `value` under a key; `when` is the simulation time that it belongs to.

        Raises:
            UserError: the key is wrong, or something in `value` cannot be stored; the message names it.
            Damaged, OutOfSpace, RetryLater: as `Store.put`.
        """
        write = Write(self._contract, self._key(key), encode(value), when=None if when is None else to_ms(when))
        await self._store(mode, run).put(write)

    async def remove(
        self, *, when: When | None = None, mode: Mode = "live", run: str | None = None, **key: KeyPart
    ) -> bool:
        """Remove what is under a key, and return whether there was something.

        A position contract then has the value None; a bucket keeps the record, marked as removed. `when` is the
        simulation time of the removal, before which `read(as_of=...)` goes on to find what was there; without it
        that is the time of the last write.

        Raises:
            UserError: the key is wrong, or records of this contract are never removed.
        """
        if self._contract.delete is Delete.NEVER:
            raise UserError(f"records of {self._contract.name} are never removed: write an empty value instead")
        store, name = self._store(mode, run), self._key(key)
        soft = self._contract.delete is Delete.SOFT
        removed_ms = None if when is None else to_ms(when, what="when")
        while True:
            record = await store.get(self._contract, name)
            if record is None or record.removed or (record.value is None and not soft):
                return False
            checked = Capability.COMPARE_AND_SET in store.capabilities
            write = Write(
                self._contract,
                name,
                record.value if soft else None,
                when=record.when if removed_ms is None else removed_ms,
                expect=record.rev if checked else ANY,
                removed=soft,
            )
            try:
                await store.put(write)
            except Conflict:
                continue
            return True

    def _by_contract(self) -> dict[str, Callable[..., Any]]:
        named = super()._by_contract()
        if self._contract.delete is Delete.SOFT:
            # `await PersistMemoryAdapter.remove_memory_data(...)` is `remove`.
            named[f"remove_{self._contract.name}_data"] = self.remove
        return named

    async def list(
        self, *, when: When | None = None, mode: Mode = "live", run: str | None = None, **prefix: KeyPart
    ) -> AsyncIterator[tuple[dict[str, KeyPart], Any]]:
        """Key and value of every record whose key begins with the given fields, newest first.

        Removed records, and those later than `when`, are passed over.

        Raises:
            UserError: the fields are not the first ones of the key.
            Damaged, RetryLater: as `Store.scan`.
        """
        now_ms = None if when is None else to_ms(when, what="when")
        records = self._store(mode, run).scan(self._contract, self._key(prefix, prefix=True), newest_first=True)
        async for record in records:
            if not record.later_than(now_ms):
                yield dict(zip(self._fields, record.key, strict=True)), decode(record.value)

    def _store(self, mode: Mode, run: str | None) -> Store:
        return self._stores.store_for(self._contract, mode, run)


class CandleAdapter(_Door):
    """The front door of the candles. They are the same in every mode."""

    async def read_candles(
        self,
        start: When,
        stop: When,
        *,
        exchange_name: str,
        symbol: str,
        interval: str,
        mode: Mode = "live",
    ) -> CandleSeries:
        """The stored candles that open in `[start, stop)`, ascending; what is absent is left out."""
        series = SeriesKey(exchange_name, symbol, interval)
        return await self._candles(mode).read(series, to_ms(start, what="start"), to_ms(stop, what="stop"))

    async def write_candles(
        self, candles: CandleSeries, *, exchange_name: str, symbol: str, interval: str, mode: Mode = "live"
    ) -> int:
        """Store closed candles, ascending; return how many were new. What is there already stays."""
        return await self._candles(mode).write(SeriesKey(exchange_name, symbol, interval), candles)

    def _candles(self, mode: Mode) -> CandleStore:
        return self._stores.store_for(self._contract, mode).candles
