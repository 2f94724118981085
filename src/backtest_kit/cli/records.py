"""`backtest-kit records`: the records of runs as tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from backtest_kit.cli import options
from backtest_kit.cli.printing import add, console, table
from backtest_kit.cli.store import require_existing, with_store
from backtest_kit.errors import UserError
from backtest_kit.model.interval import iso, to_ms
from backtest_kit.model.price import price_text
from backtest_kit.persist import operations
from backtest_kit.persist.binding import runs_in
from backtest_kit.persist.contracts import CONTRACTS, Contract, Durability, Kind, contract
from backtest_kit.persist.store import Record, Store
from backtest_kit.records.signals import StoredSignal, stored_signal

_SHOWN = tuple(
    row for row in CONTRACTS.values() if row.kind is not Kind.SERIES and row.durability is not Durability.MONEY
)

_OF_RUN: Final = ("storage", "recent", "notification", "log")
"""Contracts whose values say which run they are of."""
_OPTIONS: Final = {"symbol": "--symbol", "strategyName": "--strategy"}


class Filter(msgspec.Struct, frozen=True):
    """Which records are wanted; None matches any."""

    symbol: str | None = None
    strategy_name: str | None = None
    since_ms: int | None = None

    def lacks(self, row: Contract) -> list[str]:
        """The given options whose field records of this contract do not have."""
        names = {*row.key_fields, *(_OPTIONS if row.name in _OF_RUN else ())}
        asked = {"symbol": self.symbol, "strategyName": self.strategy_name}
        return [_OPTIONS[name] for name, value in asked.items() if value is not None and name not in names]

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
    """List the records of a contract, newest first; without one, how many of each contract there are.

    Raises:
        UserError: the contract is none that is shown here, or its records cannot be filtered like that;
            or the run is unknown.
    """
    contracts, left_out = _chosen(contract_name, only)
    is_overview = contract_name is None and not as_json

    async def read(store: Store) -> list[tuple[Contract, list[Record], int]]:
        space = space_of(store, mode, run_id)
        return [(row, *await _read(space, row, only, 1 if is_overview else limit)) for row in contracts]

    listed = [with_store(address, read) for address in _addresses(url)]
    if not any(count for places in listed for *_, count in places):
        _explain_nothing(url, mode, run_id, contracts)
    # Of each contract, from the first place that has any of it.
    found = [next((each for each in places if each[2]), places[0]) for places in zip(*listed, strict=True)]
    if as_json:
        for row, records, _ in found:
            for record in records:
                sys.stdout.write(json.dumps(_as_json(row, record), ensure_ascii=False) + "\n")
    elif is_overview:
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
    if left_out:
        names = ", ".join(row.name for row in left_out)
        sys.stderr.write(
            f"not counted, because they cannot be filtered by {' and '.join(only.lacks(left_out[0]))}: {names}\n"
        )


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
    if row.name in _OF_RUN:
        value = dict(_flat(value))
    for name, item in (dict(zip(row.key_fields, record.key, strict=True)) | value).items():
        add(rows, name, _readable(name, item))
    console().print(rows)


def _chosen(contract_name: str | None, only: Filter) -> tuple[list[Contract], list[Contract]]:
    """The wanted contracts, and those whose records cannot be filtered as given."""
    asked = _SHOWN if contract_name is None else (record_contract(contract_name),)
    left_out = [row for row in asked if only.lacks(row)]
    if contract_name is not None and left_out:
        raise UserError(_cannot_be_found_by(only, asked[0]))
    return [row for row in asked if row not in left_out], left_out


def _cannot_be_found_by(only: Filter, row: Contract) -> str:
    return (
        f"{row.name} cannot be listed by {' and '.join(only.lacks(row))}: its records are known by "
        f"{', '.join(row.key_fields)}. Use --since, --mode and --run, or list by the beginning of the key: "
        f"backtest-kit store ls {row.name} {row.key_fields[0].upper()}"
    )


def _addresses(url: str) -> list[str]:
    """The stores to look in: also files, because the log and backtests keep records there.

    Raises:
        UserError: the store does not exist, and there are no files.
    """
    files = options.DEFAULT_STORE
    if url.startswith("file:") or not Path(files.partition(":")[2]).is_dir():
        return [url]
    try:
        require_existing(url)
    except UserError:
        return [files]  # nothing was traded yet: the bound store does not exist
    return [url, files]


def space_of(store: Store, mode: str, run_id: str | None) -> Store:
    """Where the records of a mode, or of a run of a backtest, lie in a store.

    Raises:
        UserError: unknown mode, or a backtest without a run.
    """
    if run_id is not None:
        return store.namespace(f"backtest-{run_id}")
    if mode == "backtest":
        raise UserError("every backtest has its own records: name its run with --run (`result.run_id`)")
    if mode not in ("live", "paper"):
        raise UserError(f"mode is {mode!r}: use live or paper, or name a run of a backtest with --run")
    return store.namespace("paper") if mode == "paper" else store


async def other_spaces(store: Store, mode: str, contracts: Sequence[Contract]) -> list[str]:
    """The options that show records of `contracts` in the other mode, and in the last run of a backtest."""
    spaces = {f"--mode {other}": space_of(store, other, None) for other in ("live", "paper") if other != mode}
    if runs := await runs_in(store):
        spaces[f"--run {max(runs)}"] = space_of(store, mode, max(runs))
    return [option for option, space in spaces.items() if await _has_any(space, contracts)]


async def _has_any(space: Store, contracts: Sequence[Contract]) -> bool:
    for row in contracts:
        async for _ in space.scan(row, limit=1):
            return True
    return False


def point_to(mode: str, found_at: Sequence[str]) -> None:
    """Print on standard error where there are records instead."""
    if found_at:
        sys.stderr.write(f"Nothing in {mode} mode. There are records with {' and with '.join(found_at)}.\n")


def require_run(run_id: str, runs: set[str], where: str) -> None:
    """Raise `UserError` if a run has no records there."""
    if run_id not in runs:
        # An id begins with the time of its start, unless the run was named.
        last = f"the last runs are {', '.join(sorted(runs)[-3:])}" if runs else "no run has"
        raise UserError(f"no run {run_id!r} has records in {where}: {last}")


def _explain_nothing(url: str, mode: str, run_id: str | None, contracts: Sequence[Contract]) -> None:
    """Raise `UserError` if the run is unknown; print where else there are records."""
    addresses = _addresses(url)
    if run_id is not None:
        places = {address: with_store(address, runs_in) for address in addresses}
        require_run(run_id, set().union(*places.values()), " and ".join(places))
        return
    found_at = [with_store(address, lambda store: other_spaces(store, mode, contracts)) for address in addresses]
    point_to(mode, [option for options in found_at for option in options])


def record_contract(name: str) -> Contract:
    """A contract whose records are shown here.

    Raises:
        UserError: they are not; candles and positions are shown elsewhere.
    """
    row = contract(name)
    if row not in _SHOWN:
        names = ", ".join(each.name for each in _SHOWN)
        raise UserError(f"{name} is shown by `backtest-kit store ls {name}`; records are {names}")
    return row


def fields_of(row: Contract, record: Record) -> dict[str, Any]:
    """The fields of the value, those of the run in it, and those of the key."""
    value: dict[str, Any] = record.value if isinstance(record.value, dict) else {}
    run = value.get("identity")
    return {**value, **(run if isinstance(run, dict) else {}), **dict(zip(row.key_fields, record.key, strict=True))}


def summary_of(row: Contract, record: Record) -> str:
    """A record in one line."""
    value: Any = record.value
    if isinstance(value, dict):
        if row.name == "notification":
            return str(value.get("text", ""))
        if row.name == "log":
            return f"{value.get('level', '')} {value.get('message', '')}"
        if row.name in ("storage", "recent"):
            return _signal(stored_signal(value))
    return json.dumps(value, ensure_ascii=False)


def _signal(signal: StoredSignal) -> str:
    opened, ended, pnl = signal.price_open, signal.price_close, signal.pnl_pct
    price = f"at {price_text(opened)}" if ended is None else f"from {price_text(opened)} to {price_text(ended)}"
    earned = "" if pnl is None else f", {pnl:+.2f} %"
    return f"{signal.symbol} {signal.strategy_name}: {signal.status} {signal.side} {price}{earned}"


def since_ms(text: str | None) -> int | None:
    """The moment that `--since` names. Raises `UserError` if it names none."""
    return None if text is None else to_ms(text, what="--since")


async def _read(store: Store, row: Contract, only: Filter, limit: int) -> tuple[list[Record], int]:
    """The newest matching records, and how many match."""
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


def _flat(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a value and of what it contains, by their paths: `trade.pnlPct`."""
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{path}{name}.")
        else:
            yield f"{path}{name}", item


def _readable(name: str, item: object) -> str:
    if name.endswith("Ms") and isinstance(item, int):
        return iso(item)
    return item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
