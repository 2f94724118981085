"""In what one SQL database differs from another, and how rows are named in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.keys import path_of
from backtest_kit.persist.store import Key

Name = tuple[str, str, str]
"""Namespace, contract and key as they stand in the columns. A namespace is `@outer/@inner/`, or empty."""


class Connection(Protocol):
    """What is used of a DB-API connection; both sqlite3 and psycopg have `execute` on the connection itself."""

    def execute(self, statement: str, parameters: Sequence[Any] = ..., /) -> Any: ...


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """In what one SQL database differs from another. Statements are written with `?`."""

    parameter: str
    text: str
    """The type of a text that is ordered by its bytes."""
    blob: str
    identity: str
    """The type of a number that the database gives to each row."""
    columns: str
    """Those of a row under the alias `kept`: namespace, contract, key, removed, record."""
    index: str = ""
    """What makes a statement use the index `{}`. Empty: the database verifies its pages, and one index is enough."""
    table: str = ""
    """What makes a statement read the table itself."""
    rebuild: str = ""
    """The statement that makes the indexes anew."""
    remedy: str = "restore a copy"
    """What an operator does about indexes that disagree; `{}` is the database."""

    def schema(self) -> tuple[str, ...]:
        text, blob = self.text, self.blob
        statements = (
            f"CREATE TABLE records (id {self.identity}, namespace {text} NOT NULL, contract {text} NOT NULL, "
            f"key {text} NOT NULL, seq BIGINT NOT NULL, removed INTEGER NOT NULL, record {blob} NOT NULL)",
            "CREATE UNIQUE INDEX records_by_name ON records (namespace, contract, key)",
            "CREATE INDEX records_in_order ON records (namespace, contract, seq)",
            f"CREATE TABLE quarantine (id {self.identity}, found_at BIGINT NOT NULL, namespace {text} NOT NULL, "
            f"contract {text} NOT NULL, key {text} NOT NULL, reason {text} NOT NULL, record {blob} NOT NULL)",
        )
        # The same once more, in a tree of its own: what a damaged page hides in one of them, the other one still finds.
        second = "CREATE UNIQUE INDEX records_by_key ON records (key, contract, namespace)"
        return (*statements, second) if self.index else statements


def name_of(namespace: str, contract: Contract, key: Key) -> Name:
    return namespace, contract.name, "/".join(path_of(contract, key))


def path_to(name: Name) -> str:
    """A row's name in the operations on the quarantine, in the form that files have theirs."""
    namespace, contract, key = name
    return f"{namespace}{contract}/{key}"
