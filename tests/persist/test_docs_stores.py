"""The page about stores, executed: its examples run, and its own store passes the conformance suite."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from backtest_kit.persist.contracts import CONTRACTS, Durability
from backtest_kit.persist.testing import StoreConformance
from backtest_kit.persist.urls import store_at

PAGE = (Path(__file__).parents[2] / "docs" / "stores.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def block_with(text: str) -> str:
    (block,) = (block for block in BLOCKS if text in block)
    return str(block)


def defined_in(*texts: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "docs_stores"}
    for text in texts:
        exec(compile(block_with(text), f"docs/stores.md ({text})", "exec"), names)  # noqa: S102
    return names


LogStore = defined_in("class LogStore")["LogStore"]


class TestLogStore(StoreConformance):
    make_store = defined_in("class LogStore", "class TestLogStore")["TestLogStore"].make_store
    obstruct = defined_in("class TestLogStore")["TestLogStore"].obstruct


def test_own_store_is_short() -> None:
    assert len(block_with("class LogStore").splitlines()) < 200


async def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = defined_in("persistence = bk.Kit()", "class MemorySignalAdapter", "async def tour", "class LogStore")
    await names["tour"]()
    exec(block_with("async def look"), names)  # noqa: S102
    await names["look"]()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table after a heading."""
    _, _, rest = PAGE.partition(heading)
    lines = re.findall(r"^\|.*\|$", rest.partition("\n#")[0], re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_tables_say_what_the_code_does() -> None:
    places = {"bound store": "bound store", "process memory": "process memory", "files": "file"}
    listed = set()
    for names, live, backtest in (row for row in rows("## Choosing") if len(row) == 3 and "`" not in row[0]):
        if live not in places:
            continue
        for name in names.split(", "):
            listed.add(name)
            row = CONTRACTS[name]
            assert (row.live.value, row.backtest.value) == (places[live], places[backtest])
    assert listed == set(CONTRACTS)
    for kind, names, _ in rows("## What a promise is worth")[: len(Durability)]:
        assert set(names.split(", ")) == {row.name for row in CONTRACTS.values() if row.durability is Durability(kind)}


def test_every_store_and_class_has_a_proof_that_exists() -> None:
    proofs = [row for row in rows("## What a promise is worth") if len(row) == 3 and "pytest" in row[2]]
    assert {row[0] for row in proofs} == {"file", "sqlite", "memory, dummy", "a class of yours"}
    for durability in Durability:
        assert sum(durability.value in row[1] for row in proofs if row[0] in ("file", "sqlite")) == 2
    root = Path(__file__).parents[2]
    for path in re.findall(r"tests/[\w/.]+", PAGE):
        assert (root / path).exists(), path


def test_addresses_are_real() -> None:
    addresses = re.findall(r"^\| `(\w+:[^`]*)` \|", PAGE, re.MULTILINE)
    stores = [type(store_at(address)).__name__ for address in addresses]
    assert stores == ["FileStore", "SqliteStore", "MemoryStore", "DummyStore", "MongoStore"]
