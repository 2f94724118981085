# ruff: noqa: S608 - what is written into a statement are names of the dialect; every value is bound
"""Records in a SQL database, for any DB-API connection: the statements, and the decide loop.

A row holds the sealed text of its record, so the checksum of the codec covers what the database itself does not check;
the other columns only serve to find it, and are compared with the record. Where a database does not verify its own
pages, every row is in two trees by its name and in one by its order: a miss counts if both trees agree, and a listing
if two trees have the same rows. A damaged page belongs to one tree only.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from backtest_kit.errors import BacktestKitError, Damaged, UserError
from backtest_kit.persist.backends.sql_dialect import Connection, Dialect, Name, name_of, path_to
from backtest_kit.persist.codec import (
    NewerSchema,
    dump_record,
    dump_value,
    reseal,
    seal,
    seal_text,
    unseal,
    unseal_head,
)
from backtest_kit.persist.contracts import ALL_CONTRACTS, Contract, Durability, WriteRule
from backtest_kit.persist.keys import check_key
from backtest_kit.persist.store import Key, Record, Selection, Write
from backtest_kit.persist.upkeep import Finding, Quarantined
from backtest_kit.persist.writing import decide, now_ms

CHUNK: Final = 256
"""Rows in one step: a writer waits for the end of each."""

Unseal = Callable[[Contract, Key | None, bytes], Record]


class Suspect(Damaged):
    """A row that cannot be trusted."""

    def __init__(self, name: Name, data: bytes, why: BacktestKitError | str) -> None:
        super().__init__(str(why))
        self.name = name
        self.data = data
        self.is_newer = isinstance(why, NewerSchema)


class Change(NamedTuple):
    """A write on its way to the database, its value written out."""

    write: Write
    name: Name
    value: bytes


def change_of(write: Write, namespace: str) -> Change:
    """`write` as it is now: no later change of its value reaches the database.

    Raises:
        UserError: its key or its value is none.
    """
    key = check_key(write.contract, write.key)
    return Change(write, name_of(namespace, write.contract, key), dump_value(write.value))


class Rows:
    """The rows of one database. Every method takes the connection; those that change something, in a transaction."""

    def __init__(self, dialect: Dialect, database: str) -> None:
        self._dialect = dialect
        self._database = database
        by_name, by_key = map(dialect.index.format, ("records_by_name", "records_by_key"))
        found = "namespace = ? AND contract = ? AND key = ?"
        row = f"SELECT kept.id, {dialect.columns} FROM records AS kept {dialect.table}"
        # The row by its number, because an index that has all the columns of a name would answer with its own.
        self._by_name = self._sql(
            f"SELECT found.id, kept.id, {dialect.columns} FROM records AS found {by_name} LEFT JOIN records AS kept "
            f"{dialect.table} ON kept.id = found.id WHERE found.namespace = ? AND found.contract = ? AND found.key = ?"
        )
        self._by_key = self._sql(f"SELECT id FROM records {by_key} WHERE {found}")
        self._by_id = self._sql(f"{row} WHERE kept.id = ?")
        self._behind = f"{row} WHERE kept.id > ?"
        # In place, where there is a row: replacing it would touch more pages, and every page is synced.
        self._write = self._sql(
            "INSERT INTO records (namespace, contract, key, removed, record, seq) VALUES (?, ?, ?, ?, ?, "
            "(SELECT coalesce(max(seq), 0) + 1 FROM records WHERE namespace = ? AND contract = ?)) "
            "ON CONFLICT (namespace, contract, key) "
            "DO UPDATE SET removed = excluded.removed, record = excluded.record, seq = excluded.seq"
        )
        self._keep = self._sql(
            "INSERT INTO quarantine (namespace, contract, key, record, reason, found_at) SELECT ?, ?, ?, ?, ?, ? "
            f"WHERE NOT EXISTS (SELECT 1 FROM quarantine WHERE {found} AND record = ?)"
        )
        self._release = self._sql(f"DELETE FROM quarantine WHERE {found}")
        self._delete = self._sql("DELETE FROM records WHERE id = ?")

    def _sql(self, statement: str) -> str:
        return statement.replace("?", self._dialect.parameter)

    # -- reading -------------------------------------------------------------------------------------

    def read(
        self, contract: Contract, name: Name, key: Key, connection: Connection, unseal: Unseal = unseal
    ) -> Record | None:
        """The record of a key, which `name_of` calls `name`; None if no index knows that.

        Raises:
            Suspect: it is there and cannot be trusted.
        """
        found = self._find(name, connection)
        return None if found is None else _open(contract, name, key, found[1], unseal)

    def read_all(
        self, contract: Contract, namespace: str, numbers: Iterable[int], connection: Connection
    ) -> list[Record | Suspect]:
        """The records in rows that were listed. What was pruned since is left out.

        Raises:
            Damaged: an index leads to a row that is not there.
        """
        found: list[Record | Suspect] = []
        for number in numbers:
            row = connection.execute(self._by_id, (number,)).fetchone()
            if row is None:
                self._require_unlisted(contract, namespace, number, connection)
                continue
            name = row[1], row[2], row[3]
            try:
                if name[:2] == (namespace, contract.name):
                    found.append(_open(contract, name, None, row[1:]))
                elif self._number_of(name, connection) != number:
                    # Else the listed row was pruned, and its number is that of another record now.
                    found.append(Suspect((namespace, contract.name, row[3]), row[5], _misnamed(name)))
            except Suspect as suspect:
                found.append(suspect)
        return found

    def list_numbers(self, wanted: Selection, namespace: str, connection: Connection) -> array[int]:
        """The numbers of the rows that are wanted, in the order of writing; without a limit, removed ones too.

        Raises:
            Damaged: two indexes disagree about which rows there are. Where a limit ends the listing, only those of
                money class are compared: it reads all of them.
        """
        contract, prefix, limit = wanted.contract, wanted.prefix, wanted.limit
        *values, start = name_of(namespace, contract, prefix)
        where, indexes = "namespace = ? AND contract = ?", ("records_in_order", "records_by_name")
        if start:
            # A slash never stands inside a component, and "0" is the character after it.
            where, indexes = f"{where} AND (key = ? OR key > ? AND key < ?)", ("records_by_name", "records_by_key")
            values += [start, f"{start}/", f"{start}0"]
        if limit is None or contract.durability is Durability.MONEY:
            self._compare(indexes, where, values, f"records of {contract.name}", connection)
        # What was removed is passed over when it is read, and here only where it would count.
        present = "" if wanted.include_removed or limit is None else "AND removed = 0"
        bound = "" if limit is None else f"LIMIT {limit:d}"
        rows = connection.execute(
            self._sql(
                f"SELECT id FROM records {self._dialect.index.format(indexes[0])} WHERE {where} {present} "
                f"ORDER BY seq {'DESC' if wanted.newest_first else ''} {bound}"
            ),
            values,
        )
        return array("q", (number for (number,) in rows))

    def count(self, contract: Contract, namespace: str, connection: Connection) -> int:
        """How many records of a contract there are.

        Raises:
            Damaged: two indexes disagree about that.
        """
        where, values = "namespace = ? AND contract = ? AND removed = 0", [namespace, contract.name]
        indexes = ("records_by_name", "records_in_order")
        return self._compare(indexes, where, values, f"records of {contract.name}", connection)

    def list_namespaces(self, above: str, connection: Connection) -> list[str]:
        """The namespaces that begin with `above`.

        Raises:
            Damaged: two indexes disagree about which there are.
        """
        indexes = ("records_by_name", "records_in_order")[: 2 if self._dialect.index else 1]
        first, *others = (
            connection.execute(
                self._sql(
                    f"SELECT DISTINCT namespace FROM records {self._dialect.index.format(index)} "
                    "WHERE namespace > ? ORDER BY 1"
                ),
                (above,),
            ).fetchall()
            for index in indexes
        )
        if any(other != first for other in others):
            raise self._disagreement("namespaces")
        return [namespace for (namespace,) in first if namespace.startswith(above)]

    def _find(self, name: Name, connection: Connection) -> tuple[int, Sequence[Any]] | None:
        """The number and the columns of the row of a name. Raises `Suspect` if the indexes and the table disagree."""
        row = connection.execute(self._by_name, name).fetchone()
        if row is None:
            lost = self._number_by_key(name, connection)
            if lost is None:
                return None
            row = connection.execute(self._by_id, (lost,)).fetchone()
            data = b"" if row is None else row[5]
            raise Suspect(name, data, "one index of the database has lost it, and the other one has not")
        if row[1] is None:
            raise Suspect(name, b"", "its row is missing, although the index leads there")
        return row[0], row[2:]

    def _number_of(self, name: Name, connection: Connection) -> int | None:
        """Where the first index leads, or the second one if the first has lost it."""
        row = connection.execute(self._by_name, name).fetchone()
        return row[0] if row is not None else self._number_by_key(name, connection)

    def _number_by_key(self, name: Name, connection: Connection) -> int | None:
        row = connection.execute(self._by_key, name).fetchone() if self._dialect.index else None
        return None if row is None else row[0]

    def _compare(
        self, indexes: tuple[str, str], where: str, values: Sequence[object], of_what: str, connection: Connection
    ) -> int:
        """How many rows there are. Raises `Damaged` if two indexes disagree."""
        # One statement reads both, so no commit comes between them.
        used = indexes if self._dialect.index else indexes[:1]
        sums = [
            f"(SELECT count(*) AS n, coalesce(sum(id), 0) AS ids FROM records {self._dialect.index.format(index)} "
            f"WHERE {where}) AS {index}"
            for index in used
        ]
        row = connection.execute(self._sql(f"SELECT * FROM {', '.join(sums)}"), [*values] * len(used)).fetchone()
        if row[:2] != row[-2:]:
            raise self._disagreement(of_what)
        return int(row[0])

    def _require_unlisted(self, contract: Contract, namespace: str, number: int, connection: Connection) -> None:
        """Raise `Damaged` if a row that is not there is still in the order of its contract: it was not pruned."""
        listed = connection.execute(
            self._sql(
                f"SELECT 1 FROM records {self._dialect.index.format('records_in_order')} "
                "WHERE namespace = ? AND contract = ? AND id = ?"
            ),
            (namespace, contract.name, number),
        )
        if listed.fetchone() is not None:
            raise self._disagreement(f"records of {contract.name}")

    def _disagreement(self, of_what: str) -> Damaged:
        return Damaged(
            f"{self._database} is damaged: its indexes disagree about which {of_what} there are. Nothing was "
            f"changed: {self._dialect.remedy.format(self._database)}"
        )

    # -- writing -------------------------------------------------------------------------------------

    def apply(self, changes: Sequence[Change], connection: Connection) -> list[Record]:
        """Judge every write before the first is done, so that a refused one has changed nothing.

        Raises:
            Conflict, Damaged: as `Store.batch`. Of damage, a copy is kept.
        """
        records, rows = [], []
        for write, name, value in changes:
            # Only a write that replaces can do without the value that is there.
            opened = unseal_head if write.contract.write_rule is WriteRule.REPLACE else unseal
            current = self.head(write.contract, name, write.key, connection, opened)
            record, changed = decide(write, current)
            records.append(record)
            if changed:
                rows.append((name, record, dump_record(write.contract, record, value)))
        for name, record, dumped in rows:
            self.write(name, record, dumped, connection)
        return records

    def apply_each(self, changes: Sequence[Change], connection: Connection) -> list[Record | BaseException]:
        """Each of the writes on its own: its record, or what it was refused for."""
        done: list[Record | BaseException] = []
        for change in changes:
            try:
                done += self.apply((change,), connection)
            except BacktestKitError as error:
                done.append(error)
        return done

    def head(
        self, contract: Contract, name: Name, key: Key, connection: Connection, unseal: Unseal = unseal_head
    ) -> Record | None:
        """What a key holds, before it is replaced. Damaged bytes are copied to the quarantine first."""
        try:
            return self.read(contract, name, key, connection, unseal)
        except Suspect as suspect:
            raise self.keep_copy(suspect, connection) from None

    def write(self, name: Name, record: Record, dumped: bytes, connection: Connection) -> None:
        """Store what `dump_record` made of `record`, as the last of its contract."""
        connection.execute(self._write, (*name, int(record.removed), seal_text(dumped), *name[:2]))

    def prune(
        self, contract: Contract, namespace: str, revisions: Iterable[tuple[Key, int]], connection: Connection
    ) -> int:
        pruned = 0
        for key, rev in revisions:
            try:
                found = self._find(name := name_of(namespace, contract, key), connection)
                if found is not None and _open(contract, name, key, found[1], unseal_head).rev == rev:
                    connection.execute(self._delete, (found[0],))
                    pruned += 1
            except Suspect:
                continue  # the next read reports it
        return pruned

    def forget(self, namespace: str, connection: Connection) -> None:
        statement = "DELETE FROM records WHERE substr(namespace, 1, ?) = ?"
        connection.execute(self._sql(statement), (len(namespace), namespace))

    # -- damage --------------------------------------------------------------------------------------

    def keep_copy(self, suspect: Suspect, connection: Connection) -> Damaged:
        """Keep a copy of the bytes, and return what happened. The row stays: it is what blocks the key."""
        if not suspect.is_newer:
            copy = (*suspect.name, suspect.data)
            connection.execute(self._keep, (*copy, str(suspect), now_ms(), *copy))
        return self.blocked(suspect)

    def blocked(self, suspect: Suspect, no_copy: BacktestKitError | None = None) -> Damaged:
        """What to say of a row; `no_copy` is why none could be kept."""
        where = f"{self._database}: {suspect.name[1]} {suspect.name[2]}: {suspect}"
        if suspect.is_newer:
            return NewerSchema(where)
        if no_copy is not None:
            return Damaged(f"{where}. It stays there and blocks its key; no copy is kept: {no_copy}")
        path = path_to(suspect.name)
        return Damaged(
            f"{where}. A copy is in quarantine and the key is blocked: "
            f"`backtest-kit store quarantine restore {path}` accepts it as it is, `... drop {path}` gives it up"
        )

    def check(self, after: int, connection: Connection, *, money_only: bool = False) -> tuple[int, list[Finding]]:
        """What is wrong in the next rows behind number `after`, and the number of the last one; 0 behind the end.

        What is in quarantine is left out.
        """
        wanted = (
            [row.name for row in ALL_CONTRACTS.values() if row.durability is Durability.MONEY] if money_only else []
        )
        only = f"AND kept.contract IN ({', '.join('?' * len(wanted))})" if wanted else ""
        statement = self._sql(f"{self._behind} {only} ORDER BY kept.id LIMIT {CHUNK}")
        rows = connection.execute(statement, (after, *wanted)).fetchall()
        found = []
        for _, *row in rows:
            contract, name = ALL_CONTRACTS.get(row[1]), (row[0], row[1], row[2])
            try:
                if contract is None:
                    raise Suspect(name, row[4], f"no contract of this version is called {row[1]!r}")
                _open(contract, name, None, row)
            except Suspect as suspect:
                found.append(Finding(path_to(suspect.name), str(suspect)))
        known = {item.path for item in self.list_quarantine(connection)} if found else set()
        return (rows[-1][0] if rows else 0), [finding for finding in found if finding.path not in known]

    def check_quarantine(self, connection: Connection) -> list[Finding]:
        kept = self.list_quarantine(connection)
        return [Finding(item.path, f"in quarantine, its key is blocked: {item.reason}") for item in kept]

    def list_quarantine(self, connection: Connection) -> list[Quarantined]:
        rows = connection.execute(
            "SELECT namespace, contract, key, min(reason), max(found_at) FROM quarantine "
            "GROUP BY namespace, contract, key ORDER BY namespace, contract, key"
        )
        return [
            Quarantined(path_to((namespace, contract, key)), contract, key.split("/"), reason, found_at)
            for namespace, contract, key, reason, found_at in rows
        ]

    def restore(self, path: str, connection: Connection) -> Record:
        """As `Store.restore`. Where an index or the name in the row was the damage, that is mended as well."""
        name, _ = self._find_in_quarantine(path, connection)
        contract = ALL_CONTRACTS[name[1]]
        number = self._number_of(name, connection)
        row = connection.execute(self._by_id, (number,)).fetchone()
        try:
            record = reseal(contract, b"" if row is None else row[5])
            if name_of(name[0], contract, check_key(contract, record.key)) != name:
                raise Damaged(f"it is the record of {record.key}")
        except Damaged as error:
            raise UserError(f"{path} is still damaged: {error}; mend its row in `records`, or drop it") from None
        self._rebuild(connection)
        connection.execute(
            self._sql("UPDATE records SET namespace = ?, contract = ?, key = ? WHERE id = ?"), (*name, number)
        )
        # No process that knew the record before the damage may take this one for it.
        record = msgspec.structs.replace(record, rev=record.rev + 1)
        connection.execute(self._write, (*name, int(record.removed), seal(contract, record), *name[:2]))
        connection.execute(self._release, name)
        return record

    def drop(self, path: str, connection: Connection) -> Quarantined:
        """As `Store.drop`."""
        name, item = self._find_in_quarantine(path, connection)
        number = self._number_of(name, connection)
        self._rebuild(connection)
        connection.execute(self._delete, (number,))
        connection.execute(self._release, name)
        return item

    def _rebuild(self, connection: Connection) -> None:
        if self._dialect.rebuild:
            connection.execute(self._dialect.rebuild)

    def _find_in_quarantine(self, path: str, connection: Connection) -> tuple[Name, Quarantined]:
        for item in self.list_quarantine(connection):
            if item.path == path:
                key = "/".join(item.key)
                return (path.removesuffix(f"{item.contract}/{key}"), item.contract, key), item
        raise UserError(f"nothing in quarantine is called {path!r}: see `backtest-kit store quarantine list`")


def _open(contract: Contract, name: Name, key: Key | None, row: Sequence[Any], unseal: Unseal = unseal) -> Record:
    """The record in a row that was found under `name`, and belongs to `key` or to whatever key has that name."""
    *found, removed, data = row
    try:
        if tuple(found) != name:
            raise Damaged(_misnamed((found[0], found[1], found[2])))
        record = unseal(contract, key, data)
        if key is None and (own := name_of(name[0], contract, record.key)) != name:
            wrong, name = name[2], own
            raise Damaged(f"its row is called {wrong}")
        if bool(removed) != record.removed:
            raise Damaged("its row and its record differ in whether it was removed")
    except Damaged as error:
        raise Suspect(name, data, error) from None
    return record


def _misnamed(name: Name) -> str:
    return f"its row is called {path_to(name)}"
