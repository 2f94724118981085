"""`backtest-kit records`: what runs remember, as tables for people."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from backtest_kit.cli import options
from backtest_kit.cli.store import add, console, require_existing, table, with_store
from backtest_kit.errors import UserError
from backtest_kit.model.interval import iso, to_ms
from backtest_kit.persist import operations
from backtest_kit.persist.contracts import CONTRACTS, Contract, Durability, Kind, contract
from backtest_kit.persist.store import Record, Store

_SHOWN = tuple(
    row for row in CONTRACTS.values() if row.kind is not Kind.SERIES and row.durability is not Durability.MONEY
)


class Filter(msgspec.Struct, frozen=True):
    """Which records are asked for; None is any."""

    symbol: str | None = None
    strategy_name: str | None = None
    since_ms: int | None = None

    def takes(self, row: Contract, record: Record) -> bool:
        fields = fields_of(row, record)
        return (
            self.symbol in (None, fields.get("symbol"))
            and self.strategy_name in (None, fields.get("strategyName"))
            and (self.since_ms is None or (record.written_at if record.when is None else record.when) >= self.since_ms)
        )


def run_ls(
    url: str, contract_name: str | None, mode: str, run_id: str | None, only: Filter, limit: int, as_json: bool
) -> None:
    """List the records of a contract, newest first; without one, how many of each contract there are."""
    contracts = _SHOWN if contract_name is None else (record_contract(contract_name),)

    async def read(store: Store) -> list[tuple[Contract, list[Record], int]]:
        space = space_of(store, mode, run_id)
        return [(row, *await _read(space, row, only, limit)) for row in contracts]

    listed = [with_store(address, read) for address in _addresses(url)]
    # Of each contract, from the first place that has any of it.
    found = [next((each for each in places if each[2]), places[0]) for places in zip(*listed, strict=True)]
    if as_json:
        for row, records, _ in found:
            for record in records:
                sys.stdout.write(json.dumps(_as_json(row, record), ensure_ascii=False) + "\n")
    elif contract_name is None:
        rows = table("Contract", "Records", "Last")
        for row, records, count in found:
            if count:
                add(rows, row.name, f"{count:,}", _time(records[0]))
        console().print(rows)
    else:
        rows = table("When", "Key", "What")
        for row, records, _ in found:
            for record in records:
                add(rows, _time(record), operations.text_of(row, record.key), summary_of(row, record))
        console().print(rows)


def run_show(url: str, contract_name: str, key_text: str, mode: str, run_id: str | None, as_json: bool) -> None:
    """Show one record whole."""
    row = record_contract(contract_name)
    key = operations.key_from_text(row, key_text)
    found = (
        with_store(address, lambda store: space_of(store, mode, run_id).get(row, key)) for address in _addresses(url)
    )
    record = next((each for each in found if each is not None), None)
    if record is None:
        raise UserError(f"{contract_name} has no record {key_text!r}: see backtest-kit records ls {contract_name}")
    if as_json:
        sys.stdout.write(json.dumps(_as_json(row, record), ensure_ascii=False) + "\n")
        return
    rows = table("Field", "Value")
    state = "removed, " if record.removed else ""
    add(rows, "written", f"{state}revision {record.rev} at {iso(record.written_at)}")
    if record.when is not None:
        add(rows, "when", iso(record.when))
    value = record.value if isinstance(record.value, dict) else {"value": record.value}
    for name, item in (dict(zip(row.key_fields, record.key, strict=True)) | value).items():
        add(rows, name, _readable(name, item))
    console().print(rows)


def _addresses(url: str) -> list[str]:
    """Where records may lie: also in files, as the log and what backtests keep do wherever the rest is bound.

    Raises:
        UserError: there is no such store, and no files.
    """
    files = options.DEFAULT_STORE
    if url.startswith("file:") or not Path(files.partition(":")[2]).is_dir():
        return [url]
    try:
        require_existing(url)
    except UserError:
        return [files]  # nothing was traded yet, and so nothing was kept in the store that is bound
    return [url, files]


def space_of(store: Store, mode: str, run_id: str | None) -> Store:
    """Where the records of a mode, or of a run of a backtest, lie in a store.

    Raises:
        UserError: there is no such mode, or a backtest has no run.
    """
    if run_id is not None:
        return store.within(f"backtest-{run_id}")
    if mode == "backtest":
        raise UserError("every backtest has records of its own: name its run with --run, as `result.run_id` says")
    if mode not in ("live", "paper"):
        raise UserError(f"mode is {mode!r}: use live or paper, or name a run of a backtest with --run")
    return store.within("paper") if mode == "paper" else store


def record_contract(name: str) -> Contract:
    """A contract whose records are for people to read.

    Raises:
        UserError: it is none; candles and positions are shown elsewhere.
    """
    row = contract(name)
    if row not in _SHOWN:
        names = ", ".join(each.name for each in _SHOWN)
        raise UserError(f"{name} is not shown here, but by `backtest-kit store ls {name}`; records are {names}")
    return row


def fields_of(row: Contract, record: Record) -> dict[str, Any]:
    """The fields of the value and those of the key."""
    value = record.value if isinstance(record.value, dict) else {}
    return {**value, **dict(zip(row.key_fields, record.key, strict=True))}


def summary_of(row: Contract, record: Record) -> str:
    """A record in one line."""
    value: Any = record.value
    if isinstance(value, dict):
        if row.name == "notification":
            return str(value.get("text", ""))
        if row.name == "log":
            return f"{value.get('level', '')} {value.get('message', '')}"
        if row.name in ("storage", "recent"):
            pnl = value.get("pnlPct")
            earned = "" if pnl is None else f", {pnl:+.2f} %"
            return (
                f"{value.get('symbol')} {value.get('strategyName')}: {value.get('status')} {value.get('position')} "
                f"at {value.get('priceOpen'):g}{earned}"
            )
    return json.dumps(value, ensure_ascii=False)


def since_ms(text: str | None) -> int | None:
    """The moment that `--since` names. Raises `UserError` if it names none."""
    return None if text is None else to_ms(text, what="--since")


async def _read(store: Store, row: Contract, only: Filter, limit: int) -> tuple[list[Record], int]:
    """The newest that are asked for, and how many there are of them where nothing narrows it down to few."""
    records: list[Record] = []
    count = 0
    async for record in store.scan(row, newest_first=True):
        if only.takes(row, record):
            count += 1
            if len(records) < limit:
                records.append(record)
    return records, count


def _as_json(row: Contract, record: Record) -> dict[str, Any]:
    return {
        "contract": row.name,
        "key": dict(zip(row.key_fields, record.key, strict=True)),
        "rev": record.rev,
        "when": record.when,
        "writtenAt": record.written_at,
        "removed": record.removed,
        "value": record.value,
    }


def _time(record: Record) -> str:
    return iso(record.written_at if record.when is None else record.when)


def _readable(name: str, item: object) -> str:
    if name.endswith("Ms") and isinstance(item, int):
        return iso(item)
    return item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
