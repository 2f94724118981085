"""What an operator does with a root: check all of it, decide about what is in quarantine, forget what is old."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from backtest_kit.errors import Damaged, RetryLater, UserError
from backtest_kit.persist.backends.columns import SUFFIX as CANDLE_SUFFIX, verify as verify_candles
from backtest_kit.persist.backends.file_log import SUFFIX as LOG_SUFFIX
from backtest_kit.persist.backends.file_paths import (
    MARKER,
    NEXT,
    OWN_DIRECTORY,
    SUFFIX as RECORD_SUFFIX,
    is_feed,
    is_log,
    record_path,
    row_of,
    unseal_at,
)
from backtest_kit.persist.backends.file_root import Root, is_part_of_store
from backtest_kit.persist.backends.file_slots import is_torn
from backtest_kit.persist.codec import dump_record, parse, reseal, seal, unseal_line, unseal_record_line
from backtest_kit.persist.contracts import Contract, Kind
from backtest_kit.persist.files import STALE_TEMP_SECONDS, TEMP_NAME, disk_error
from backtest_kit.persist.journal import written_lines
from backtest_kit.persist.keys import unescape
from backtest_kit.persist.quarantine import DIRECTORY as QUARANTINE
from backtest_kit.persist.store import Key, Record
from backtest_kit.persist.upkeep import Finding, Quarantined

_REPORTS: Final = ("backtest", "walker")
"""Directories of reports, which runs write beside the records of the default root."""


# -- looking ---------------------------------------------------------------------------------------------


def check(root: Root, *, deep: bool) -> list[Finding]:
    """Everything that is wrong, by path. Reads every record and, if `deep`, every candle. Changes nothing.

    Raises:
        UserError: there is no store.
        RetryLater: it cannot be read.
    """
    root.require_store()
    try:
        found = [*_check_own(root), *_check_files(root, deep), *root.feeds.check()]
    except OSError as error:
        raise disk_error(error, "check", root.path) from error
    return sorted(found, key=lambda finding: finding.path)


def _check_own(root: Root) -> Iterator[Finding]:
    """What the store keeps for itself: the marker and the journals."""
    try:
        root.check_marker()
    except Damaged as error:
        yield Finding(f"{OWN_DIRECTORY}/{MARKER}", str(error))
    for entry in root.disk.entries(f"{root.path}/{OWN_DIRECTORY}/journal"):
        path = f"{OWN_DIRECTORY}/journal/{entry.name}"
        try:
            for line in written_lines(root.disk.read(entry.path)):
                parse(unseal_line(line))
        except FileNotFoundError:
            continue  # carried out while this went on
        except Damaged as error:
            yield Finding(path, f"a line of the journal is damaged, it and what follows is not carried out: {error}")


def _check_files(root: Root, deep: bool) -> list[Finding]:
    found = [
        Finding(
            f"{QUARANTINE}/{item.path}",
            f"in quarantine{', its key is blocked' * item.blocks}: {item.reason}",
            item.blocks,
        )
        for item in root.quarantine.list()
    ]
    pending = [""]
    while pending:
        directory = pending.pop()
        with root.disk.listing(f"{root.path}/{directory}") as entries:
            for entry in entries:
                path = f"{directory}{entry.name}"
                if not directory and entry.name not in _REPORTS and not is_part_of_store(entry.name):
                    found.append(Finding(path, "not a name of this store: it was not looked at", blocks=False))
                elif entry.is_dir(follow_symlinks=False):
                    if path not in (QUARANTINE, OWN_DIRECTORY):
                        pending.append(f"{path}/")
                elif TEMP_NAME.fullmatch(entry.name):
                    if time.time() - entry.stat().st_mtime > STALE_TEMP_SECONDS:
                        problem = "a write that a killed process left: removed at the next opening"
                        found.append(Finding(path, problem, blocks=False))
                elif deep or not path.endswith(CANDLE_SUFFIX):
                    found += _check_file(root, path)
    return found


def _check_file(root: Root, path: str) -> Iterator[Finding]:
    row = row_of(path)
    if row is None:
        return
    try:
        if is_log(row) and path.endswith(LOG_SUFFIX):
            yield from _check_lines(root, row, path)
            return
        data = root.disk.read(f"{root.path}/{path}")
        if row.kind is Kind.SERIES and path.endswith(CANDLE_SUFFIX):
            verify_candles(data)
        elif path.endswith(RECORD_SUFFIX):
            unseal_at(row, None, path, data)
        elif path.endswith(f"{RECORD_SUFFIX}{NEXT}"):
            if is_torn(data):
                problem = "a write that a loss of power cut short: put aside at the next opening"
                yield Finding(path, problem, blocks=False)
            else:
                unseal_at(row, None, path.removesuffix(NEXT), data)
    except FileNotFoundError:
        return  # replaced while this went on
    except (Damaged, OSError) as error:
        yield Finding(path, str(error))


def _check_lines(root: Root, row: Contract, path: str) -> Iterator[Finding]:
    end = 0
    for line in root.log.lines_of(path):
        end = line.offset + len(line.data)
        try:
            if not line.is_blank:
                unseal_record_line(row, line.data)
        except Damaged as error:
            yield Finding(f"{path} at byte {line.offset}", str(error))
    if root.disk.stat(f"{root.path}/{path}").st_size > end:
        problem = "the write of the last line was cut short: removed when the next line is written"
        yield Finding(f"{path} at byte {end}", problem, blocks=False)


def quarantined(root: Root) -> list[Quarantined]:
    """What is in quarantine, by path."""
    root.require_store()
    return sorted([*root.quarantine.list(), *root.feeds.quarantined()], key=lambda item: item.path)


def count(root: Root, namespace: str, contract: Contract) -> int:
    """How many records there are in a feed or a log, removed ones left out."""
    path = record_path(namespace, contract, ())
    root.open_to_read(path)
    if is_feed(contract):
        return root.feeds.count(contract, namespace)
    try:
        return root.log.count(path)
    except OSError as error:
        raise disk_error(error, "count", f"{root.path}/{path}") from error


def namespaces(root: Root, prefix: str) -> list[tuple[str, ...]]:
    """Every namespace below one, as the names that lead there."""
    root.open_to_read(prefix)
    found = {*_directories(root, prefix), *root.feeds.namespaces(prefix)}
    paths = {"/".join(names[:size]) for names in (path.split("/")[:-1] for path in found) for size in _lengths(names)}
    below = sorted(path.removeprefix(prefix).split("/") for path in paths if f"{path}/" != prefix)
    return [tuple(str(unescape(name[1:], "namespace") or name[1:]) for name in names) for names in below]


def _lengths(names: list[str]) -> range:
    return range(1, len(names) + 1)


def _directories(root: Root, prefix: str) -> list[str]:
    try:
        entries = root.disk.entries(f"{root.path}/{prefix}")
    except OSError as error:
        raise disk_error(error, "list", f"{root.path}/{prefix}") from error
    below = [f"{prefix}{entry.name}/" for entry in entries if entry.name.startswith("@") and entry.is_dir()]
    return [*below, *(path for directory in below for path in _directories(root, directory))]


# -- deciding about what is in quarantine ----------------------------------------------------------------


def restore(root: Root, path: str) -> Record | None:
    """Put what is in quarantine under `path` back as it is now: an operator may have mended it there.

    A record counts as a new revision, which refuses writers that have not seen it; candles are put back
    only as they were written. What has come to its place meanwhile is never replaced.

    Raises:
        UserError: nothing is called so, it has no place to go back to, it is still damaged, or something
            else is in its place.
    """
    if root.feeds.holds(path):
        return root.feeds.restore(path)
    item, row = root.quarantine.find(path), row_of(path)
    if row is None or not item.blocks:
        raise UserError(f"{path} is only kept as evidence and blocks nothing: drop it when you have seen it")
    root.checkpoint()  # else a journal could bring an older revision back
    with root.locked((_lock_of(path, row),), patient=True) as ticks:
        data = root.quarantine.read(path)
        try:
            if row.kind is Kind.SERIES:
                verify_candles(data)
                if root.disk.exists(f"{root.path}/{path}"):
                    raise _occupied(path, "a month of candles")
                root.quarantine.put_back(path)
                return None
            record = _mended(row, path, data)
        except Damaged as error:
            raise UserError(
                f"{root.quarantine.place(path)} is still damaged: {error}; mend it there, or drop it"
            ) from None
        current = _in_place(root, row, path, record)
        # A process that was killed between the two steps below has left the same record in both places.
        if current is None or not _same(current, record):
            if current is not None and current.rev >= record.rev:
                raise _occupied(path, f"revision {current.rev}, written since")
            current = msgspec.structs.replace(record, rev=record.rev + 1)
            if is_log(row):
                root.log.redo(row, _lock_of(path, row), [(current, dump_record(row, current))])
            else:
                root.slots.write_durably(path, seal(row, current), next(ticks))
        root.quarantine.release(path)
        return current


def _in_place(root: Root, row: Contract, path: str, record: Record) -> Record | None:
    """The sound record that is where that of `path` belongs. Raises `UserError` if what is there is damaged too."""
    try:
        if is_log(row):
            return root.log.find(row, _lock_of(path, row), record.key, locked=True)
        return root.slots.in_place(row, record.key, path)
    except (Damaged, IsADirectoryError) as error:
        raise UserError(f"what is at {root.path}/{path} by now cannot be read: {error}; move it away first") from None


def _same(current: Record, restored: Record) -> bool:
    return current.rev > restored.rev and _content(current) == _content(restored)


def _content(record: Record) -> tuple[object, ...]:
    return record.value, record.when, record.removed, record.written_at


def _occupied(path: str, what: str) -> UserError:
    return UserError(
        f"{path} is not put back, because {what}, is in its place and would be lost: drop what is in quarantine, "
        "or write its value again as an ordinary write"
    )


def _mended(row: Contract, path: str, data: bytes) -> Record:
    if is_log(row):
        try:
            return unseal_record_line(row, data)
        except Damaged:
            return reseal(row, data)
    try:
        return unseal_at(row, None, path, data)
    except Damaged:
        record = reseal(row, data)
        unseal_at(row, None, path, seal(row, record))
        return record


def drop(root: Root, path: str) -> Quarantined:
    """Give up what is in quarantine under `path`: its key is free and, unless it was written since, absent.

    Raises:
        UserError: nothing is called so.
    """
    if root.feeds.holds(path):
        return root.feeds.drop(path)
    item, row = root.quarantine.find(path), row_of(path)
    root.checkpoint()  # else a journal could bring an older revision back
    with root.locked((_lock_of(path, row),), patient=True):
        root.require_unjournalled(_lock_of(path, row))
        root.quarantine.release(path)
    return item


def _lock_of(path: str, row: Contract | None) -> str:
    """The lock of what was found at `path`: that of its log, or its own."""
    return path.rpartition("/")[0] if row is not None and is_log(row) else path


# -- forgetting ------------------------------------------------------------------------------------------


def prune(root: Root, namespace: str, contract: Contract, revisions: Mapping[Key, int]) -> int:
    """Forget records that still have the revision given; return how many those were.

    Raises:
        RetryLater, OutOfSpace: the disk does not let it, or a lock was kept from it for too long.
    """
    root.open()
    root.checkpoint()  # else a journal could bring them back
    # What a process writes after this list was made has another revision and stays.
    elsewhere = root.changed_by_others()
    try:
        if contract.kind is Kind.FEED:
            path = record_path(namespace, contract, ())
            if path in elsewhere:
                return 0
            if is_log(contract):
                return root.log.prune(contract, path, revisions)
            return root.feeds.prune(contract, namespace, revisions)
        pruned = 0
        for key, rev in revisions.items():
            path = record_path(namespace, contract, key)
            pruned += path not in elsewhere and _prune_file(root, contract, key, rev, path)
    except OSError as error:
        raise disk_error(error, "forget records below", root.path) from error
    return pruned


def _prune_file(root: Root, contract: Contract, key: Key, rev: int, path: str) -> bool:
    with root.locked((path,), patient=True):
        try:
            current = root.slots.load(contract, key, path, locked=True)
        except Damaged:
            return False  # every read of it says so
        if current is None or current.rev != rev:
            return False
        root.slots.remove(path)
        return True


def forget(root: Root, prefix: str) -> None:
    """Forget whatever lies in a namespace; what is in quarantine stays there.

    Raises:
        RetryLater: another process was writing there a moment ago, or the disk does not let it.
    """
    root.open()
    root.checkpoint()
    if any(path.startswith(prefix) for path in root.changed_by_others()):
        raise RetryLater(f"another process was writing below {root.path}/{prefix} just now: try again in some seconds")
    try:
        root.feeds.forget(prefix)
        root.log.forget_below(prefix)
        root.slots.forget_below(prefix)
    except OSError as error:
        raise disk_error(error, "forget", f"{root.path}/{prefix}") from error
