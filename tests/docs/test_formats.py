"""The bytes that docs/formats.md shows are those that the stores write."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import backtest_kit as bk
from backtest_kit.persist.backends import columns
from backtest_kit.persist.codec import unseal, unseal_line
from backtest_kit.persist.contracts import CONTRACTS

TEXT = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
SIGNAL = ("trend", "binance", "BTCUSDT")


def shown(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def fields(text: str) -> list[str]:
    record = json.loads(text)
    return [*record, *record["key"]]


async def test_a_record_and_a_line_are_as_shown(tmp_path: Path) -> None:
    kit = bk.Kit(tmp_path)
    names: dict[str, Any] = dict(zip(("strategy_name", "exchange_name", "symbol"), SIGNAL, strict=True))
    await kit.persistence.signal.write({"price": 1.5, "limit": float("inf")}, **names)
    await kit.persistence.log.write({"level": "info", "message": "hi"}, entry_id="1-a-0")
    await kit.close()
    record, line = shown("json")
    written = (tmp_path / "signal" / "trend" / "binance" / "BTCUSDT.json").read_text()
    assert fields(written) == fields(record)
    assert json.loads(written)["value"] == json.loads(record)["value"]
    assert unseal(CONTRACTS["signal"], SIGNAL, record.encode()).value == json.loads(record)["value"], (
        "its checksum fits"
    )
    (day,) = (tmp_path / "log").iterdir()
    assert fields(day.read_text()) == fields(line)
    assert json.loads(unseal_line(line.encode()))["value"] == {"level": "info", "message": "hi"}


async def test_the_schema_of_sqlite_is_as_shown(tmp_path: Path) -> None:
    kit = bk.Kit(tmp_path)
    kit.persistence.bind("*", bk.SqliteStore(tmp_path / "bot.db"))
    await kit.persistence.signal.write(1, strategy_name="a", exchange_name="b", symbol="C")
    await kit.close()
    with sqlite3.connect(tmp_path / "bot.db") as database:
        made = {" ".join(sql.split()) for (sql,) in database.execute("SELECT sql FROM sqlite_master WHERE sql <> ''")}
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (application,) = database.execute("PRAGMA application_id").fetchone()
    database.close()
    (text,) = shown("sql")
    assert {" ".join(statement.split()) for statement in text.split(";") if statement.strip()} == made
    assert f"application id {application}, user version {version}" in " ".join(TEXT.split())


def test_the_mark_of_a_candle_month_is_as_shown() -> None:
    assert f"| 0 | 8 | `{columns._MAGIC.decode()}` |" in TEXT
    assert f"2022-01{columns.SUFFIX}" in TEXT
