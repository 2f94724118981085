"""What an operator does with a root: check all of it, decide about what is in quarantine, forget what is old."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from backtest_kit.errors import Damaged, RetryLater, UserError
from backtest_kit.persist.backends.columns import SUFFIX as CANDLE_SUFFIX, verify as verify_candles
from backtest_kit.persist.backends.file_paths import (
    MARKER,
    NEXT,
    OWN_DIRECTORY,
    SUFFIX as RECORD_SUFFIX,
    row_of,
    unseal_at,
)
from backtest_kit.persist.backends.file_root import Root, newest
from backtest_kit.persist.backends.file_segments import SUFFIX as FEED_SUFFIX, Line
from backtest_kit.persist.backends.file_successors import is_torn
from backtest_kit.persist.codec import dump_record, open_envelope, parse, reseal, seal, unseal_line
from backtest_kit.persist.contracts import ALL_CONTRACTS, Contract, Kind
from backtest_kit.persist.files import STALE_TEMP_SECONDS, TEMP_NAME, disk_error
from backtest_kit.persist.journal import written_lines
from backtest_kit.persist.quarantine import DIRECTORY as QUARANTINE
from backtest_kit.persist.store import Key, Record
from backtest_kit.persist.upkeep import Finding, Quarantined

_REPORTS: Final = ("backtest", "walker")
"""Directories of reports, which runs write beside the records of the default root."""
_KNOWN: Final = frozenset((*ALL_CONTRACTS, *_REPORTS, QUARANTINE, OWN_DIRECTORY))


def check(root: Root, *, deep: bool) -> list[Finding]:
    """Everything that is wrong, by path. Reads every record and, if `deep`, every candle. Changes nothing.

    Raises:
        UserError: there is no store.
        RetryLater: it cannot be read.
    """
    root.require_store()
    try:
        return sorted([*_check_own(root), *_check_files(root, deep)], key=lambda finding: finding.path)
    except OSError as error:
        raise disk_error(error, "check", root.path) from error


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
                if not directory and entry.name not in _KNOWN and not entry.name.startswith("@"):
                    found.append(
                        Finding(path, "nothing of this store is called so: it was not looked at", blocks=False)
                    )
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


def restore(root: Root, path: str) -> Record | None:
    """Put what is in quarantine under `path` back, as it is now: an operator may have mended it there.

    A record counts as a new revision, which refuses writers that have not seen it; candles are put back
    only as they were written. What has come to its place meanwhile is never replaced.

    Raises:
        UserError: nothing is called so, it has no place to go back to, it is still damaged, or something
            else is in its place.
    """
    item = root.quarantine.find(path)
    row = row_of(path)
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
            record = _next_revision(record)
            if row.kind is Kind.FEED:
                feed = root.feed(row, path.rpartition("/")[0])
                feed.append([Line(next(ticks), record, dump_record(row, record))])
                root.disk.sync_file(f"{root.path}/{feed.path}/{feed.tail_name}")
            else:
                root.writes.write_durably(path, seal(row, record), next(ticks))
            current = record
        root.quarantine.release(path)
        if row.kind is Kind.FEED:
            root.feed(row, path.rpartition("/")[0]).forget()
        return current


def _in_place(root: Root, row: Contract, path: str, record: Record) -> Record | None:
    """The sound record that is where that of `path` belongs. Raises `UserError` if what is there is damaged too."""
    try:
        if row.kind is Kind.FEED:
            return root.feed(row, path.rpartition("/")[0]).find(record.key, locked=True, despite_block=True)
        successor = root.successors.load(row, record.key, path, locked=True)
        try:
            current = unseal_at(row, record.key, path, root.disk.read(f"{root.path}/{path}"))
        except FileNotFoundError:
            return successor
        return newest(current, successor)
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


def drop(root: Root, path: str) -> Quarantined:
    """Give up what is in quarantine under `path`: its key is free and, unless it was written since, absent.

    Raises:
        UserError: nothing is called so.
    """
    item = root.quarantine.find(path)
    root.checkpoint()  # else a journal could bring an older revision back
    row = row_of(path)
    with root.locked((_lock_of(path, row),), patient=True):
        root.require_unjournalled(_lock_of(path, row))
        root.quarantine.release(path)
        if row is not None and row.kind is Kind.FEED:
            root.feed(row, path.rpartition("/")[0]).forget()
    return item


def prune(root: Root, contract: Contract, doomed: Mapping[str, Mapping[Key, int]]) -> int:
    """Forget records, by path, that still have the revision given; return how many those were.

    Raises:
        RetryLater, OutOfSpace: the disk does not let it, or a lock was kept from it for too long.
    """
    root.open()
    root.checkpoint()  # else a journal could bring them back
    # What a process writes after this list was made has another revision and stays.
    elsewhere = root.changed_by_others()
    pruned = 0
    try:
        for path, revisions in doomed.items():
            if path in elsewhere:
                continue
            if contract.kind is Kind.FEED:
                pruned += root.feed(contract, path).prune(revisions)
                continue
            for key, rev in revisions.items():
                pruned += _prune_file(root, contract, key, rev, path)
    except OSError as error:
        raise disk_error(error, "forget records below", root.path) from error
    return pruned


def _prune_file(root: Root, contract: Contract, key: Key, rev: int, path: str) -> bool:
    with root.locked((path,), patient=True):
        try:
            current = root.load(contract, key, path, locked=True)
        except Damaged:
            return False  # it is told to whoever reads it
        if current is None or current.rev != rev:
            return False
        root.writes.remove(path)
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
        root.forget_below(prefix)
    except OSError as error:
        raise disk_error(error, "forget", f"{root.path}/{prefix}") from error


def _check_file(root: Root, path: str) -> Iterator[Finding]:
    row = row_of(path)
    if row is None:
        return
    try:
        data = root.disk.read(f"{root.path}/{path}")
        if row.kind is Kind.SERIES and path.endswith(CANDLE_SUFFIX):
            verify_candles(data)
        elif row.kind is Kind.FEED and path.endswith(FEED_SUFFIX):
            yield from _check_lines(row, path, data)
        elif path.endswith(RECORD_SUFFIX):
            unseal_at(row, None, path, data)
        elif path.endswith(f"{RECORD_SUFFIX}{NEXT}"):
            if is_torn(data):
                problem = "a write that a loss of power cut short: put aside at the next opening"
                yield Finding(path, problem, blocks=False)
            else:
                unseal_at(row, None, path.removesuffix(NEXT), data)
    except FileNotFoundError:
        return  # replaced or merged while this went on
    except (Damaged, OSError) as error:
        yield Finding(path, str(error))


def _check_lines(row: Contract, path: str, data: bytes) -> Iterator[Finding]:
    offset = 0
    for line in data.split(b"\n"):
        if not line.isspace() and line:
            try:
                open_envelope(row, None, parse(unseal_line(line)))
            except Damaged as error:
                torn = offset + len(line) == len(data)
                problem = "the write of the last line was cut short: removed at the next use" if torn else str(error)
                yield Finding(f"{path} at byte {offset}", problem, blocks=not torn)
        offset += len(line) + 1


def _lock_of(path: str, row: Contract | None) -> str:
    return path.rpartition("/")[0] if row is not None and row.kind is Kind.FEED else path


def _mended(row: Contract, path: str, data: bytes) -> Record:
    if row.kind is Kind.FEED:
        try:
            return open_envelope(row, None, parse(unseal_line(data)))
        except Damaged:
            return open_envelope(row, None, parse(data[data.find(b"{") :]))
    try:
        return unseal_at(row, None, path, data)
    except Damaged:
        record = reseal(row, data)
        unseal_at(row, None, path, seal(row, record))
        return record


def _next_revision(record: Record) -> Record:
    return msgspec.structs.replace(record, rev=record.rev + 1)
