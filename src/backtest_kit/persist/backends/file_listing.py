"""What a scan of a file store reads, in order of writing, found while it goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from backtest_kit.errors import BacktestKitError
from backtest_kit.persist.backends.file_paths import NEXT, SUFFIX, is_feed, is_log, place_of
from backtest_kit.persist.backends.file_root import Root
from backtest_kit.persist.contracts import Contract, Durability
from backtest_kit.persist.files import disk_error
from backtest_kit.persist.quarantine import DIRECTORY as QUARANTINE
from backtest_kit.persist.store import Record, Selection

_ROWS: Final = 256
"""Rows that are read in one go."""

Found = Iterator[Record | BacktestKitError]


def list_records(root: Root, namespace: str, wanted: Selection) -> Found:
    """The records that are wanted, or what is to be raised in their place. Removed ones may be among them."""
    contract, prefix, newest_first = wanted.contract, wanted.prefix, wanted.newest_first
    place = place_of(namespace, contract, prefix)
    root.open_to_read(place)
    if is_feed(contract):
        numbers = root.feeds.numbers(wanted, namespace)
        for low in range(0, len(numbers), _ROWS):
            yield from root.feeds.read(contract, namespace, numbers[low : low + _ROWS])
        return
    try:
        if is_log(contract):
            for record in root.log.records(contract, place, newest_first=newest_first):
                if record.key[: len(prefix)] == prefix:
                    yield record
            return
        levels = len(contract.key_fields) - len(prefix) - 1
        yield from _slots(root, contract, place, levels, newest_first)
    except BacktestKitError as error:
        yield error
    except OSError as error:
        raise disk_error(error, "list", f"{root.path}/{place}") from error


def _slots(root: Root, contract: Contract, directory: str, levels: int, newest_first: bool) -> Found:
    """The records in files, and at its place in the order what was moved from there to quarantine."""
    found = _files_in(root, directory, levels)
    if contract.durability is Durability.RECORD:
        # Twice: a listing can miss a file that gets another name meanwhile, and a record does that only once.
        found = {**found, **_files_in(root, directory, levels)}
    kept = _files_in(root, f"{QUARANTINE}/{directory}", levels)
    ticks = {**{path.removeprefix(f"{QUARANTINE}/"): tick for path, tick in kept.items()}, **found}
    for path in sorted(ticks, key=ticks.__getitem__, reverse=newest_first):
        try:
            record = root.slots.load(contract, None, path)
        except BacktestKitError as error:
            yield error
        else:
            if record is not None:
                yield record


def _files_in(root: Root, directory: str, levels: int) -> dict[str, int]:
    """The path of each record and its tick, which is that of its successor if it has one."""
    found: dict[str, int] = {}
    for path in _below(root, directory, levels):
        for entry in root.disk.entries(f"{root.path}/{path}"):
            name = entry.name.removesuffix(NEXT)
            if name.endswith(SUFFIX):
                record = f"{path}/{name}"
                found[record] = max(_tick_of(root, entry, record), found.get(record, 0))
    return found


def _tick_of(root: Root, entry: os.DirEntry[str], record: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        return entry.stat().st_mtime_ns
    with contextlib.suppress(FileNotFoundError):  # a successor that has become the record meanwhile
        return root.disk.stat(f"{root.path}/{record}").st_mtime_ns
    return 0


def _below(root: Root, directory: str, levels: int) -> list[str]:
    """The directories `levels` below `directory`."""
    directories = [directory]
    for _ in range(levels):
        directories = [
            f"{above}/{entry.name}"
            for above in directories
            for entry in root.disk.entries(f"{root.path}/{above}")
            if entry.is_dir()
        ]
    return directories
