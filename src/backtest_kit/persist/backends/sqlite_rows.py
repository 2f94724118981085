"""The rows of an SQLite store: how they are found, verified, listed and written, each over a given connection.

A row holds the sealed text of its record, so the checksum of the codec covers what SQLite itself does not check; the
other columns only serve to find it, and are compared with the record. Every row is in two trees by its name and in
one by its order. A miss counts if both trees say so, and a listing if two trees have the same rows: a page that was
damaged on the disk belongs to one tree only.
"""

from __future__ import annotations

import sqlite3
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any, Final, NamedTuple

import msgspec

from backtest_kit.errors import BacktestKitError, Damaged, UserError
from backtest_kit.persist.codec import dump_record, reseal, seal, seal_text, unseal, unseal_head
from backtest_kit.persist.contracts import ALL_CONTRACTS, Contract, Durability, WriteRule
from backtest_kit.persist.keys import check_key, path_of
from backtest_kit.persist.store import Key, Record, Write
from backtest_kit.persist.upkeep import Finding, Quarantined
from backtest_kit.persist.writing import decide, now_ms

CHUNK: Final = 256
"""Rows in one step: a writer waits for the end of each."""

_BY_NAME: Final = "SELECT id FROM records INDEXED BY records_by_name WHERE namespace = ? AND contract = ? AND key = ?"
_BY_KEY: Final = "SELECT id FROM records INDEXED BY records_by_key WHERE namespace = ? AND contract = ? AND key = ?"
_BY_NAMESPACE: Final = ("records_by_name", "records_in_order")
_COLUMNS: Final = (
    "coalesce(CAST(namespace AS TEXT), ''), coalesce(CAST(contract AS TEXT), ''), coalesce(CAST(key AS TEXT), ''), "
    "removed, coalesce(CAST(record AS BLOB), x'') FROM records NOT INDEXED"
)
"""Of a row, of the types that they should have whatever a damaged page says."""
_ROW: Final = f"SELECT {_COLUMNS} WHERE id = ?"
_WRITE: Final = """
    INSERT INTO records (namespace, contract, key, removed, record, seq)
    VALUES (?1, ?2, ?3, ?4, ?5,
        (SELECT coalesce(max(seq), 0) + 1 FROM records WHERE namespace = ?1 AND contract = ?2))
    ON CONFLICT (namespace, contract, key)
    DO UPDATE SET removed = excluded.removed, record = excluded.record, seq = excluded.seq
"""
"""In place, where there is a row: replacing it would touch more pages, and every page is synced."""
_QUARANTINE: Final = (
    "INSERT OR IGNORE INTO quarantine (found_at, namespace, contract, key, reason, record) VALUES (?, ?, ?, ?, ?, ?)"
)
_REBUILD: Final = (
    'stop every process, run `python -m sqlite3 {0} "REINDEX"` (Python 3.12 or newer, or the sqlite3 program), and '
    "`backtest-kit store check --store sqlite:{0}` afterwards; if that finds anything, restore a copy of the file"
)

Name = tuple[str, str, str]
"""Namespace, contract and key as they stand in the columns."""


class Suspect(NamedTuple):
    """A row that cannot be trusted."""

    name: Name
    data: bytes
    error: Damaged


class Change(NamedTuple):
    """A write on its way to the database."""

    write: Write
    name: Name
    value: bytes


def read(
    contract: Contract,
    name: Name,
    key: Key,
    connection: sqlite3.Connection,
    open_sealed: Callable[[Contract, Key | None, bytes], Record] = unseal,
) -> Record | Suspect | None:
    """The record of a name, or None if no index knows the name."""
    number, is_whole = _find(name, connection)
    if number is None:
        return None
    row = connection.execute(_ROW, (number,)).fetchone()
    if row is None:
        return Suspect(name, b"", Damaged("its row is missing, although the index leads there"))
    if not is_whole:
        return Suspect(name, row[4], Damaged("one index of the database has lost it, and the other one has not"))
    return _open(contract, name, key, row, open_sealed)


def read_all(
    contract: Contract, namespace: str, numbers: Iterable[int], connection: sqlite3.Connection
) -> list[Record | Suspect]:
    """The records in rows that were listed. What was pruned since is left out.

    Raises:
        Damaged: an index leads to a row that is not there.
    """
    found = []
    for number in numbers:
        row = connection.execute(_ROW, (number,)).fetchone()
        if row is None:
            _require_unlisted(contract, namespace, number, connection)
            continue
        name = row[0], row[1], row[2]
        if name[:2] == (namespace, contract.name):
            found.append(_open(contract, name, None, row))
        elif _find(name, connection) != (number, True):
            # Else the listed row was pruned, and its number is that of another record now.
            name = namespace, contract.name, row[2]
            found.append(Suspect(name, row[4], Damaged(f"its row is called {path_to(row[:3])}")))
    return found


def list_numbers(
    prefix: Name,
    contract: Contract,
    limit: int | None,
    newest_first: bool,
    include_removed: bool,
    connection: sqlite3.Connection,
) -> array[int]:
    """The numbers of the rows of a contract whose key begins with that of `prefix`, in the order of writing.

    Raises:
        Damaged: two indexes disagree about which rows there are. Where `limit` ends the listing, only those of
            money class are compared: it reads all of them.
    """
    namespace, name, start = prefix
    # A slash never stands inside a component, and "0" is the character after it.
    inside = "AND (key = :start OR key > :start || '/' AND key < :start || '0')" if start else ""
    # What was removed is passed over when it is read, and here only where it would count.
    present = "" if include_removed or limit is None else "AND NOT removed"
    index, other = ("records_by_name", "records_by_key") if start else ("records_in_order", "records_by_name")
    where = f"WHERE namespace = :namespace AND contract = :contract {inside}"
    values = {"namespace": namespace, "contract": name, "start": start, "limit": -1 if limit is None else limit}
    connection.execute("BEGIN")
    try:
        if limit is None or contract.durability is Durability.MONEY:
            totals = {
                connection.execute(
                    f"SELECT count(*), coalesce(sum(id), 0) FROM records INDEXED BY {each} {where}",  # noqa: S608
                    values,
                ).fetchone()
                for each in (index, other)
            }
            if len(totals) > 1:
                raise _disagreement(f"records of {contract.name}", connection)
        rows = connection.execute(
            f"SELECT id FROM records INDEXED BY {index} {where} {present} "  # noqa: S608
            f"ORDER BY seq {'DESC' if newest_first else ''} LIMIT :limit",
            values,
        )
        return array("q", (number for (number,) in rows))
    finally:
        connection.execute("COMMIT")


def _find(name: Name, connection: sqlite3.Connection) -> tuple[int | None, bool]:
    """The number of the row of a name, and whether the first index leads there, which it does in a sound file."""
    row = connection.execute(_BY_NAME, name).fetchone()
    if row is not None:
        return row[0], True
    row = connection.execute(_BY_KEY, name).fetchone()
    return (None, True) if row is None else (row[0], False)


def _open(
    contract: Contract,
    name: Name,
    key: Key | None,
    row: tuple[str, str, str, int, bytes],
    open_sealed: Callable[[Contract, Key | None, bytes], Record] = unseal,
) -> Record | Suspect:
    *found, removed, data = row
    try:
        if tuple(found) != name:
            raise Damaged(f"its row is called {path_to((found[0], found[1], found[2]))}")
        record = open_sealed(contract, key, data)
        if key is None and (path := "/".join(path_of(contract, record.key))) != name[2]:
            wrong, name = name[2], (*name[:2], path)
            raise Damaged(f"its row is called {wrong}")
        if removed != record.removed:
            raise Damaged("its row and its record differ in whether it was removed")
    except Damaged as error:
        return Suspect(name, data, error)
    return record


def _require_unlisted(contract: Contract, namespace: str, number: int, connection: sqlite3.Connection) -> None:
    """Raise `Damaged` if a row that is not there is still in the order of its contract: it was not pruned."""
    listed = connection.execute(
        "SELECT 1 FROM records INDEXED BY records_in_order WHERE namespace = ? AND contract = ? AND id = ?",
        (namespace, contract.name, number),
    )
    if listed.fetchone() is not None:
        raise _disagreement(f"records of {contract.name}", connection)


def _disagreement(of_what: str, connection: sqlite3.Connection) -> Damaged:
    path = connection.execute("PRAGMA database_list").fetchone()[2]
    return Damaged(
        f"{path} is damaged: its indexes disagree about which {of_what} there are. Nothing was "
        f"changed: {_REBUILD.format(path)}"
    )


def count(name: Name, connection: sqlite3.Connection) -> int:
    """How many records of a contract there are.

    Raises:
        Damaged: two indexes disagree about that.
    """
    counts = {
        connection.execute(
            f"SELECT count(*) FROM records INDEXED BY {index} "  # noqa: S608
            "WHERE namespace = ? AND contract = ? AND NOT removed",
            name[:2],
        ).fetchone()[0]
        for index in _BY_NAMESPACE
    }
    if len(counts) > 1:
        raise _disagreement(f"records of {name[1]}", connection)
    return int(counts.pop())


def apply(changes: Sequence[Change], connection: sqlite3.Connection) -> list[Record] | Suspect:
    """Judge every write before the first is done, so that a refused one has changed nothing."""
    records, rows = [], []
    for write, name, value in changes:
        first_wins = write.contract.write_rule is not WriteRule.REPLACE
        current = read(write.contract, name, write.key, connection, unseal if first_wins else unseal_head)
        if isinstance(current, Suspect):
            return current
        record, changed = decide(write, current)
        records.append(record)
        if changed:
            rows.append((*name, record.removed, seal_text(dump_record(write.contract, record, value))))
    for row in rows:
        connection.execute(_WRITE, row)
    return records


def apply_each(changes: Sequence[Change], connection: sqlite3.Connection) -> list[Record | BaseException | Suspect]:
    done: list[Record | BaseException | Suspect] = []
    for change in changes:
        try:
            applied = apply((change,), connection)
        except BacktestKitError as error:
            done.append(error)
        else:
            done.append(applied if isinstance(applied, Suspect) else applied[0])
    return done


def prune(contract: Contract, doomed: Sequence[tuple[Name, Key, int]], connection: sqlite3.Connection) -> int:
    pruned = 0
    for name, key, rev in doomed:
        found = read(contract, name, key, connection, unseal_head)
        if isinstance(found, Record) and found.rev == rev:
            connection.execute("DELETE FROM records WHERE namespace = ? AND contract = ? AND key = ?", name)
            pruned += 1
    return pruned


def forget(namespace: str, connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM records WHERE substr(namespace, 1, ?) = ?", (len(namespace), namespace))


def keep_copy(suspect: Suspect, connection: sqlite3.Connection) -> None:
    connection.execute(_QUARANTINE, (now_ms(), *suspect.name, str(suspect.error), suspect.data))


def check_rows(after: int, connection: sqlite3.Connection, *, money_only: bool = False) -> tuple[int, list[Finding]]:
    """What is wrong in the next rows behind number `after`, and the number of the last of them; 0 behind the end."""
    contracts = [row.name for row in ALL_CONTRACTS.values() if row.durability is Durability.MONEY]
    wanted = f"AND contract IN ({', '.join('?' * len(contracts))})" if money_only else ""
    rows = connection.execute(
        f"SELECT id, {_COLUMNS} WHERE id > ? {wanted} ORDER BY id LIMIT ?",
        (after, *(contracts if money_only else ()), CHUNK),
    ).fetchall()
    found = [_check_row(row) for _, *row in rows]
    return (rows[-1][0] if rows else 0), [finding for finding in found if finding is not None]


def check_integrity(connection: sqlite3.Connection) -> list[Finding]:
    """What SQLite finds: pages, the order in each tree, every row in every index and nothing else in them."""
    rows = connection.execute("PRAGMA integrity_check").fetchall()
    return [Finding("the database", text) for (text,) in rows if text != "ok"]


def _check_row(row: Sequence[Any]) -> Finding | None:
    namespace, name, key, *_ = row
    contract = ALL_CONTRACTS.get(name)
    if contract is None:
        return Finding(path_to((namespace, name, key)), f"no contract of this version is called {name!r}")
    found = _open(contract, (namespace, name, key), None, tuple(row))
    return Finding(path_to(found.name), str(found.error)) if isinstance(found, Suspect) else None


def list_namespaces(above: str, connection: sqlite3.Connection) -> list[str]:
    """The namespaces that begin with `above`.

    Raises:
        Damaged: two indexes disagree about which there are.
    """
    first, second = (
        connection.execute(
            f"SELECT DISTINCT namespace FROM records INDEXED BY {index} WHERE namespace > ? ORDER BY 1",  # noqa: S608
            (above,),
        ).fetchall()
        for index in _BY_NAMESPACE
    )
    if first != second:
        raise _disagreement("namespaces", connection)
    return [namespace for (namespace,) in first if namespace.startswith(above)]


def path_to(name: Name) -> str:
    """A row's name in the operations on the quarantine, in the form that files have theirs."""
    namespace, contract, key = name
    return f"{directory_of(namespace)}{contract}/{key}"


def directory_of(namespace: str) -> str:
    return "".join(f"@{part}/" for part in namespace.split("/")[:-1])


def is_candles(path: str) -> bool:
    return next((part for part in path.split("/") if not part.startswith("@")), "") == "candle"


def list_quarantine(connection: sqlite3.Connection) -> list[Quarantined]:
    rows = connection.execute(
        "SELECT namespace, contract, key, reason, max(found_at) FROM quarantine GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    )
    return [
        Quarantined(path_to((namespace, contract, key)), contract, key.split("/"), reason, found_at)
        for namespace, contract, key, reason, found_at in rows
    ]


def _find_in_quarantine(path: str, connection: sqlite3.Connection) -> tuple[Name, Quarantined]:
    parts = path.split("/")
    depth = sum(1 for _ in takewhile(lambda part: part.startswith("@"), parts))
    for item in list_quarantine(connection):
        if item.path == path:
            namespace = "".join(f"{part[1:]}/" for part in parts[:depth])
            return (namespace, item.contract, "/".join(parts[depth + 1 :])), item
    raise UserError(f"nothing in quarantine is called {path!r}: see `backtest-kit store quarantine list`")


def restore(path: str, connection: sqlite3.Connection) -> Record:
    """As `Store.restore`. Where an index or the name in the row was the damage, that is mended as well."""
    name, _ = _find_in_quarantine(path, connection)
    contract = ALL_CONTRACTS[name[1]]
    number, _ = _find(name, connection)
    row = connection.execute(_ROW, (number,)).fetchone()
    try:
        record = reseal(contract, b"" if row is None else row[4])
        if "/".join(path_of(contract, check_key(contract, record.key))) != name[2]:
            raise Damaged(f"it is the record of {record.key}")
    except Damaged as error:
        raise UserError(f"{path} is still damaged: {error}; mend its row in `records`, or drop it") from None
    connection.execute("REINDEX records")
    connection.execute("UPDATE records SET namespace = ?, contract = ?, key = ? WHERE id = ?", (*name, number))
    # No process that knew the record before the damage may take this one for it.
    record = msgspec.structs.replace(record, rev=record.rev + 1)
    connection.execute(_WRITE, (*name, record.removed, seal(contract, record)))
    connection.execute("DELETE FROM quarantine WHERE namespace = ? AND contract = ? AND key = ?", name)
    return record


def drop(path: str, connection: sqlite3.Connection) -> Quarantined:
    """As `Store.drop`."""
    name, item = _find_in_quarantine(path, connection)
    number, _ = _find(name, connection)
    connection.execute("REINDEX records")
    connection.execute("DELETE FROM records WHERE id = ?", (number,))
    connection.execute("DELETE FROM quarantine WHERE namespace = ? AND contract = ? AND key = ?", name)
    return item
