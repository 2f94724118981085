"""`backtest-kit store`: shows, checks and moves what is stored."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from rich.text import Text

from backtest_kit.cli.printing import add, console, say, table
from backtest_kit.errors import UserError
from backtest_kit.model.interval import iso
from backtest_kit.persist import operations
from backtest_kit.persist.contracts import contract
from backtest_kit.persist.retention import Expired, compact, retention_of
from backtest_kit.persist.store import Record, Store
from backtest_kit.persist.store_id import reclaim_store_id
from backtest_kit.persist.urls import shown, store_at
from backtest_kit.settings import from_environment

T = TypeVar("T")


def run_ls(url: str, namespace: str, contract_name: str, prefix: str, limit: int, removed: bool) -> None:
    row = contract(contract_name)
    key = operations.key_from_text(row, prefix, prefix=True)

    async def read(store: Store) -> list[Record]:
        found = store.namespace(namespace).scan(row, key, limit=limit, newest_first=True, include_removed=removed)
        return [record async for record in found]

    rows = table("Key", "Rev", "When", "Value")
    for record in with_store(url, read):
        value = json.dumps(record.value, ensure_ascii=False)
        add(
            rows,
            operations.text_of(row, record.key),
            str(record.rev),
            "-" if record.when is None else iso(record.when),
            Text(f"removed: {value}" if record.removed else value, overflow="ellipsis", no_wrap=True),
        )
    console().print(rows)


def run_get(url: str, namespace: str, contract_name: str, key_text: str) -> None:
    row = contract(contract_name)
    key = operations.key_from_text(row, key_text)
    record = with_store(url, lambda store: store.namespace(namespace).get(row, key))
    if record is None:
        raise UserError(f"{contract_name} has no record {key_text!r}: see backtest-kit store ls {contract_name}")
    shown = {
        "key": dict(zip(row.key_fields, record.key, strict=True)),
        "rev": record.rev,
        "when": None if record.when is None else iso(record.when),
        "writtenAt": iso(record.written_at),
        "removed": record.removed,
        "value": record.value,
    }
    console().print_json(json.dumps(shown, ensure_ascii=False))


def run_du(url: str) -> None:
    retention = retention_of(from_environment(os.environ))

    async def read(store: Store) -> tuple[list[operations.Usage], list[Expired]]:
        return await operations.du(store), await compact(store, retention, look_only=True)

    usages, expired = with_store(url, read)
    too_old = {(each.namespace, each.contract): each for each in expired}
    rows = table("Namespace", "Contract", "Records", "Removed", "Bytes", "Too old", "Fault")
    for usage in usages:
        old = too_old.get((usage.namespace, usage.contract))
        run = too_old.get((usage.namespace, ""))
        add(
            rows,
            "/".join(usage.namespace) or "(live)",
            usage.contract,
            f"{usage.records:,}",
            f"{usage.removed:,}",
            f"{usage.size:,}",
            "all" if run and not run.fault else f"{old.records:,}" if old else "",
            usage.fault or "",
        )
    console().print(rows)
    if any(each.records for each in expired):
        say(f"`backtest-kit store compact` would delete {_sum(expired)}, by CC_RETENTION_*.")


def run_compact(url: str) -> None:
    """Delete what is too old by the settings of the environment."""
    retention = retention_of(from_environment(os.environ))
    expired = with_store(url, lambda store: compact(store, retention), existing=False)
    for each in expired:
        what = "/".join(filter(None, (*each.namespace, each.contract))) or "(live)"
        say(f"{what}: {each.fault}" if each.fault else f"{what}: {each.records:,} records, {each.size:,} bytes")
    say(f"{shown(url)}: {_sum(expired)} deleted." if expired else f"{shown(url)}: nothing is too old.")


def _sum(expired: list[Expired]) -> str:
    return f"{sum(each.records for each in expired):,} records of {sum(each.size for each in expired):,} bytes"


def run_check(url: str, deep: bool, accept_loss: bool = False) -> int:
    """Print what is wrong; the exit code is 1 if anything is."""
    if accept_loss:
        lost = with_store(url, lambda store: store.accept_loss())
        say(f"accepted: {lost}" if lost else f"{shown(url)}: no acknowledged write is missing.")
    findings = with_store(url, lambda store: store.check(deep=deep))
    for finding in findings:
        say(f"{finding.path}: {finding.problem}")
    many = "1 problem" if len(findings) == 1 else f"{len(findings):,} problems"
    where = shown(url)
    say(f"{where}: {many} found." if findings else f"{where}: every record is intact.")
    return 1 if findings else 0


def run_quarantine_list(url: str) -> None:
    rows = table("Path", "Contract", "Key", "Found", "Reason")
    for each in with_store(url, lambda store: store.quarantined()):
        key = "/".join(map(str, each.key)) if each.key else "-"
        add(rows, each.path, each.contract or "-", key, iso(each.found_at), each.reason)
    console().print(rows)


def run_quarantine_restore(url: str, path: str) -> None:
    with_store(url, lambda store: store.restore(path), existing=False)
    say(f"{path} was put back.")


def run_quarantine_drop(url: str, path: str) -> None:
    with_store(url, lambda store: store.drop(path), existing=False)
    say(f"{path} was discarded; its key is free.")


def run_reclaim(url: str) -> None:
    other = with_store(url, reclaim_store_id, existing=False)
    say(f"{shown(url)} may trade live again. Never start {other} again: both would trade the same positions.")


def with_store(url: str, use: Callable[[Store], Awaitable[T]], *, existing: bool = True) -> T:
    async def main() -> T:
        store = store_at(url, existing=existing, patient=True)
        try:
            return await use(store)
        finally:
            await store.close()

    require_existing(url)
    return asyncio.run(main())


def require_existing(url: str) -> None:
    """Raise `UserError` if `url` is the address of a file or directory that is not there."""
    if url.startswith(("file:", "sqlite:")) and not Path(url.partition(":")[2]).exists():
        raise UserError(f"the store {url} does not exist: name one with --store file:DIR or --store sqlite:FILE")
